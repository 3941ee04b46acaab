from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from closedloop.core.evaluation.bootstrap import Bootstrap, Interval
from closedloop.core.evaluation.comparison import compare_models
from closedloop.core.evaluation.gates import (
    REMEDIES,
    GateResult,
    failed_gates,
    gate_accuracy,
    gate_average_precision,
    gate_better_than_trivial,
    gate_calibration,
    gate_champion_challenger,
    gate_class_balance,
    gate_class_rows,
    gate_f1_weighted,
    gate_feature_cutoff,
    gate_group_fairness,
    gate_latency,
    gate_lift,
    gate_noise_robustness,
    gate_onnx_parity,
    gate_profit,
    gate_roc_auc,
    gate_single_column,
    gate_too_good,
    gate_trivial_accuracy,
    require_gates,
)
from closedloop.core.evaluation.limits import GateLimits
from closedloop.core.evaluation.metrics import measure_groups
from closedloop.core.evaluation.profit import ProfitComparison
from closedloop.core.evaluation.trivial import Gains
from closedloop.errors import GateFailed

NAN = float("nan")


def groups_table(**accuracies: tuple[float, int, bool]) -> pd.DataFrame:
    rows = [(name, *values) for name, values in accuracies.items()]
    return pd.DataFrame(rows, columns=["group", "accuracy", "rows", "enough_rows"])


def gains(**ends: tuple[float, float]) -> dict[str, Gains]:
    """Against rules of these names: the lower end of the log loss saved, and the upper end of the lead in accuracy."""
    return {name: Gains(low + 0.1, Interval(low, 1.0), 0.0, Interval(-1.0, high)) for name, (low, high) in ends.items()}


