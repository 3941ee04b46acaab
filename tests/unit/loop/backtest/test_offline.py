"""The loop offline: it decides on what is known on the day, and does nothing where there is nothing to do."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Any

import numpy as np
import pytest

from closedloop.config.settings import RetrainingSettings
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.core.release.policy import ReleasePolicy
from closedloop.loop.backtest.history import History
from closedloop.loop.backtest.models import Trainer
from closedloop.loop.backtest.offline import Loop
from tests.histories import draw_history, hide_future


def run_loop(history: History, policy: str) -> Loop:
    trainer = Trainer(history, RetrainingSettings())
    loop = Loop(trainer, trainer.train_first(), MonitoringPolicy(policy=policy), ReleasePolicy())
    loop.run()
    return loop


def list_evidence(loop: Loop, now: dt.datetime) -> list[tuple[dt.datetime, Any]]:
    return [(at, check.evidence) for _, at, check in loop.checks if at <= now]


@pytest.mark.parametrize("policy", ["own", "outcomes", "recalibrate", "every_30_days"])
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
