"""`closedloop attach` watches a model that somebody else serves, from two tables and one YAML."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Project

CONFIG = """name: theirs
reference: reference.parquet
window: window.csv
score: probability
label: {column: left, churned: "yes", stayed: "no"}
customer_id: member
"""


def make_rows(rows: int, seed: int, *, shift: float = 0.0, flip: bool = False) -> pd.DataFrame:
    """Customers whose scores are the truth's own probabilities; ``flip`` turns the truth around."""
    draw = np.random.default_rng(seed)
    visits = draw.normal(shift, 1, rows)
    score = 1 / (1 + np.exp(1.5 * visits + 1))
    left = draw.random(rows) < (1 - score if flip else score)
    return pd.DataFrame(
        {
            "member": np.arange(rows) + seed * 100_000,
            "visits": visits.round(4),
            "plan": draw.choice(["monthly", "yearly"], rows),
            "probability": score.round(6),
            "left": np.where(left, "yes", "no"),
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Project:
    make_rows(4000, 1).to_parquet(tmp_path / "reference.parquet", index=False)
    (tmp_path / "theirs.yaml").write_text(CONFIG, encoding="utf-8")
    return Project(tmp_path)


def attach(folder: Project, window: pd.DataFrame, day: str, *more: str, status: int = 0) -> str:
    window.to_csv(folder.root / "window.csv", index=False)
    return folder.run("attach", "theirs.yaml", "--as-of", day, *more, status=status).output


def read_figures(folder: Project) -> dict[str, float]:
    text = (folder.root / "attached/theirs/metrics.prom").read_text(encoding="utf-8")
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    for one in samples:
        assert one.labels["model_name"] == one.labels["model"] == "theirs"
        assert one.labels.get("feature_name") == one.labels.get("feature")
    prefix = "closedloop_attached_"
    return {one.name.removeprefix(prefix) + one.labels.get("feature_name", ""): one.value for one in samples}


def test_the_same_customers_are_no_alarm_and_others_are_watched_and_then_alarm(folder):
    assert attach(folder, make_rows(2000, 2).drop(columns="left"), "2024-03-01").startswith("none: ")
    report = (folder.root / "attached/theirs/report.html").read_text(encoding="utf-8")
    assert "theirs" in report
    assert read_figures(folder)["verdict"] == 0
    others = make_rows(2000, 3, shift=-0.7)
    output = attach(folder, others.drop(columns="left"), "2024-04-01", "--fail-on", "watch", status=2)
    assert "alert: drift in 1 of the last 2 checks: " in output
    figures = read_figures(folder)
    assert figures["drifted_features"] == 2  # visits, and the score
    assert figures["effectvisits"] > 0.2 > figures["effectplan"]
    assert "outcomes are as the scores say: accuracy 0.735" in attach(folder, others, "2024-05-01")


def test_outcomes_that_scores_do_not_announce_ask_for_a_retraining(folder):
    output = attach(folder, make_rows(2000, 4, flip=True), "2024-03-01")
    assert output.startswith("retrain: outcomes: a recalibration would win back")
    assert read_figures(folder)["realised_accuracy"] < 0.5


@pytest.mark.thorough
def test_a_window_that_stays_too_small_ends_with_a_status_of_its_own_until_it_is_larger(folder):
    for day in ("2024-03-01", "2024-04-15"):
        assert attach(folder, make_rows(100, 8), day, "--fail-on", "watch").startswith("none: 100 customers")
    output = attach(folder, make_rows(100, 8), "2024-05-01", "--fail-on", "retrain", status=3)
    assert "cannot tell: for 61 days there was too little to judge the model by: 100 customers" in output
    assert "Undecided: the verdict is cannot tell, --fail-on is retrain" in output
    assert read_figures(folder)["verdict"] == 4
    assert "cannot tell" in (folder.root / "attached/theirs/report.html").read_text(encoding="utf-8")
    assert attach(folder, make_rows(100, 8), "2024-05-02").startswith("cannot tell: ")
    assert attach(folder, make_rows(2000, 8), "2024-05-15", "--fail-on", "watch").startswith("none: nothing")


def test_a_program_reads_the_check_as_json(folder):
    make_rows(2000, 3, shift=-0.7).to_csv(folder.root / "window.csv", index=False)
    told = json.loads(folder.run("attach", "theirs.yaml", "--as-of", "2024-03-01", "--json").stdout)
    assert told["check"]["verdict"] == "alert"
    assert told["check"]["evidence"]["drift"]["drifted"] == ["score", "visits"]
    assert told["report"] == "attached/theirs/report.html"


def test_a_check_of_the_same_day_is_replaced(folder):
    for _ in range(2):
        attach(folder, make_rows(1000, 5), "2024-03-01")
    assert len(folder.read_json("attached/theirs/checks.json")) == 1


def test_predictions_in_a_database(folder, monkeypatch):
    with sqlite3.connect(folder.root / "theirs.db") as connection:
        make_rows(1000, 6).to_sql("predictions", connection, index=False)
    monkeypatch.setenv("THEIRS", f"sqlite:///{folder.root}/theirs.db")
    config = CONFIG.replace("window.csv", "THEIRS#predictions")
    (folder.root / "theirs.yaml").write_text(config, encoding="utf-8")
    assert folder.run("attach", "theirs.yaml", "--as-of", "2024-03-01").output.startswith("none: ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("probability", "points"), "no column 'points'"),
        (("column: left", "column: gone"), "no column 'gone'"),
        (('churned: "yes"', 'churned: "da"'), "must be 'da' (churned) or 'no' (stayed), found 'yes'"),
        (("score: probability", "score: visits"), "a score is a probability from 0 to 1"),
        (("name: theirs", "nam: theirs"), "nam: unknown key"),
    ],
)
def test_a_wrong_config_is_refused_and_nothing_is_written(folder, change, said):
    (folder.root / "theirs.yaml").write_text(CONFIG.replace(*change), encoding="utf-8")
    assert said in attach(folder, make_rows(600, 7), "2024-03-01", status=1)
    assert not (folder.root / "attached").exists()


def test_the_pages_example_of_the_library_runs(capsys):
    page = (Path(__file__).parents[2] / "docs/attach.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    frames = [
        make_rows(1500, seed).rename(columns={"probability": "score", "member": "customer_id"}) for seed in (1, 2)
    ]
    reference, window = (frame.assign(churned=frame["left"] == "yes") for frame in frames)
    known = window.assign(outcome=window["churned"].astype(int))
    exec(code, {"reference": reference, "window": window, "known": known})  # noqa: S102  the page's own lines
    assert "Decision(verdict='none'" in capsys.readouterr().out


def test_ids_that_have_lost_digits_are_refused(folder):
    window = make_rows(200, 2).astype({"member": object})
    window.loc[5, "member"] = "1.5E+16"
    assert "row 6, column 'member': 1.5E+16 may have lost digits" in attach(folder, window, "2024-03-01", status=1)
