"""Both arms of a replay are compared on the same customers and snapshots, by what was answered first."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pandas as pd
import pytest

from closedloop.replay.results import compare_arms, describe_difference, measure_ticks, pair_arms

MAY, JUNE = (pd.Timestamp(f"2024-0{month}-01", tz="UTC") for month in (5, 6))


def make_arms(seed: int = 3) -> tuple[pd.DataFrame, list[pd.DataFrame]]:
    """300 customers at two snapshots: both arms know in May; in June the frozen one has it the wrong way round."""
    rng, outcomes, frozen = np.random.default_rng(seed), [], []
    for snapshot in (MAY, JUNE):
        churned = rng.random(300) < 0.3
        score = np.where(churned, 0.7, 0.2) + rng.normal(0, 0.05, 300)
        rows = pd.DataFrame({"customer_id": [f"C{n}" for n in range(300)], "snapshot_at": snapshot})
        outcomes.append(rows.assign(model_version="1", score=score, outcome=churned.astype(int)))
        frozen.append(rows.assign(score=score if snapshot == MAY else 1 - score))
    return pd.concat(outcomes, ignore_index=True), frozen


def test_the_answer_that_came_first_counts():
    outcomes, frozen = make_arms()
    again = outcomes.assign(score=0.5, model_version="2")
    pairs = pair_arms(pd.concat([outcomes, again]), frozen)
    assert len(pairs) == 600
    assert set(pairs["model_version"]) == {"1"}


def test_a_model_that_went_wrong_is_found_after_the_change_and_not_before():
    pairs = pair_arms(*make_arms())
    after = compare_arms(pairs, dt.date(2024, 6, 1), seed=7)
    assert after is not None
    assert after["verdict"] == "win"
    assert after["log_loss_interval"][1] < 0
    assert after["rows"] == 300
    may = compare_arms(pairs[pairs["snapshot_at"] == MAY], None, seed=7)
    assert may is not None
    assert may["verdict"] == "inconclusive"
    assert "better" in describe_difference(after)
    assert "neither" in describe_difference(may)


def test_figures_of_each_snapshot_are_of_both_arms():
    may, june = measure_ticks(pair_arms(*make_arms()))
    assert may["snapshot"] == "2024-05-01"
    assert may["closed"] == may["frozen"]
    assert may["constant_log_loss"] == pytest.approx(
        -sum(p * np.log(p) for p in (may["churn_rate"], 1 - may["churn_rate"])), abs=1e-4
    )
    assert june["frozen"]["roc_auc"] == pytest.approx(1 - june["closed"]["roc_auc"], abs=1e-4)


def test_a_snapshot_where_all_stayed_has_no_figures():
    pairs = pair_arms(*make_arms())
    alike = pairs.assign(outcome=pairs["outcome"].where(pairs["snapshot_at"] != MAY, 0))
    assert [tick["snapshot"] for tick in measure_ticks(alike)] == ["2024-06-01"]


def test_without_outcomes_nothing_is_claimed():
    outcomes, frozen = make_arms()
    assert compare_arms(pair_arms(outcomes, frozen), dt.date(2025, 1, 1), seed=7) is None
    assert "no closed outcome" in describe_difference(None)
