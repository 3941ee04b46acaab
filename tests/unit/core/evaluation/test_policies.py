"""What policies are worth, against figures computed by hand, and how often one seems better that is not."""

from __future__ import annotations

import numpy as np
import pytest

from closedloop.core.evaluation.bootstrap import Bootstrap, Interval
from closedloop.core.evaluation.policies import Worth, find_listed, pick_policy, weigh_policies

FEW = Bootstrap(seed=3, samples=200)


def test_ties_at_the_end_of_a_list_share_its_last_place() -> None:
    # ten rows, two places: one row is above, four tie for the other
    scores = [0.9, 0.5, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert find_listed([1, 1, 0, 1, 1, 1, 0, 0, 0, 0], scores).tolist() == [1, 0.25, 0, 0.25, 0.25, 0, 0, 0, 0, 0]
    assert find_listed(np.ones(10), np.full(10, 0.3)).sum() == pytest.approx(2)


def test_gains_are_paired_and_customers_are_drawn_whole() -> None:
    rng = np.random.default_rng(1)
    base = rng.exponential(0.5, 400)
    listed = {"never": np.zeros(400), "own": np.ones(400)}
    found = weigh_policies(np.arange(400), {"never": base, "own": base - 0.01}, listed, FEW)["own"]
    # the difference is the same in each row: pairing leaves no uncertainty, however large the losses differ
    assert found.gain == pytest.approx(0.01)
    assert found.gain_interval == pytest.approx((0.01, 0.01))
    assert (found.found, found.found_interval) == (400, (400, 400))
    # two customers of 200 rows each are two observations, not 400
    owners = np.repeat(["a", "b"], 200)
    gaps = np.where(owners == "a", 0.03, -0.01)
    two = weigh_policies(owners, {"never": base, "own": base - gaps}, listed, FEW)["own"]
    assert two.gain_interval == pytest.approx((-0.01, 0.03))


def test_with_more_policies_each_interval_is_wider() -> None:
    rng = np.random.default_rng(2)
    base, better = rng.exponential(0.5, 2_000), rng.exponential(0.5, 2_000)
    nothing = np.zeros(2_000)
    one = weigh_policies(np.arange(2_000), {"never": base, "a": better}, {"never": nothing, "a": nothing}, FEW)["a"]
    names = ["never", *"abcde"]
    losses, listed = dict.fromkeys(names, better) | {"never": base}, dict.fromkeys(names, nothing)
    five = weigh_policies(np.arange(2_000), losses, listed, FEW)["a"]
    width = [each.gain_interval.high - each.gain_interval.low for each in (one, five)]
    assert width[1] / width[0] == pytest.approx(
        2.576 / 1.960, abs=0.1
    )  # normal quantiles of 1 - .01 / 2 and 1 - .05 / 2


def test_the_largest_certain_gain_is_picked_and_fewer_retrainings_decide_a_tie() -> None:
    def worth(gain: float, low: float) -> Worth:
        return Worth(gain, Interval(low, gain + 0.01), 0, Interval(0, 0))

    found = {"drift": worth(0.02, 0.001), "own": worth(0.03, 0.002), "outcomes": worth(0.05, -0.001)}
    assert pick_policy(found, {"drift": 1, "own": 9, "outcomes": 1}) == "own"
    assert pick_policy(found, {"drift": 1, "own": 9, "outcomes": 1}, gain_min=0.002) == "never"
    assert pick_policy({"a": worth(0.03, 0.01), "b": worth(0.03, 0.01)}, {"a": 3, "b": 2}) == "b"
    assert pick_policy({}, {}) == "never"
