"""The simulation of benchmarks/release.py with few runs: limits lie about three standard errors beyond its targets."""

from __future__ import annotations

import pytest

from benchmarks import release
from closedloop.core.release.policy import ReleasePolicy


@pytest.mark.thorough
def test_equal_models_are_seldom_promoted_and_a_better_one_mostly() -> None:
    policy, figures = release.design()
    assert 3_000 < figures["customers"] < 7_000
    equal = release.simulate_promotion(policy, release.STABLE_NOISE, 50, 12)
    better = release.simulate_promotion(policy, release.BETTER_NOISE, 50, 13)
    assert equal["promoted"] <= 0.14
    assert equal["naive"] >= 0.08
    assert better["promoted"] >= 0.64
    assert better["rolled_back"] == 0


def test_a_broken_split_and_errors_are_found_and_right_ones_are_not() -> None:
    assert release.simulate_split(release.BROKEN_WEIGHT, 25, 14, every=500) >= 0.92
    assert release.simulate_split(release.CANARY_WEIGHT, 25, 15, every=1000) == 0
    assert release.simulate_errors(release.WORSE_RATE, 2_000, 50, 16)["rolled_back"] >= 0.9
    assert release.simulate_errors(release.BASE_RATE, 2_000, 50, 17)["rolled_back"] <= 0.08


def test_equal_models_are_seldom_called_other_in_profit_and_a_poorer_one_is_found() -> None:
    policy = ReleasePolicy(evidence="outcomes", outcomes_planned=4_600)
    equal = release.simulate_profit(policy, 60, 31, noise=release.STABLE_NOISE)
    poorer = release.simulate_profit(policy, 30, 32, noise=release.POORER_NOISE, wrong=release.POORER_ODDS)
    assert max(equal["promoted"], equal["more"]) <= 0.14
    assert equal["less"] <= 0.05
    assert (poorer["by_profit"] >= 0.2, poorer["promoted"] <= 0.1) == (True, True)