# Per gate: one that passes, one exactly at the limit, one just beyond it, one that could not be measured.
CASES: list[tuple[str, GateResult, bool]] = [
    ("accuracy", gate_accuracy(0.9, 0.85), True),
    ("accuracy", gate_accuracy(0.85, 0.85), True),
    ("accuracy", gate_accuracy(0.8499, 0.85), False),
    ("accuracy", gate_accuracy(NAN, 0.85), False),
    ("f1_weighted", gate_f1_weighted(0.9, 0.8), True),
    ("f1_weighted", gate_f1_weighted(0.8, 0.8), True),
    ("f1_weighted", gate_f1_weighted(0.79, 0.8), False),
    ("f1_weighted", gate_f1_weighted(NAN, 0.8), False),
    ("roc_auc", gate_roc_auc(0.8, 0.75), True),
    ("roc_auc", gate_roc_auc(0.75, 0.75), True),
    ("roc_auc", gate_roc_auc(0.74, 0.75), False),
    ("roc_auc", gate_roc_auc(NAN, 0.75), False),
    ("too_good_accuracy", gate_too_good("accuracy", 0.98, 0.99), True),
    ("too_good_accuracy", gate_too_good("accuracy", 0.99, 0.99), False),
    ("too_good_accuracy", gate_too_good("accuracy", 1.0, 0.99), False),
    ("too_good_roc_auc", gate_too_good("roc_auc", NAN, 0.97), False),
    ("too_good_roc_auc", gate_too_good("roc_auc", 0.96, 0.97), True),
    ("group_fairness", gate_group_fairness(groups_table(a=(0.8, 300, True), b=(0.9, 300, True)), 0.75), True),
    ("group_fairness", gate_group_fairness(groups_table(a=(0.75, 300, True)), 0.75), True),
    ("group_fairness", gate_group_fairness(groups_table(a=(0.74, 300, True), b=(0.9, 300, True)), 0.75), False),
    ("group_fairness", gate_group_fairness(groups_table(a=(NAN, 300, True), b=(0.9, 300, True)), 0.75), False),
    ("profit", gate_profit(ProfitComparison(1.0, 0.9, -0.1, Interval(-0.3, 0.0)), ""), True),
    ("profit", gate_profit(ProfitComparison(1.0, 0.8, -0.2, Interval(-0.3, -0.1)), ""), False),
    ("profit", gate_profit(ProfitComparison(1.0, 0.8, -0.2, Interval(NAN, NAN)), ""), False),
    ("noise_robustness", gate_noise_robustness(0.99, 0.95), True),
    ("noise_robustness", gate_noise_robustness(0.95, 0.95), True),
    ("noise_robustness", gate_noise_robustness(0.94, 0.95), False),
    ("noise_robustness", gate_noise_robustness(NAN, 0.95), False),
    ("class_balance", gate_class_balance(0.3, 0.25, 0.2), True),
    ("class_balance", gate_class_balance(0.9, 0.7, 0.2), True),
    ("class_balance", gate_class_balance(0.7, 0.9, 0.2), True),
    ("class_balance", gate_class_balance(0.05, 0.26, 0.2), False),
    ("class_balance", gate_class_balance(NAN, 0.25, 0.2), False),
    ("calibration", gate_calibration(0.01, 0.05), True),
    ("calibration", gate_calibration(0.05, 0.05), True),
    ("calibration", gate_calibration(0.051, 0.05), False),
    ("calibration", gate_calibration(NAN, 0.05), False),
    ("latency", gate_latency(0.01, 1.0), True),
    ("latency", gate_latency(1.0, 1.0), True),
    ("latency", gate_latency(1.01, 1.0), False),
    ("latency", gate_latency(NAN, 1.0), False),
    ("latency", gate_latency(math.inf, 1.0), False),
    ("onnx_parity_train", gate_onnx_parity(3e-7, 1e-4, rows_name="train"), True),
    ("onnx_parity_train", gate_onnx_parity(1e-4, 1e-4, rows_name="train"), True),
    ("onnx_parity_train", gate_onnx_parity(1.1e-4, 1e-4, rows_name="train", rows_over=3), False),
    ("onnx_parity_test", gate_onnx_parity(1.1e-4, 1e-4, rows_name="test", rows_over=3), False),
    ("onnx_parity_test", gate_onnx_parity(NAN, 1e-4, rows_name="test"), False),
    ("feature_cutoff", gate_feature_cutoff(0, "", 0, rows_checked=500), True),
    ("feature_cutoff", gate_feature_cutoff(1, "customer C17", 0, rows_checked=500), False),
    ("feature_cutoff", gate_feature_cutoff(2, "customer C17", 2, rows_checked=500), True),
    ("feature_cutoff", gate_feature_cutoff(0, "", 0, rows_checked=0), False),
    ("better_than_trivial", gate_better_than_trivial(gains(a=(0.2, 0.0), b=(0.1, 0.0)), 0.05), True),
    ("better_than_trivial", gate_better_than_trivial(gains(a=(0.2, 0.0), b=(0.05, 0.0)), 0.05), False),
    ("better_than_trivial", gate_better_than_trivial(gains(a=(0.051, 0.0)), 0.05), True),
    ("better_than_trivial", gate_better_than_trivial(gains(a=(0.2, 0.0), b=(NAN, 0.0)), 0.05), False),
    ("trivial_accuracy", gate_trivial_accuracy(gains(a=(0.2, 0.1), b=(0.2, 0.0))), True),
    ("trivial_accuracy", gate_trivial_accuracy(gains(a=(0.2, 0.1), b=(0.2, -0.001))), False),
    ("trivial_accuracy", gate_trivial_accuracy(gains(a=(0.2, NAN))), False),
    ("average_precision", gate_average_precision(0.001, 0.0), True),
    ("average_precision", gate_average_precision(0.0, 0.0), False),
    ("average_precision", gate_average_precision(NAN, 0.0), False),
    ("lift", gate_lift(1.01, 1.0), True),
    ("lift", gate_lift(1.0, 1.0), False),
    ("lift", gate_lift(NAN, 1.0), False),
    ("class_rows", gate_class_rows(10, 500, 10), True),
    ("class_rows", gate_class_rows(500, 9, 10), False),
    ("single_column", gate_single_column({"plan": 0.94}, {}, 0.95, 0.99), True),
    ("single_column", gate_single_column({"plan": 0.95}, {}, 0.95, 0.99), False),
    ("single_column", gate_single_column({"plan": 0.8}, {("a", "b"): 0.98}, 0.95, 0.99), True),
    ("single_column", gate_single_column({"plan": 0.8}, {("a", "b"): 0.99}, 0.95, 0.99), False),
    ("single_column", gate_single_column({}, {}, 0.95, 0.99), True),
]


