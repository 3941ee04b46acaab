"""Reasons of a batch: the columns that CSV and Parquet files and tables get, and what the service says of the rows."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.contract import digest_folder
from closedloop.core.reasons import shapley
from closedloop.core.training.estimators import encode_frame
from closedloop.errors import ConfigError, DataError
from closedloop.scoring.batch import BatchOptions, score_batch
from closedloop.scoring.reasons import describe_reasons
from closedloop.serving.models import load_model
from closedloop.serving.slots.slots import Slot
from tests.model_folders import write_model_folder
from tests.trained_folders import CATEGORICAL, NUMERIC, Trained, make_people, write_trained_folder

ROWS = shapley.TABLE_ROWS_MIN + 300  # the second chunk is explained row by row


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Trained:
    folder = tmp_path_factory.mktemp("model") / "folder"
    groups = {"visits": ("visits_7d", "visits_30d")}
    return write_trained_folder(folder, "gradient_boosting", reasons=groups)


def score(source: Any, target: Any, trained: Trained, tmp_path: Path, **options: Any) -> None:
    slot = Slot("7", str(trained.folder), digest_folder(trained.folder))
    chosen = {"range_margin": 10.0, "id_key": b"key", "chunk_rows": shapley.TABLE_ROWS_MIN} | options
    score_batch(str(source), str(target), slot, BatchOptions(**chosen), state_dir=tmp_path / "state")


def write_people(path: Path) -> pd.DataFrame:
    frame, _ = make_people(ROWS, 6)
    frame.insert(0, "customer_id", [f"C{number}" for number in range(ROWS)])
    frame.to_parquet(path, index=False)
    return frame


def test_files_and_tables_have_a_column_for_each_part_of_a_reason(trained: Trained, tmp_path: Path) -> None:
    frame = write_people(tmp_path / "in.parquet")
    targets = [tmp_path / "out.parquet", tmp_path / "out.csv", f"sqlite:///{tmp_path / 'out.db'}#scores"]
    with closing(sqlite3.connect(tmp_path / "out.db")) as store:
        for target in targets:
            score(tmp_path / "in.parquet", target, trained, tmp_path, reasons=3)
        tables = [
            pd.read_parquet(targets[0]),
            pd.read_csv(targets[1], dtype={"reason_1_value": str, "reason_2_value": str, "reason_3_value": str}),
            pd.read_sql("SELECT * FROM scores", store),
        ]
    explainer = load_model(trained.folder, version="7", folder_sha256=None).explainer
    values = [
        tuple(None if pd.isna(one) else one for one in row)
        for row in frame[NUMERIC + CATEGORICAL].itertuples(index=False)
    ]
    expected = explainer.explain(encode_frame(trained.contract.features, frame), values, 3)
    for table in tables:
        assert list(table)[-14:] == list(describe_reasons(3))
        found = table.set_index("customer_id").loc[frame["customer_id"]]
        raw = [one.raw_score for one in expected]
        np.testing.assert_allclose(found["raw_score"], raw, rtol=0, atol=1e-9)
        assert found["base"].unique().tolist() == pytest.approx([explainer.base])
        for number in (1, 2, 3):
            reasons = [one.reasons[number - 1] for one in expected]
            assert found[f"reason_{number}"].tolist() == [one.reason for one in reasons]
            assert found[f"reason_{number}_feature"].tolist() == [one.feature for one in reasons]
            sizes = [one.contribution for one in reasons]
            np.testing.assert_allclose(found[f"reason_{number}_contribution"], sizes, rtol=0, atol=1e-9)
            shown = [None if pd.isna(one) else one for one in found[f"reason_{number}_value"]]
            for text, reason in zip(shown, reasons, strict=True):
                if isinstance(reason.value, float):
                    assert float(text) == reason.value
                else:
                    assert text == reason.value


def test_a_batch_without_reasons_has_none_of_their_columns(trained: Trained, tmp_path: Path) -> None:
    write_people(tmp_path / "in.parquet")
    score(tmp_path / "in.parquet", tmp_path / "out.parquet", trained, tmp_path)
    columns = ["customer_id", "score", "decision", "model_version", "prediction_id"]
    assert list(pd.read_parquet(tmp_path / "out.parquet")) == columns


def test_more_reasons_than_there_are_stay_empty(trained: Trained, tmp_path: Path) -> None:
    write_people(tmp_path / "in.parquet")
    score(tmp_path / "in.parquet", tmp_path / "out.parquet", trained, tmp_path, reasons=7)
    found = pd.read_parquet(tmp_path / "out.parquet")
    assert found["reason_5"].notna().all()  # visits, age, empty, plan, city
    assert found[["reason_6", "reason_6_value", "reason_7_contribution"]].isna().all(axis=None)


def test_a_version_that_gives_no_reasons_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    write_people(tmp_path / "in.parquet")
    other = Trained(folder, None, None, None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no reasons"):
        score(tmp_path / "in.parquet", tmp_path / "out.parquet", other, tmp_path, reasons=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "model"]


def test_a_run_is_resumed_with_as_many_reasons(trained: Trained, tmp_path: Path) -> None:
    frame = write_people(tmp_path / "in.parquet")
    frame.loc[ROWS - 1, "age"] = np.inf
    frame.loc[: ROWS // 2, "visits_7d"] = 1e30
    frame.to_parquet(tmp_path / "in.parquet", index=False)
    with pytest.raises(DataError, match="break the contract"):
        score(tmp_path / "in.parquet", tmp_path / "out.csv", trained, tmp_path, reasons=3)
    with pytest.raises(ConfigError, match="had another reasons"):
        score(tmp_path / "in.parquet", tmp_path / "out.csv", trained, tmp_path, reasons=2, resume=True)
