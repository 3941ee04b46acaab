"""Small tables and rare classes get sensible verdicts from the gates, and refusals that say what to do."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.conftest import Project

pytestmark = pytest.mark.thorough
STAGES = ("ingest", "validate", "features", "training-set", "train")
DATASET: dict[str, Any] = {
    "name": "club",
    "model_name": "club_churn",
    "description": "Members of a club.",
    "kind": "table",
    "source": {"type": "csv"},
    "columns": {
        "entity_id": "member",
        "numeric": ["months", "visits", "fee"],
        "categorical": ["plan"],
        "label": {"column": "left", "churned": "yes", "stayed": "no"},
    },
    "expectations": [
        {"table": "customers", "type": "expect_column_values_to_be_unique", "kwargs": {"column": "customer_id"}}
    ],
}


def make_club(project: Project, rows: int, rate: float, *, gates: dict[str, Any], **model: Any) -> Project:
    """A club of which about ``rate`` leaves, those above all who seldom come; whose fee is blank leaves more often."""
    draw = np.random.default_rng(5)
    visits, blank = draw.normal(size=rows), draw.random(rows) < 0.2
    pull = -1.8 * visits + 1.5 * blank + draw.logistic(size=rows)
    left = pull > np.quantile(pull, 1 - rate)
    frame = pd.DataFrame(
        {
            "member": [f"M{number}" for number in range(rows)],
            "months": draw.integers(1, 60, rows),
            "visits": visits.round(3),
            "fee": np.where(blank, "", draw.normal(25, 5, rows).round(2).astype(str)),
            "plan": draw.choice(["a", "b"], rows),
            "left": np.where(left, "yes", "no"),
        }
    )
    frame.to_csv(project.root / "club.csv", index=False)
    config = yaml.safe_dump({**DATASET, "gates": gates})
    (project.root / "configs/datasets/club.yaml").write_text(config, encoding="utf-8")
    project.change_params(
        {
            "dataset": "club",
            "data": {"source": "club.csv"},
            "model": {"type": "logistic_regression", **model},
            "evaluation": {"bootstrap_samples": 300},
        }
    )
    return project


def read_verdict(project: Project) -> tuple[set[str], dict[str, Any]]:
    gates = project.read_json("metrics/gates.json")["gates"]
    return {name for name, gate in gates.items() if gate["blocking"] and not gate["passed"]}, gates


def test_three_churners_prove_nothing_and_the_refusal_says_what_to_do(project: Project) -> None:
    made = make_club(project, 300, 0.01, gates={})
    made.run_stages("ingest", "validate", "features")
    output = " ".join(made.run("training-set", status=1).output.split())
    assert "part has" in output
    assert "give more rows, or change params.yaml's split" in output


def test_a_few_churners_in_the_test_rows_prove_nothing(project: Project) -> None:
    made = make_club(project, 600, 0.05, gates={"calibration_error_max": 0.2, "roc_auc_min": 0.5})
    made.run_stages(*STAGES)
    output = " ".join(made.run("evaluate", status=2).output.split())
    failed, _ = read_verdict(made)
    assert "class_rows" in failed
    assert "raise split.test_fraction or split.test_snapshots, or lower gates.class_rows_min" in output


def test_a_useful_model_of_a_class_of_two_percent_passes_under_default_gates(project: Project) -> None:
    made = make_club(project, 6000, 0.02, gates={})
    made.run_stages(*STAGES, "evaluate")
    _, gates = read_verdict(made)
    assert gates["lift"]["figure"] > 3
    assert not gates["accuracy"]["blocking"]
    assert not gates["trivial_accuracy"]["blocking"]


@pytest.mark.parametrize(
    ("model_type", "weights"), [("lightgbm", {"class_weight": "balanced"}), ("xgboost", {"scale_pos_weight": 99})]
)
def test_a_weighted_model_of_a_class_of_one_percent_passes_under_default_gates(
    project: Project, model_type: str, weights: dict[str, Any]
) -> None:
    params = {"n_estimators": 40, "max_depth": 3, **weights}
    made = make_club(project, 12_000, 0.01, gates={}, type=model_type, params=params)
    made.run_stages(*STAGES, "evaluate")
    _, gates = read_verdict(made)
    judged = {name for name, gate in gates.items() if gate["blocking"]}
    assert {"average_precision", "lift", "roc_auc", "calibration", "better_than_trivial"} <= judged
    assert judged.isdisjoint({"accuracy", "f1_weighted", "trivial_accuracy"})
    assert gates["lift"]["figure"] > 3
    made.change_params({"model": {"calibrate": False}})
    made.run("train")
    made.run("evaluate", status=2)
    assert {"calibration", "better_than_trivial"} <= read_verdict(made)[0]


def test_a_useful_model_of_three_hundred_rows_passes(project: Project) -> None:
    limits = {"accuracy_min": 0.6, "f1_weighted_min": 0.6, "roc_auc_min": 0.6, "calibration_error_max": 0.25}
    made = make_club(project, 300, 0.3, gates=limits)
    made.change_params({"split": {"test_fraction": 0.4}})
    made.run_stages(*STAGES, "evaluate")


def test_what_calls_too_few_is_told_of_the_threshold(project: Project) -> None:
    limits = {"accuracy_min": 0.5, "f1_weighted_min": 0.5, "rate_difference_max": 0.0}
    made = make_club(project, 3000, 0.29, gates=limits, threshold=0.5)
    made.run_stages(*STAGES)
    output = " ".join(made.run("evaluate", status=2).output.split())
    assert read_verdict(made)[0] == {"class_balance"}
    assert "set model.threshold to f1, accuracy or another number" in output
    made.change_params({"model": {"threshold": "f1"}})
    made.run_stages("train", "evaluate")


def test_the_card_of_a_table_without_time_claims_no_date(project: Project) -> None:
    limits = {"accuracy_min": 0.5, "f1_weighted_min": 0.5, "calibration_error_max": 0.2}
    made = make_club(project, 1500, 0.3, gates=limits)
    made.run_stages(*STAGES, "evaluate")
    card = (made.root / "reports/model_card.html").read_text(encoding="utf-8")
    for part in ("train", "validation", "test"):
        assert re.search(rf"<td>{part}</td><td class=.words.>\d[\d,]* rows?, ", card), part
    assert "data without a time" in card
    assert "2025-01-01" not in card.split("<body>")[1]