@pytest.mark.parametrize(("name", "result", "passed"), CASES)
def test_gate(name: str, result: GateResult, passed: bool) -> None:
    assert (result.name, result.passed) == (name, passed)
    assert result.blocking
    assert failed_gates([result]) == ([] if passed else [result])


@given(st.sampled_from([gate_accuracy, gate_calibration, gate_latency]), st.floats(), st.floats())
def test_a_result_passes_exactly_if_its_figure_keeps_its_rule(gate: Any, figure: float, limit: float) -> None:
    result = gate(figure, limit)
    kept = result.figure >= result.limit if result.rule == ">=" else result.figure <= result.limit
    assert result.passed == kept
    assert math.isnan(figure) <= (not result.passed)
    assert math.isnan(limit) <= (not result.passed)


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (gate_accuracy(0.812, 0.85), "accuracy .812 must be >= .850 (test rows)"),
        (gate_accuracy(0.84996, 0.85), "accuracy .84996 must be >= .85000 (test rows)"),
        (gate_accuracy(NAN, 0.85), "accuracy nan must be >= .850 (test rows)"),
        (
            gate_onnx_parity(0.0004, 0.0001, rows_name="test", rows_over=7),
            "onnx_parity_test .0004 must be <= .0001 (largest score difference, test rows, 7 far off)",
        ),
        (gate_latency(1.25, 1.0), "latency 1.250 must be <= 1 (one row, ONNX over scikit-learn)"),
        (
            gate_feature_cutoff(3, "customer C17, snapshot 2024-03-01", 0, rows_checked=500),
            "feature_cutoff 3 must be <= 0 (rows that differ, 500 checked; first: customer C17, snapshot 2024-03-01)",
        ),
        (
            gate_too_good("accuracy", 1.0, 0.99),
            "too_good_accuracy 1 must be < .990 (too good to be true: look for a leak, test rows)",
        ),
        (
            gate_better_than_trivial(gains(**{"one score for all": (-0.02, 0.0), "a recency rule": (0.3, 0.0)}), 0.01),
            "better_than_trivial -.020 must be > .010 (share of the log loss saved, lower end of the interval; "
            "0.080 of that of one score for all, 0.400 of that of a recency rule)",
        ),
        (
            gate_class_balance(0.05, 0.3, 0.2),
            "class_balance .250 must be <= .200 (predicted rate 0.050, actual rate 0.300)",
        ),
        (
            gate_single_column({"end_date": 1.0, "reason": 0.97, "plan": 0.7}, {}, 0.95, 0.99),
            "single_column 1 must be < .950 (cross-fitted AUC of a column alone, the label can be read from them: "
            "look for a leak: end_date 1.000, reason 0.970)",
        ),
        (
            gate_single_column({"plan": 0.7}, {("opened", "closed"): 0.999, ("plan", "opened"): 0.8}, 0.95, 0.99),
            "single_column .999 must be < .990 "
            "(cross-fitted AUC of the columns opened and closed together: look for a leak)",
        ),
    ],
)
def test_sentence(result: GateResult, sentence: str) -> None:
    assert result.sentence() == sentence


def test_a_refusal_says_which_settings_are_the_remedy() -> None:
    refused = {result.name: result for name, result, passed in CASES if not passed}
    assert set(refused) == set(REMEDIES)
    for name, result in refused.items():
        with pytest.raises(GateFailed) as caught:
            require_gates([result])
        assert f"{result.sentence()}; {REMEDIES[name]}" in str(caught.value)
        settings = re.findall(r"gates\.(\w+)", REMEDIES[name])
        assert set(settings) <= set(GateLimits.model_fields)
    with pytest.raises(GateFailed, match="threshold to f1, accuracy or another number"):
        require_gates([gate_class_balance(0.04, 0.29, 0.2)])


def test_what_is_reported_only_stops_nothing_and_says_why() -> None:
    refused = gate_accuracy(0.5, 0.85)
    reported = refused.report_only("at a churn rate of .02 it says little")
    assert (reported.passed, reported.blocking, reported.remedy) == (False, False, "")
    assert reported.sentence().endswith("(test rows; reported only: at a churn rate of .02 it says little)")
    assert refused.report_only("") == refused
    require_gates([reported, gate_latency(0.1, 1.0)])


