"""The loop offline: it decides on what is known on the day, and does nothing where there is nothing to do."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.config.featureset import FeatureSet
from closedloop.config.settings import RetrainingSettings
from closedloop.core.evaluation.value import CustomerValue, KeptCustomer
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.core.release.guardrails import count_scores
from closedloop.core.release.policy import ReleasePolicy
from closedloop.loop.backtest.history import History
from closedloop.loop.backtest.models import Model, Trainer
from closedloop.loop.backtest.offline import Loop
from tests.histories import COLUMNS, draw_history, hide_future


def run_loop(history: History, policy: str) -> Loop:
    trainer = Trainer(history, RetrainingSettings())
    loop = Loop(trainer, trainer.train_first(), MonitoringPolicy(policy=policy), ReleasePolicy())
    loop.run()
    return loop


def list_evidence(loop: Loop, now: dt.datetime) -> list[tuple[dt.datetime, Any]]:
    return [(at, check.evidence) for _, at, check in loop.checks if at <= now]


MORE_POLICIES = [pytest.param(one, marks=pytest.mark.thorough) for one in ("outcomes", "recalibrate", "every_30_days")]


@pytest.mark.parametrize("policy", ["own", *MORE_POLICIES])
def test_no_decision_knows_an_outcome_before_its_horizon_has_closed(policy: str) -> None:
    # the horizon is longer than a tick: outcomes that are drawn already are not known at the next one
    history = draw_history(changed_from=7, horizon_days=60)
    whole = run_loop(history, policy)
    for now in history.ticks[3:]:
        known = run_loop(hide_future(history, now), policy)
        assert known.events == [one for one in whole.events if one.at <= now]
        assert list_evidence(known, now) == list_evidence(whole, now)
        for (at, _, expected), (_, _, found) in zip(whole.served, known.served, strict=False):
            np.testing.assert_array_equal(found, expected, err_msg=f"served at {at}, known until {now}")


def test_a_changed_concept_is_learnt_by_the_policies_that_retrain() -> None:
    history = draw_history(changed_from=7)
    ends = {policy: run_loop(history, policy) for policy in ("never", "own", "every_30_days")}
    assert [one.what for one in ends["never"].events if "release" in one.what or "refused" in one.what] == []
    assert ends["never"].champion.as_of == history.ticks[0]
    assert any("monitoring.policy" in one.why or one.what == "alert" for one in ends["never"].events)
    for policy in ("own", "every_30_days"):
        assert any(one.what == "promoted" for one in ends[policy].events), policy
        assert ends[policy].champion.as_of > history.ticks[2], policy


def test_what_recalibrates_only_never_trains() -> None:
    found = run_loop(draw_history(changed_from=7), "recalibrate")
    kinds = [one.what for one in found.events if one.what.startswith(("release of a ", "refused "))]
    assert kinds
    assert all("recalibration" in one for one in kinds)


def list_retrained(loop: Loop) -> list[tuple[str, str]]:
    return [(one.what, one.why) for one in loop.events if one.what.startswith(("release of a ", "refused "))]


def set_limits(history: History, **limits: float) -> History:
    gates = history.dataset.gates.model_copy(update=limits)
    return dataclasses.replace(history, dataset=history.dataset.model_copy(update={"gates": gates}))


def test_a_challenger_that_wins_is_not_refused_for_a_limit_that_the_champion_misses_too() -> None:
    # no model of this concept reaches this AUC
    history = set_limits(draw_history(changed_from=7), roc_auc_min=0.95)
    found = run_loop(history, "own")
    won = [why for what, why in list_retrained(found) if what.startswith("release")]
    assert won
    assert all("roc_auc is missed and stops nothing: the champion misses it too" in why for why in won)
    assert found.champion.as_of > history.ticks[2]


def test_nothing_excuses_a_leak_or_too_few_rows() -> None:
    for limits in ({"accuracy_max": 0.5}, {"class_rows_min": 10_000}):
        found = list_retrained(run_loop(set_limits(draw_history(changed_from=7), **limits), "own"))
        assert found
        assert all(what.startswith("refused") for what, _ in found)


WORTH = CustomerValue(kept=KeptCustomer(column="spend"), offer_cost=22.5, save_rate=0.5)  # an offer from .45 on, at 100


class Known(Model):
    """A model whose scores of all are known: the true chance, but for one kind of customer."""

    def __init__(self, trained: Model, *, is_challenger: bool) -> None:
        super().__init__(trained.history, trained.parts, trained.as_of, trained.fitted)
        self.is_challenger = is_challenger
        self.reference_scores = count_scores(self.score(trained.as_of))

    def score(self, at: dt.datetime) -> np.ndarray:
        """The champion knows nothing of customers without a value, the challenger offers nothing to the others."""
        rows = self.history.rows[at]
        chance = (1 / (1 + np.exp(0.8 - (1.6 * rows["x0"] - 0.8 * rows["x1"])))).to_numpy()
        has_value = rows["spend"].to_numpy() > 1
        if self.is_challenger:
            return np.where(has_value, np.minimum(chance, 0.44), chance)
        return np.where(has_value, chance, 0.4)


def release_known(value: CustomerValue | None) -> Loop:
    history = draw_history()
    spend = np.where(np.arange(900) % 2, 100.0, 1.0)
    rows = {at: some.assign(spend=pd.Series(spend)) for at, some in history.rows.items()}
    features = FeatureSet((*COLUMNS, "spend"), (), "drawn", value=value, value_columns=("spend",) if value else ())
    dataset = history.dataset.model_copy(update={"value": value})
    history = dataclasses.replace(history, rows=rows, features=features, dataset=dataset)
    trainer = Trainer(history, RetrainingSettings())
    trained = trainer.train_first()
    champion = Known(trained, is_challenger=False)
    loop = Loop(trainer, champion, MonitoringPolicy(policy="never"), ReleasePolicy())
    loop.begin_release(Known(trained, is_challenger=True), history.ticks[0])
    loop.run()
    return loop


def test_a_challenger_with_a_better_log_loss_whose_offers_bring_less_is_taken_back() -> None:
    found = release_known(WORTH)
    ends = [(one.what, one.why) for one in found.events if one.what.startswith("rolled back")]
    assert len(ends) == 1
    assert "profit worse: 900 customers with closed outcomes" in ends[0][1]
    assert not found.champion.is_challenger  # type: ignore[attr-defined]
    without = release_known(None)
    assert not [one for one in without.events if one.what.startswith("rolled back")]
    assert without.champion.is_challenger  # type: ignore[attr-defined]
