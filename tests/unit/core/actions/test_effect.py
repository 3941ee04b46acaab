"""The effect of a campaign, its interval and what it was worth."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from closedloop.core.actions.effect import describe_effect, measure_effect, measure_groups


def make_results(treated: tuple[int, int], held_out: tuple[int, int], kept_value: float = np.nan) -> pd.DataFrame:
    """Arms of (churned, customers)."""
    parts = [
        pd.DataFrame({"arm": arm, "outcome": [1.0] * churned + [0.0] * (count - churned)})
        for arm, (churned, count) in {"treated": treated, "held_out": held_out}.items()
    ]
    return pd.concat(parts, ignore_index=True).assign(kept_value=kept_value)


def test_the_interval_is_newcombes():
    """His example (1998, table II, row a): 56/70 and 48/80 give 0.0524 to 0.3339."""
    effect = measure_effect(make_results((48, 80), (56, 70))).effect
    assert effect == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(
    ("treated", "held_out", "verdict"),
    [((40, 400), (40, 200), "kept"), ((40, 400), (22, 200), "undecided"), ((80, 400), (10, 200), "harmed")],
)
def test_a_campaign_is_judged_by_whether_its_interval_spans_zero(treated, held_out, verdict):
    found = measure_effect(make_results(treated, held_out))
    assert found.verdict == verdict
    assert describe_effect(found)[0].startswith(f"{verdict}: ")


def test_without_a_hold_out_nothing_is_said_of_an_effect():
    found = measure_effect(make_results((40, 400), (0, 0)), offer_cost=1)
    assert (found.verdict, found.effect, found.profit) == ("cannot tell", None, None)
    assert "nothing tells the campaign" in describe_effect(found)[0]


def test_profit_is_the_value_kept_less_the_cost_of_all_offers():
    found = measure_effect(make_results((40, 400), (40, 200), kept_value=50), offer_cost=1)
    assert found.profit is not None
    assert found.profit.value == pytest.approx(400 * (50 * 0.2 - 50 * 0.1) - 400)
    # Welch by hand: variances 50^2 p (1 - p) n / (n - 1), divided by n
    error = (2500 * 0.2 * 0.8 / 199 + 2500 * 0.1 * 0.9 / 399) ** 0.5
    assert found.profit.high - found.profit.value == pytest.approx(400 * 1.967 * error, rel=2e-3)
    assert measure_effect(make_results((40, 400), (40, 200)), offer_cost=1).profit is None


@pytest.mark.parametrize(("treated", "held_out"), [((0, 5), (1, 1)), ((1, 1), (2, 5)), ((0, 210), (0, 90))])
def test_profit_is_not_said_where_nothing_tells_how_far_it_may_be_off(treated, held_out):
    """One customer alone, or arms of which nobody left: an interval of no width would be sure of it."""
    found = measure_effect(make_results(treated, held_out, kept_value=50), offer_cost=1)
    assert found.profit is None
    assert found.effect is not None
    assert "-0.0%" not in " ".join(describe_effect(found))


def test_customers_without_an_outcome_are_left_out():
    results = make_results((40, 400), (40, 200))
    results.loc[results.index[-50:], "outcome"] = np.nan
    assert measure_effect(results).held_out == 150


def test_groups_are_tenths_of_the_score_and_segments():
    results = make_results((40, 400), (40, 200)).sample(frac=1, random_state=1, ignore_index=True)
    results["probability"], results["segment"] = np.linspace(1, 0, 600), ["a", "b"] * 300
    groups = measure_groups(results)
    assert list(groups["tenth"]) == [str(number) for number in range(1, 11)]
    assert [one.treated + one.held_out for one in groups["tenth"].values()] == [60] * 10
    assert sum(one.treated for one in groups["segment"].values()) == 400
    assert groups["tenth"]["1"].treated == (results["arm"].head(60) == "treated").sum()
    assert "segment" not in measure_groups(results.assign(segment=None))


def test_the_interval_covers_the_true_effect():
    """1,000 treated and 111 held out, half of whom would leave, 30 % of those saved: 300 campaigns."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        arms = make_results((rng.binomial(1_000, 0.35), 1_000), (rng.binomial(111, 0.5), 111))
        low, high = measure_effect(arms).effect[1:]  # type: ignore[index]
        covered += low <= 0.15 <= high
    assert covered >= 0.92 * 300
