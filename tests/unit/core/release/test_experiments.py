from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from closedloop.core.release.experiments import (
    Counts,
    ProportionTest,
    analyze_proportions,
    plan_samples,
    size_guard,
    size_proportions,
)
from closedloop.core.release.policy import SAMPLES, ReleasePolicy
from closedloop.core.release.sequential import weigh_share
from closedloop.errors import DataError


def analyze(control: tuple[int, int], treatment: tuple[int, int], **settings: Any) -> ProportionTest:
    return analyze_proportions(Counts(*control), Counts(*treatment), **settings)


def newcombe(first: Counts, second: Counts, level: float) -> tuple[float, float]:
    """Method 10 of Newcombe (1998), written down here again: Wilson's limits of each rate, combined."""
    z = norm.ppf((1 + level) / 2)

    def wilson(arm: Counts) -> tuple[float, float, float]:
        p, n = arm.events / arm.total, arm.total
        middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return p, (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)

    p1, low1, high1 = wilson(first)
    p2, low2, high2 = wilson(second)
    return p2 - p1 - math.hypot(p2 - low2, high1 - p1), p2 - p1 + math.hypot(high2 - p2, p1 - low1)


def test_sample_size_by_the_unpooled_formula() -> None:
    z = norm.ppf(0.975) + norm.ppf(0.8)
    by_hand = z**2 * (0.05 * 0.95 + 0.055 * 0.945) / 0.005**2
    assert size_proportions(0.05, 0.005) == (math.ceil(by_hand),) * 2 == (31_231, 31_231)


