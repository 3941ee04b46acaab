"""Uplift: the transformed outcome, Qini by hand, and lists on campaigns with and without a planted effect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.core.actions.uplift import (
    describe_trial,
    find_shortage,
    learn_effect,
    measure_qini,
    predict_effect,
    transform_outcomes,
    try_uplift,
)
from closedloop.core.evaluation.bootstrap import Bootstrap
from closedloop.core.training.estimators import describe_features

SEGMENTS = ("family", "student", "single")


def make_campaign(seed: int, people: int = 4_000, *, holdout: float = 0.3, saved: tuple[float, ...] = (0, 0, 0)) -> Any:
    """A closed campaign: leavers of each segment are saved with its rate; a dozen columns say nothing of it."""
    rng = np.random.default_rng(seed)
    score = rng.beta(2, 3, people)
    segment = rng.integers(0, 3, people)
    noise = pd.DataFrame(rng.normal(size=(people, 12)) + score[:, None], columns=[f"x{i}" for i in range(12)])
    treated = np.ones(people, dtype=bool)
    treated[rng.permutation(people)[: round(holdout * people)]] = False
    leaves = rng.random(people) < score
    is_saved = treated & (rng.random(people) < np.array(saved)[segment])
    return noise.assign(
        segment=np.array(SEGMENTS)[segment],
        customer_id=[f"{seed} {number}" for number in range(people)],
        campaign="2024-01-01",
        score=score,
        before=score,
        worth=1.0,
        arm=np.where(treated, "treated", "held_out"),
        outcome=(leaves & ~is_saved).astype(float),
        treated_share=treated.mean(),
    )


def describe(rows: pd.DataFrame) -> Any:
    return describe_features(rows, [*(f"x{i}" for i in range(12)), "score"], ["segment"])


def run_trial(rows: pd.DataFrame, seed: int = 7) -> Any:
    bootstrap = Bootstrap(seed, samples=200, customers=rows["customer_id"])
    return try_uplift(rows, rows, describe(rows), seed=seed, bootstrap=bootstrap)


def test_qini_by_hand():
    """Half are treated: a treated customer with a score of .5 who stays says +1, one who leaves -1; held out reversed.

    The list: +1, -1, +1, +1, then 0s. Its curve over eighths is 1, 0, 1, 2, 2, 2, 2, 2 of 8; the area under it by
    trapezoids is (.5 + .5 + .5 + 1.5 + 2 + 2 + 2 + 2) / 64 = 11 / 64, that under the line to 2 / 8 is 8 / 64.
    """
    rows = pd.DataFrame(
        {
            "arm": ["treated", "treated", "held_out", "held_out", *["treated", "held_out"] * 2],
            "outcome": [0, 1, 1, 1, 0, 0, 1, 1],
            "score": [0.5] * 4 + [0, 0, 1, 1],
            "treated_share": 0.5,
        }
    )
    kept, weights = transform_outcomes(rows)
    assert kept.tolist() == [1, -1, 1, 1, 0, 0, 0, 0]
    assert measure_qini(kept, np.arange(8), weights) == pytest.approx(3 / 64)
    assert measure_qini(kept, np.arange(8), 2 * weights) == pytest.approx(3 / 64)
    assert measure_qini(kept, np.array([4, 5, 6, 7, 0, 1, 2, 3]), weights) < 0


@pytest.mark.parametrize("holdout", [0.1, 0.5])
@pytest.mark.parametrize("score", [0.0, 0.9])
def test_the_mean_of_the_transformed_outcome_is_the_effect_whatever_the_score_is_worth(holdout, score):
    rows = pd.concat([make_campaign(seed, holdout=holdout, saved=(0.5, 0.5, 0.5)) for seed in range(20)])
    kept, _ = transform_outcomes(rows.assign(score=score))
    assert kept.mean() == pytest.approx(0.5 * 0.4, abs=0.02)  # half of the leavers, who are 40 %


def test_a_campaign_with_the_smaller_hold_out_weighs_less():
    weights = [transform_outcomes(make_campaign(1, holdout=share))[1] for share in (0.1, 0.5)]
    assert weights[0] == pytest.approx(0.09)
    assert weights[1] == pytest.approx(0.25)


def test_what_is_learnt_weighs_campaigns_as_their_hold_outs_do():
    rows = pd.concat([make_campaign(1, holdout=0.05), make_campaign(2, 400, holdout=0.5)], ignore_index=True)
    kept, weights = transform_outcomes(rows)
    left_over = kept - predict_effect(learn_effect(rows, rows, describe(rows)), rows)
    assert np.average(left_over, weights=weights) == pytest.approx(0, abs=1e-5)
    assert abs(left_over.mean()) > 0.001


def test_parts_are_ranked_by_themselves():
    """A learner's level is low for a part whose customers say much: in one order for all, Qini comes out too low."""
    found = []
    for seed in range(40):
        rows = make_campaign(seed, 300, holdout=0.5)
        drawn = Bootstrap(7, samples=1, customers=rows["customer_id"])
        found.append(try_uplift(rows, rows, describe(rows), seed=7, bootstrap=drawn).qini.value)
    assert np.mean(found) > -0.012


