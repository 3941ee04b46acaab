"""A gate that the champion misses too stops no challenger that wins; every other miss stops as before."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from closedloop.core.evaluation.bootstrap import Bootstrap
from closedloop.core.evaluation.comparison import Comparison, compare_models
from closedloop.core.evaluation.excuses import EXCUSABLE, describe_excused, excuse_beside_champion
from closedloop.core.evaluation.gates import REMEDIES, GateResult, failed_gates, gate_calibration, gate_roc_auc

NEVER_EXCUSED = {
    "class_rows",
    "too_good_accuracy",
    "too_good_roc_auc",
    "single_column",
    "group_fairness",
    "noise_robustness",
    "latency",
    "onnx_parity_train",
    "onnx_parity_test",
    "feature_cutoff",
    "profit",
}


def compare(verdict: str) -> Comparison:
    labels = np.tile([0, 0, 0, 1], 50)
    blind, sharp = np.full(200, 0.25), np.where(labels == 1, 0.7, 0.1)
    at = {"champion_threshold": 0.5, "challenger_threshold": 0.5}
    won = compare_models(labels, blind, sharp, **at, bootstrap=Bootstrap(seed=1, samples=100))
    assert won.verdict == "win"
    return dataclasses.replace(won, verdict=verdict)  # type: ignore[arg-type]


def miss(name: str, figure: float) -> GateResult:
    return GateResult(name, False, figure, 0.75, ">=", "test rows")


def test_what_the_champion_misses_too_stops_no_challenger_that_wins() -> None:
    missed = gate_roc_auc(0.74, 0.75)
    [found] = excuse_beside_champion([missed], [gate_roc_auc(0.6912, 0.75)], compare("win"))
    assert failed_gates([missed]) == [missed]
    assert failed_gates([found]) == []
    assert (found.passed, found.excused, found.remedy) == (False, True, "")
    assert found.sentence() == (
        "roc_auc .740 must be >= .750 (lower end of the 95% interval, test rows; excused: the champion misses it too "
        "(.691), and loses to this version)"
    )


@pytest.mark.parametrize(
    ("figure", "champion", "verdict"),
    [
        (0.74, 0.69, "inconclusive"),
        (0.74, 0.69, "lose"),
        (0.74, 0.69, None),  # the first model
        (0.74, 0.75, "win"),  # the champion keeps the limit
        (0.68, 0.69, "win"),  # the challenger is worse by this figure, whatever its log loss
        (math.nan, 0.69, "win"),
        (0.74, math.nan, "win"),
    ],
)
def test_every_other_miss_stops(figure: float, champion: float, verdict: str | None) -> None:
    missed = [gate_roc_auc(figure, 0.75)]
    comparison = None if verdict is None else compare(verdict)
    assert excuse_beside_champion(missed, [gate_roc_auc(champion, 0.75)], comparison) == missed
    assert failed_gates(missed) == missed


def test_a_gate_that_was_not_measured_of_the_champion_is_not_excused() -> None:
    missed = [gate_roc_auc(0.74, 0.75)]
    assert excuse_beside_champion(missed, [], compare("win")) == missed


@pytest.mark.parametrize(("own", "champion", "excused"), [(0.06, 0.09, True), (0.09, 0.06, False)])
def test_where_less_is_better_the_smaller_figure_is_no_worse(own: float, champion: float, excused: bool) -> None:
    [found] = excuse_beside_champion([gate_calibration(own, 0.05)], [gate_calibration(champion, 0.05)], compare("win"))
    assert found.excused == excused


@pytest.mark.parametrize("name", sorted(REMEDIES))
def test_leaks_few_rows_groups_noise_and_the_export_have_no_excuse(name: str) -> None:
    [found] = excuse_beside_champion([miss(name, 0.7)], [miss(name, 0.6)], compare("win"))
    assert found.excused == (name not in NEVER_EXCUSED)
    assert set(REMEDIES) == NEVER_EXCUSED | EXCUSABLE


def test_the_journal_names_the_gates() -> None:
    assert describe_excused([]) == ""
    assert describe_excused(["roc_auc", "lift"]) == (
        "roc_auc, lift are missed and stop nothing: the champion misses them too, and loses to this version"
    )