def test_sample_size_with_other_settings() -> None:
    z = norm.ppf(0.995) + norm.ppf(0.9)
    by_hand = math.ceil(z**2 * (0.2 * 0.8 + 0.15 * 0.85 / 0.25) / 0.05**2)
    found = size_proportions(0.2, -0.05, alpha=0.01, power=0.9, ratio=0.25)
    assert found == (by_hand, math.ceil(by_hand / 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": 1.2}, "baseline: found 1.2, allowed is between 0 and 1"),
        ({"effect": 0.0}, "mde: found 0.0"),
        ({"effect": 0.96}, "mde: found 0.96"),
        ({"alpha": 0.0}, "alpha: found 0.0"),
        ({"power": 0.01}, "power: found 0.01"),
        ({"ratio": math.inf}, "ratio: found inf"),
        ({"baseline": math.nan}, "baseline: found nan"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        size_proportions(**{"baseline": 0.05, "effect": 0.005, **changes})


def test_the_reference_experiment_is_undecided() -> None:
    found = analyze((520, 10_000), (580, 10_000), min_sample=1_000)
    pooled = 0.055
    z = 0.006 / math.sqrt(pooled * (1 - pooled) * 2 / 10_000)
    assert (found.z, found.p_value) == pytest.approx((z, 2 * norm.sf(z)))
    assert round(found.p_value, 3) == 0.063
    assert found.interval == pytest.approx(newcombe(Counts(520, 10_000), Counts(580, 10_000), 0.95))
    assert (found.difference, found.lift) == pytest.approx((0.006, 0.058 / 0.052 - 1))
    assert found.verdict == "undecided"


def test_the_interval_is_not_the_pooled_one_where_rates_are_small() -> None:
    found = analyze((0, 60), (3, 60))
    assert found.interval == pytest.approx(newcombe(Counts(0, 60), Counts(3, 60), 0.95))
    assert math.isnan(found.lift)


def test_adopt_keep_and_the_side_that_is_better() -> None:
    worse, better = (500, 10_000), (620, 10_000)
    assert analyze(worse, better).verdict == "adopt"
    assert analyze(better, worse).verdict == "keep"
    assert analyze(worse, better, lower_is_better=True).verdict == "keep"
    assert analyze(better, worse, lower_is_better=True).verdict == "adopt"


def test_too_few_units_decide_nothing() -> None:
    found = analyze((5, 100), (30, 100), min_sample=101)
    assert found.verdict == "undecided"
    assert "an arm has 100 units, at least 101 are needed" in found.reason
    assert analyze((5, 100), (30, 100), min_sample=100).verdict == "adopt"


def test_a_broken_split_is_reported_as_broken_before_any_verdict() -> None:
    found = analyze((500, 10_000), (680, 10_500))
    assert found.verdict == "broken"
    assert found.p_value < 0.001
    assert found.split_p < 0.001
    assert analyze((500, 10_000), (680, 10_300)).verdict == "adopt"
    assert analyze((500, 10_000), (65, 1_000), ratio=0.1).verdict == "adopt"
    assert analyze((500, 10_000), (65, 1_000)).verdict == "broken"


@pytest.mark.parametrize("events", [0, 500])
@pytest.mark.parametrize("margin", [None, 0.1])
def test_without_events_in_both_arms_there_is_no_decision(events: int, margin: float | None) -> None:
    found = analyze((events, 500), (events, 500), margin=margin)
    assert found.verdict == "undecided"
    assert math.isnan(found.z)
    assert "nothing to compare" in found.reason


def test_not_inferior_within_the_margin() -> None:
    found = analyze((520, 10_000), (510, 10_000), margin=0.01)
    assert found.verdict == "adopt"
    assert found.margin_p is not None
    assert found.equivalence_p is not None
    # Unrestricted variances, close to the score test's at this size.
    spread = math.sqrt((0.052 * 0.948 + 0.051 * 0.949) / 10_000)
    assert found.margin_p == pytest.approx(norm.sf((0.01 - 0.001) / spread), rel=0.1)
    assert found.equivalence_p == pytest.approx(max(found.margin_p, norm.sf((0.01 + 0.001) / spread)), rel=0.1)
    assert analyze((520, 10_000), (480, 10_000), margin=0.01).verdict == "undecided"
    assert analyze((520, 10_000), (350, 10_000), margin=0.01).verdict == "keep"
    assert analyze((510, 10_000), (520, 10_000), margin=0.01, lower_is_better=True).verdict == "adopt"
    assert analyze((350, 10_000), (520, 10_000), margin=0.01, lower_is_better=True).verdict == "keep"


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(DataError, match="control: found 12/10"):
        analyze((12, 10), (1, 10))
    with pytest.raises(DataError, match="treatment: found 0/0"):
        analyze((1, 10), (0, 0))
    with pytest.raises(DataError, match=r"margin: found -0\.1"):
        analyze((1, 10), (1, 10), margin=-0.1)


@pytest.mark.parametrize(("share", "error_ratio"), [(0.05, 2.0), (0.5, 2.0), (0.05, 3.0)])
def test_a_guards_sample_has_its_power(share: float, error_ratio: float) -> None:
    requests = size_guard(0.01, error_ratio, share)
    others = round(requests * (1 - share) / share)
    generator, runs = np.random.default_rng(1), 400
    ours, theirs = generator.binomial(requests, 0.01 * error_ratio, runs), generator.binomial(others, 0.01, runs)
    found = [
        weigh_share(x, x + y, share, planned=200, alpha=0.01, greater=True) >= math.log(100)
        for x, y in zip(ours.tolist(), theirs.tolist(), strict=True)
    ]
    # .8, less three standard errors of 400 runs
    assert np.mean(found) >= 0.74


def test_a_policy_is_planned_for_its_power() -> None:
    policy = ReleasePolicy(steps=("canary_5", "canary_25"))
    assert plan_samples(policy, base_error_rate=0.02, error_ratio=3.0, power=0.9) == {
        "shadow": size_guard(0.02, 3.0, 0.5, power=0.9),
        "canary_5": size_guard(0.02, 3.0, 0.05, power=0.9),
        "canary_25": size_guard(0.02, 3.0, 0.25, power=0.9),
    }


def test_the_shipped_samples_find_twice_a_base_rate_of_one_percent() -> None:
    assert plan_samples(ReleasePolicy(), base_error_rate=0.01) == SAMPLES