def test_fairness_names_the_worst_group_that_has_enough_rows() -> None:
    labels = [0] * 10 + [0] * 10 + [1] * 2
    scores = [0.1] * 10 + [0.1] * 7 + [0.9] * 3 + [0.1] * 2
    table = measure_groups(labels, scores, 0.5, ["f"] * 10 + ["m"] * 10 + ["x"] * 2, minimum_rows=10)
    result = gate_group_fairness(table, 0.75, where="gender")
    assert not result.passed
    assert result.figure == 0.7
    assert result.detail == "accuracy of the worst group, gender = m, 10 rows"


@pytest.mark.parametrize("table", [groups_table(a=(0.1, 50, False)), groups_table()])
def test_fairness_says_that_it_did_not_judge(table: pd.DataFrame) -> None:
    result = gate_group_fairness(table, 0.75, where="segment")
    assert result.passed
    assert "segment: not judged, no group has enough rows" in result.detail


def test_require_gates_names_every_failure_and_no_success() -> None:
    results = [gate_accuracy(0.8, 0.85), gate_latency(0.1, 1.0), gate_calibration(0.1, 0.05)]
    with pytest.raises(GateFailed) as caught:
        require_gates(results)
    assert str(caught.value).splitlines() == [
        "2 of 3 gates failed:",
        f"- accuracy .800 must be >= .850 (test rows); {REMEDIES['accuracy']}",
        f"- calibration .100 must be <= .050 (expected calibration error, test rows); {REMEDIES['calibration']}",
    ]
    assert caught.value.exit_status == 2
    require_gates(results[1:2])


def test_require_gates_wants_something_measured() -> None:
    with pytest.raises(GateFailed, match="at least one must be measured"):
        require_gates([])
    with pytest.raises(GateFailed, match="at least one must be measured"):
        require_gates([gate_champion_challenger(None, "there is no champion yet")])


def test_champion_challenger_is_reported_and_blocks_nothing() -> None:
    labels = np.tile([0, 0, 1], 100)
    blind, sharp = np.full(300, 0.3), np.where(labels == 1, 0.8, 0.1)
    figures = {}
    for name, champion, challenger in (("win", blind, sharp), ("lose", sharp, blind), ("same", sharp, sharp)):
        at = {"champion_threshold": 0.5, "challenger_threshold": 0.5}
        comparison = compare_models(labels, champion, challenger, **at, bootstrap=Bootstrap(seed=1, samples=50))
        result = gate_champion_challenger(comparison, "")
        figures[name] = (result.figure, result.passed)
        assert result.detail.startswith(comparison.verdict)
        require_gates([gate_accuracy(0.9, 0.85), result])
    assert figures == {"win": (1, True), "lose": (-1, False), "same": (0, False)}
    found = gate_champion_challenger(None, "it is the champion")
    assert (found.passed, found.sentence()) == (True, "champion_challenger nothing was compared (it is the champion)")
    alone = gate_profit(None, "there is no champion yet")
    assert (alone.passed, alone.blocking) == (True, False)
    assert alone.sentence() == "profit nothing was compared (there is no champion yet)"


def test_limits_forbid_unknown_keys_and_document_every_field() -> None:
    with pytest.raises(ValidationError, match="accuracy_minimum"):
        GateLimits.model_validate({"accuracy_minimum": 0.8})
    with pytest.raises(ValidationError, match="accuracy_min"):
        GateLimits.model_validate({"accuracy_min": NAN})
    assert all(field.description for field in GateLimits.model_fields.values())


def test_default_limits_are_the_shops() -> None:
    assert GateLimits().model_dump() == {
        "accuracy_min": 0.85,
        "f1_weighted_min": 0.8,
        "accuracy_max": 0.99,
        "roc_auc_min": 0.75,
        "roc_auc_max": None,
        "group_accuracy_min": 0.75,
        "group_rows_min": 200,
        "noise_scale": 0.01,
        "noise_agreement_min": 0.95,
        "rate_difference_max": 0.2,
        "calibration_error_max": 0.05,
        "latency_ratio_max": 1.0,
        "parity_max": 1e-4,
        "cutoff_mismatches_max": 0,
        "trivial_margin_min": 0.01,
        "average_precision_gain_min": 0.0,
        "lift_min": 1.0,
        "single_column_auc_max": 0.95,
        "column_pair_auc_max": 0.99,
        "single_column_allowed": (),
        "class_rows_min": 10,
        "rare_class_rate_max": 0.1,
    }
