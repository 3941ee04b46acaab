"""The policy backtest: what it says of a world that changes, and of one that does not."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from closedloop.config.settings import RetrainingSettings
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.core.release.policy import ReleasePolicy
from closedloop.loop.backtest.backtest import compare_loops, list_policies, run_policies
from closedloop.loop.backtest.history import History
from tests.histories import draw_history


def backtest(history: History) -> dict[str, Any]:
    told: list[tuple[str, dt.datetime]] = []
    loops = run_policies(
        history,
        list_policies(30),
        monitoring=MonitoringPolicy(),
        releasing=ReleasePolicy(),
        retraining=RetrainingSettings(),
        tell_progress=lambda policy, at: told.append((policy, at)),
    )
    assert told == [(policy, at) for policy in list_policies(30) for at in history.ticks]
    return compare_loops(history, loops, until=history.params.as_of_at)


def test_a_world_without_a_change_is_not_retrained() -> None:
    # with so many customers the first model has learnt what there is
    report = backtest(draw_history(first_tick=7, snapshots=14, customers=2_500))
    assert report["picked"] == "never"
    assert report["sentence"].startswith("Do not retrain: ")
    assert report["policies"]["never"]["retrainings"] == report["policies"]["outcomes"]["retrainings"] == 0
    assert report["policies"]["every_30_days"]["retrainings"] >= 5
    assert all(own["gain"]["low"] <= 0.002 for name, own in report["policies"].items() if name != "never")


@pytest.mark.thorough
def test_a_changed_world_picks_a_policy_that_retrains() -> None:
    report = backtest(draw_history(changed_from=7))
    picked, policies = report["picked"], report["policies"]
    assert picked in ("own", "outcomes", "every_30_days", "drift")
    own = policies[picked]
    assert own["gain"]["low"] > 0.1
    assert own["found"]["low"] > 100
    assert own["log_loss"] == min(one["log_loss"] for one in policies.values())
    assert own["gain"]["mean"] == pytest.approx(policies["never"]["log_loss"] - own["log_loss"])
    assert f"monitoring.policy: {picked}" in report["sentence"]
    assert f"{own['retrainings']} retraining" in report["sentence"]
    assert "95% interval for all 5 comparisons together" in report["sentence"]


def test_only_what_is_known_is_judged() -> None:
    history = draw_history(horizon_days=90, first_tick=8)
    report = backtest(history)
    assert report["snapshots"][-1] == f"{history.ticks[-3]:%Y-%m-%d}"  # as_of is a month after the last tick
