"""`closedloop backtest`: replay each policy on the history, compare them, and say in a sentence which one pays."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from closedloop.config.settings import RetrainingSettings
from closedloop.core.evaluation.bootstrap import Bootstrap
from closedloop.core.evaluation.metrics import list_log_losses
from closedloop.core.evaluation.policies import LIST_SHARE, NEVER, Worth, find_listed, pick_policy, weigh_policies
from closedloop.core.monitoring.policy import MonitoringPolicy, describe_policy
from closedloop.core.release.policy import ReleasePolicy
from closedloop.errors import count_noun
from closedloop.loop.backtest.history import DAY, History
from closedloop.loop.backtest.models import Trainer
from closedloop.loop.backtest.offline import Loop
from closedloop.stages.training_set import LABEL

RETRAINED = ("release of a ", "refused ", "failed")


def list_policies(every_days: int) -> tuple[str, ...]:
    """The policies that a backtest compares, as `MonitoringPolicy.policy` names them."""
    return (NEVER, f"every_{every_days}_days", "drift", "outcomes", "recalibrate", "own")


def run_policies(
    history: History,
    policies: Sequence[str],
    *,
    monitoring: MonitoringPolicy,
    releasing: ReleasePolicy,
    retraining: RetrainingSettings,
    tell_progress: Callable[[str, dt.datetime], None] = lambda *_: None,
) -> dict[str, Loop]:
    """Replay each policy from the same first model."""
    trainer, loops = Trainer(history, retraining), {}
    first = trainer.train_first()
    for name in policies:
        loop = Loop(trainer, first, monitoring.model_copy(update={"policy": name}), releasing)
        loop.run(lambda at, name=name: tell_progress(name, at))  # type: ignore[misc]
        loops[name] = loop
    return loops


def compare_loops(history: History, loops: Mapping[str, Loop], *, until: dt.datetime) -> dict[str, Any]:
    """The report as JSON can hold it, on the snapshots whose outcomes are known at ``until``."""
    ticks = [at for at in history.ticks if at + history.horizon <= until]
    truth = {at: history.rows[at][LABEL].to_numpy(np.int8) for at in ticks}
    scores = {name: {at: each for at, _, each in loop.served} for name, loop in loops.items()}
    losses = {name: [list_log_losses(truth[at], own[at]) for at in ticks] for name, own in scores.items()}
    listed = {name: [find_listed(truth[at], own[at]) for at in ticks] for name, own in scores.items()}
    customers = pd.concat([history.rows[at]["customer_id"] for at in ticks])
    evaluation = history.params.evaluation
    worth = weigh_policies(
        customers,
        {name: np.concatenate(each) for name, each in losses.items()},
        {name: np.concatenate(each) for name, each in listed.items()},
        Bootstrap(history.params.seed, evaluation.bootstrap_samples, evaluation.level),
    )
    policies = {
        name: _describe_loop(loop, until)
        | {"log_loss": float(np.concatenate(losses[name]).mean())}
        | {"leavers_found": float(np.concatenate(listed[name]).sum())}
        | {"log_loss_by_snapshot": [float(each.mean()) for each in losses[name]]}
        | (_describe_worth(worth[name]) if name in worth else {})
        for name, loop in loops.items()
    }
    gain_min = loops[NEVER].monitoring.gain_min
    retrainings = {name: each["retrainings"] for name, each in policies.items()}
    report = {
        "dataset": history.dataset.name,
        "snapshots": [f"{at:%Y-%m-%d}" for at in ticks],
        "rows": len(customers),
        "customers": int(customers.nunique()),
        "leavers": int(sum(each.sum() for each in truth.values())),
        "list_share": LIST_SHARE,
        "level": evaluation.level,
        "comparisons": len(worth),
        "gain_min": gain_min,
        "policies": policies,
        "picked": pick_policy(worth, retrainings, gain_min=gain_min),
    }
    return report | {"sentence": write_sentence(report)}


def _describe_loop(loop: Loop, until: dt.datetime) -> dict[str, Any]:
    events = [one for one in loop.events if one.at <= until]
    return {
        "retrainings": sum(one.what.startswith(RETRAINED) for one in events),
        "promoted": sum(one.what == "promoted" for one in events),
        "events": [{"at": f"{one.at:%Y-%m-%d}", "what": one.what, "why": one.why} for one in events],
    }


def _describe_worth(worth: Worth) -> dict[str, Any]:
    return {
        "gain": {"mean": worth.gain, **worth.gain_interval._asdict()},
        "found": {"mean": worth.found, **worth.found_interval._asdict()},
    }


def write_sentence(report: Mapping[str, Any]) -> str:
    """Which policy, how many retrainings, and what they are worth in log loss and in customers."""
    picked, policies = report["picked"], report["policies"]
    others = [name for name in policies if name != NEVER]
    if not others:
        return "Do not retrain: no other policy was compared."
    first, last = (dt.date.fromisoformat(report["snapshots"][place]) for place in (0, -1))
    # of those that are alike the one that trains least
    best = max(others, key=lambda one: (policies[one]["gain"]["mean"], -policies[one]["retrainings"]))
    name = picked if picked != NEVER else best
    gain, found, trained = policies[name]["gain"], policies[name]["found"], policies[name]["retrainings"]
    worth = (
        f"{count_noun(trained, 'retraining')} in {(last - first) / (30 * DAY):.0f} months: log loss a prediction is "
        f"{gain['mean']:.4f} lower than without any ({gain['low']:+.4f} to {gain['high']:+.4f}, "
        f"{100 * report['level']:g}% interval for all {report['comparisons']} comparisons together), and the lists of "
        f"the {100 * report['list_share']:g}% with the highest scores hold {found['mean']:+,.0f} of "
        f"{report['leavers']:,} leavers ({found['low']:+,.0f} to {found['high']:+,.0f})"
    )
    if picked == NEVER:
        floor = f"more than {report['gain_min']:g} of log loss for certain (monitoring.gain_min)"
        return f"Do not retrain: no policy saves {floor}. The best, {name}, has {worth}."
    words = describe_policy(picked)
    return f"{words[:1].upper()}{words[1:]} (monitoring.policy: {picked}): {worth}."
