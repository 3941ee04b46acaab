"""A real PostgreSQL as the place of other people's data: `describe`, `ingest` and `attach` read its typed columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sqlalchemy
import yaml

from tests.conftest import Project
from tests.integration.test_attach import CONFIG, make_rows
from tests.services import run_postgres

pytestmark = [pytest.mark.thorough]
VARIABLE, ROWS = "CLUB_DATABASE", 600
TABLE = """
CREATE TABLE members (
    member uuid PRIMARY KEY, plan text, "Monatliche Gebühr" numeric(8, 2), visits smallint, weight double precision,
    is_family boolean, joined date, seen_at timestamptz, card json, host inet, gone boolean NOT NULL
)
"""
FILL = """
INSERT INTO members
SELECT md5(n::text)::uuid, CASE WHEN n % 3 = 0 THEN 'Jahr' ELSE 'Monat' END,
    CASE WHEN n % 9 = 0 THEN NULL ELSE n % 40 + .5 END,
    n % 11, CASE WHEN n % 50 = 0 THEN 'NaN' ELSE n * .37 % 5 END, n % 2 = 0, date '2024-01-01' - n,
    timestamptz '2024-03-01 12:00+02' + n * interval '1 hour', '{"a": 1}', '10.0.0.1'::inet + n % 3, (n * 7) % 13 < 4
FROM generate_series(1, 600) AS n
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server.create_database()


@pytest.fixture
def club(project: Project, address: str, monkeypatch: pytest.MonkeyPatch) -> Project:
    engine = sqlalchemy.create_engine(address)
    with engine.begin() as connection:
        for statement in ("DROP TABLE IF EXISTS members", TABLE, FILL):
            connection.execute(sqlalchemy.text(statement.replace(":", r"\:")))
    engine.dispose()
    monkeypatch.setenv(VARIABLE, address)
    return project


def test_a_table_is_described_and_read_with_its_types(club: Project) -> None:
    told = club.run("describe", f"{VARIABLE}#members", "--name", "club").output
    for named in ("'joined' is left out: a date", "'seen_at' is left out: a date", "'card' is left out"):
        assert named in told
    config = yaml.safe_load((club.root / "configs/datasets/club.yaml").read_text(encoding="utf-8"))
    columns = config["columns"]
    assert columns["entity_id"] == "member"
    assert columns["numeric"] == ["Monatliche Gebühr", "visits", "weight"]
    assert columns["categorical"] == ["plan", "is_family", "host"]
    assert columns["label"] == {"column": "gone", "churned": ["True"], "stayed": ["False"]}
    club.change_params({"dataset": "club"})
    club.run("ingest")
    rows = pd.read_parquet(club.root / "data/raw/customers.parquet")
    assert (len(rows), int(rows["churned"].sum())) == (ROWS, sum((n * 7) % 13 < 4 for n in range(1, ROWS + 1)))
    assert rows["customer_id"].str.fullmatch("[0-9a-f-]{36}").all()
    assert int(rows["Monatliche Gebühr"].isna().sum()) == sum(n % 9 == 0 for n in range(1, ROWS + 1))
    assert rows["Monatliche Gebühr"].dropna().mod(1).eq(0.5).all()
    assert set(rows["host"]) == {"10.0.0.1", "10.0.0.2", "10.0.0.3"}
    assert set(rows["is_family"]) == {"True", "False"}


def test_predictions_in_a_table_are_watched(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_rows(4000, 1).to_parquet(tmp_path / "reference.parquet", index=False)
    engine = sqlalchemy.create_engine(address)
    window = make_rows(2000, 3, shift=-0.7)
    window["left"] = window["left"].where(np.arange(len(window)) < 1000, None)  # the others are not known yet
    kinds = {name: sqlalchemy.Numeric(12, 6) for name in ("visits", "probability")}
    window.to_sql("predictions", engine, index=False, if_exists="replace", dtype=kinds)  # type: ignore[arg-type]
    engine.dispose()
    monkeypatch.setenv("THEIRS", address)
    config = CONFIG.replace("window.csv", "THEIRS#predictions")
    (tmp_path / "theirs.yaml").write_text(config, encoding="utf-8")
    told = Project(tmp_path).run("attach", "theirs.yaml", "--as-of", "2024-03-01").output
    assert told.startswith(
        "alert: drift in the newest check: score (0.26), visits (0.26); outcomes are as the scores say"
    ), told
    assert 'closedloop_attached_outcome_rows{model_name="theirs",model="theirs"} 1000' in (
        tmp_path / "attached/theirs/metrics.prom"
    ).read_text(encoding="utf-8")