def test_an_effect_that_differs_by_segment_is_found_and_ranks_those_who_can_be_kept_first():
    trials = [run_trial(make_campaign(seed, saved=(0.0, 0.7, 0.0))) for seed in range(10)]
    assert sum(trial.wins for trial in trials) >= 9
    rows, later = make_campaign(11, saved=(0.0, 0.7, 0.0)), make_campaign(12)
    effect = predict_effect(learn_effect(rows, rows, describe(rows)), later)
    called = later.iloc[np.argsort(-effect, kind="stable")[:500]]
    assert (called["segment"] == "student").mean() > 0.9
    assert (later.nlargest(500, "score")["segment"] == "student").mean() < 0.4


@pytest.mark.parametrize("saved", [0.0, 0.3])
def test_where_all_are_saved_alike_uplift_seldom_wins(saved):
    """The churn score is right then: who leaves most often is saved most often."""
    assert sum(run_trial(make_campaign(seed, saved=(saved,) * 3)).wins for seed in range(20)) <= 2


def test_a_trial_is_the_same_again_and_its_order_of_rows_decides_nothing():
    rows = make_campaign(3, saved=(0.0, 0.7, 0.0))
    assert run_trial(rows) == run_trial(rows)
    mixed = run_trial(rows.sample(frac=1, random_state=1))
    assert mixed.qini.value == pytest.approx(run_trial(rows).qini.value, abs=1e-4)


def test_a_learner_never_ranks_a_customer_whom_it_has_seen():
    """Each is there twice, and columns name them: a learner that knew one of the two rows would rank the other well."""
    once = make_campaign(5, people=600, holdout=0.5)
    names = pd.get_dummies(once["customer_id"]).astype(float).set_axis([f"id{i}" for i in range(600)], axis=1)
    rows = pd.concat([once.join(names)] * 2, ignore_index=True)
    bootstrap = Bootstrap(7, samples=20, customers=rows["customer_id"])
    features = describe_features(rows, list(names), [])
    assert abs(try_uplift(rows, rows, features, seed=7, bootstrap=bootstrap).qini.value) < 0.05
    apart = rows.assign(customer_id=[f"{number}" for number in range(1_200)])
    assert try_uplift(apart, apart, features, seed=7, bootstrap=bootstrap).qini.value > 0.1


def test_the_worth_of_customers_counts():
    """Saved alike, but some are worth twenty times as much: by money they come first, and a list by score is worse."""
    rows = make_campaign(6, saved=(0.5, 0.5, 0.5))
    rows = rows.assign(worth=np.where(rows["segment"] == "single", 20.0, 1.0))
    assert run_trial(rows).wins
    assert not run_trial(rows.assign(before=rows["score"] * rows["worth"])).wins


def test_a_hold_out_that_is_too_small_is_named():
    small = make_campaign(1, people=556, holdout=0.1)
    trial = run_trial(small)
    assert not trial.wins
    assert trial.qini is None
    assert describe_trial(trial) == (
        "too few: 56 customers held out in closed campaigns (2024-01-01: 56), at least 100 are needed"
    )
    both = pd.concat([small, small.assign(campaign="2024-02-01")])
    assert find_shortage(both) is None
    all_stay = both.assign(outcome=np.where(both["arm"] == "held_out", 0.0, both["outcome"]))
    assert find_shortage(all_stay) == (
        "too few: of the customers held out 0 left and 112 stayed, at least 20 of each are needed"
    )
    assert find_shortage(small.head(0)) == (
        "too few: 0 customers held out in closed campaigns, at least 100 are needed"
    )
