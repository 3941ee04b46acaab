from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.tree import DecisionTreeClassifier

from closedloop.core.comparison import compare_models
from closedloop.core.gates import (
    GateResult,
    RecencyRule,
    failed_gates,
    fit_recency_rule,
    gate_accuracy,
    gate_better_than_trivial,
    gate_calibration,
    gate_champion_challenger,
    gate_class_balance,
    gate_f1_weighted,
    gate_feature_cutoff,
    gate_group_fairness,
    gate_latency,
    gate_noise_robustness,
    gate_onnx_parity,
    gate_roc_auc,
    gate_too_good,
    measure_noise_agreement,
    require_gates,
)
from closedloop.core.limits import GateLimits
from closedloop.core.metrics import measure_groups
from closedloop.errors import GateFailed

NAN = float("nan")


def groups_table(**accuracies: tuple[float, int, bool]) -> pd.DataFrame:
    rows = [(name, *values) for name, values in accuracies.items()]
    return pd.DataFrame(rows, columns=["group", "accuracy", "rows", "enough_rows"])


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
    ("onnx_parity_test", gate_onnx_parity(1.1e-4, 1e-4, rows_name="test", rows_over=3), False),
    ("onnx_parity_test", gate_onnx_parity(NAN, 1e-4, rows_name="test"), False),
    ("feature_cutoff", gate_feature_cutoff(0, "", 0, rows_checked=500), True),
    ("feature_cutoff", gate_feature_cutoff(1, "customer C17", 0, rows_checked=500), False),
    ("feature_cutoff", gate_feature_cutoff(2, "customer C17", 2, rows_checked=500), True),
    ("feature_cutoff", gate_feature_cutoff(0, "", 0, rows_checked=0), False),
    ("better_than_trivial", gate_better_than_trivial(0.9, 0.7, 0.85, 0.0), True),
    ("better_than_trivial", gate_better_than_trivial(0.9, 0.9, 0.85, 0.0), False),
    ("better_than_trivial", gate_better_than_trivial(0.9, 0.7, 0.9, 0.0), False),
    ("better_than_trivial", gate_better_than_trivial(0.9, 0.7, 0.8, 0.1), False),
    ("better_than_trivial", gate_better_than_trivial(0.9, 0.7, None, 0.1), True),
    ("better_than_trivial", gate_better_than_trivial(0.9, 0.7, NAN, 0.0), False),
    ("better_than_trivial", gate_better_than_trivial(0.9, NAN, 0.8, 0.0), False),
    ("better_than_trivial", gate_better_than_trivial(NAN, 0.7, 0.8, 0.0), False),
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
        (
            gate_accuracy(0.812, 0.85, where="column churned, test rows"),
            "accuracy .812 must be >= .850 (column churned, test rows)",
        ),
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
            gate_better_than_trivial(0.8, 0.82, 0.7, 0.0),
            "better_than_trivial -.020 must be > 0 "
            "(accuracy 0.800 over the majority class 0.820, the recency rule 0.700)",
        ),
        (
            gate_class_balance(0.05, 0.3, 0.2),
            "class_balance .250 must be <= .200 (predicted rate 0.050, actual rate 0.300)",
        ),
    ],
)
def test_sentence(result: GateResult, sentence: str) -> None:
    assert result.sentence() == sentence


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
        "- accuracy .800 must be >= .850 (test rows)",
        "- calibration .100 must be <= .050 (expected calibration error, test rows)",
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
        comparison = compare_models(
            labels, champion, challenger, champion_threshold=0.5, challenger_threshold=0.5, seed=1, samples=50
        )
        result = gate_champion_challenger(comparison, "")
        figures[name] = (result.figure, result.passed)
        assert result.detail.startswith(comparison.verdict)
        require_gates([gate_accuracy(0.9, 0.85), result])
    assert figures == {"win": (1, True), "lose": (-1, False), "same": (0, False)}
    found = gate_champion_challenger(None, "it is the champion")
    assert (found.passed, found.detail) == (True, "it is the champion")


def test_noise_agreement_of_a_step_by_hand() -> None:
    # Rows sit one noise deviation below the step, so a share Phi(1) = .841 of them stays below it.
    matrix = np.full((20_000, 2), -0.01, dtype=np.float32)
    found = measure_noise_agreement(
        lambda rows: (rows[:, 0] >= 0).astype(float),
        matrix,
        scale=0.01,
        standard_deviations=[1.0, 0.0],
        threshold=0.5,
        seed=1,
    )
    assert found == pytest.approx(0.8413, abs=0.01)
    assert (matrix == np.float32(-0.01)).all()


def test_noise_leaves_codes_and_missing_values_alone() -> None:
    seen: list[np.ndarray] = []

    def record(rows: np.ndarray) -> np.ndarray:
        seen.append(rows)
        return np.zeros(len(rows))

    matrix = np.array([[1.0, 3.0, 5.0], [np.nan, 4.0, 6.0]], dtype=np.float32)
    agreement = measure_noise_agreement(
        record, matrix, scale=0.5, standard_deviations=[2.0, 0.0, NAN], threshold=0.5, seed=1
    )
    before, after = seen
    assert agreement == 1
    assert after.dtype == np.float32
    np.testing.assert_array_equal(before, matrix)
    np.testing.assert_array_equal(after[:, 1:], matrix[:, 1:])
    assert after[0, 0] != matrix[0, 0]
    assert np.isnan(after[1, 0])


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=30))
def test_recency_rule_is_the_best_stump(rows: list[tuple[int, bool]]) -> None:
    days, labels = (np.array(column) for column in zip(*rows, strict=True))
    rule = fit_recency_rule(days, labels)
    accuracy = np.mean(rule.predict(days) == labels)
    # Independent: scikit-learn's stump is as good or, as it optimises impurity, worse; every rule is tried by hand.
    stump = DecisionTreeClassifier(max_depth=1, random_state=0).fit(days.reshape(-1, 1), labels)
    assert accuracy >= stump.score(days.reshape(-1, 1), labels) - 1e-12
    assert accuracy >= max(labels.mean(), 1 - labels.mean()) - 1e-12
    tried = [np.mean(RecencyRule(t, up).predict(days) == labels) for t in range(-1, 9) for up in (True, False)]
    assert accuracy == max(tried)


def test_recency_rule_finds_the_direction() -> None:
    assert fit_recency_rule([1, 2, 40, 50], [1, 1, 0, 0]) == RecencyRule(2.0, churns_above=False)
    assert fit_recency_rule([1, 2, 40, 50], [0, 0, 1, 1]).predict([2.0, 2.1]).tolist() == [False, True]


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
        "trivial_margin_min": 0.0,
    }
