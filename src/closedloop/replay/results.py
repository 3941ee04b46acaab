"""The results of a replay: both arms over time, paired on the same customers."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from typing import TYPE_CHECKING, Any

import pandas as pd

from closedloop.core.evaluation.bootstrap import Bootstrap
from closedloop.core.evaluation.comparison import compare_models
from closedloop.core.evaluation.metrics import measure_classification
from closedloop.errors import count_noun
from closedloop.loop.status.status import describe_money

if TYPE_CHECKING:
    from closedloop.store.checks import Check


def describe_check(check: Check) -> dict[str, Any]:
    """The evidence behind the monitor's verdict: drift by feature, and realised beside expected outcomes."""
    evidence = check.evidence
    drift, found = evidence.get("drift", {}), evidence.get("realised")
    effects = {name: shift["effect"] for name, shift in drift.get("features", {}).items()}
    described = {
        "verdict": check.verdict,
        "model_version": check.model_version,
        "drift": max(effects.values(), default=None),
        "drifted": {name: effects[name] for name in drift.get("drifted", ())},
        "outcome_rows": evidence["outcome_rows"],
        "treated": evidence.get("actions", {}).get("treated", 0),
    }
    if "money" in evidence:
        described["money"] = describe_money(evidence["money"])
    if found is None:
        return described
    figures = {name: found[name] for name in ("brier", "churn_rate", "expected", "breach")}
    return described | {"outcomes_of": evidence["outcomes_until"][:10], "realised": figures}


def pair_arms(outcomes: pd.DataFrame, frozen: list[pd.DataFrame]) -> pd.DataFrame:
    """Pair the scores of both arms: customer, snapshot, outcome, the service's first score, and the frozen model's.

    Parameters
    ----------
    outcomes : DataFrame
        As `Predictions.list_outcomes` returns them, in the order of the answers.
    """
    first = outcomes.drop_duplicates(["customer_id", "snapshot_at"])
    columns = ["customer_id", "snapshot_at", "model_version", "score", "outcome"]
    return first[columns].merge(pd.concat(frozen), on=["customer_id", "snapshot_at"], suffixes=("", "_frozen"))


def measure_ticks(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """ROC AUC and log loss of both arms on each snapshot with both outcomes (churned and stayed).

    ``constant_log_loss`` is that of the snapshot's churn rate as everybody's score: no constant score has less.
    """
    found = []
    for snapshot, rows in pairs.groupby("snapshot_at"):
        if rows["outcome"].nunique() < 2:
            continue
        arms = {
            arm: measure_classification(rows["outcome"], rows[column], 0.5)
            for arm, column in (("closed", "score"), ("frozen", "score_frozen"))
        }
        figures = {arm: {name: round(all_[name], 5) for name in ("roc_auc", "log_loss")} for arm, all_ in arms.items()}
        rate = float(rows["outcome"].mean())
        constant = round(-rate * math.log(rate) - (1 - rate) * math.log(1 - rate), 5)
        rates = {"customers": len(rows), "churn_rate": round(rate, 4), "constant_log_loss": constant}
        found.append({"snapshot": f"{snapshot:%Y-%m-%d}", **rates, **figures})
    return found


def compare_arms(pairs: pd.DataFrame, since: dt.date | None, *, seed: int) -> dict[str, Any] | None:
    """Compare the closed arm with the frozen one on snapshots from ``since`` on, by a paired bootstrap over customers.

    Differences are closed minus frozen. Return None if no pair has an outcome.
    """
    if since is not None:
        pairs = pairs[pairs["snapshot_at"] >= pd.Timestamp(since, tz="UTC")]
    if pairs.empty or pairs["outcome"].nunique() < 2:
        return None
    arms = pairs["outcome"], pairs["score_frozen"], pairs["score"]
    bootstrap = Bootstrap(seed, customers=pairs["customer_id"])
    compared = compare_models(*arms, champion_threshold=0.5, challenger_threshold=0.5, bootstrap=bootstrap)
    return {**dataclasses.asdict(compared), "since": str(since) if since else None}


def describe_difference(compared: dict[str, Any] | None) -> str:
    """The comparison in a sentence."""
    if compared is None:
        return "There is no closed outcome to compare the arms by."
    auc, loss = compared["auc_interval"], compared["log_loss_interval"]
    words = {"win": "better", "lose": "worse", "inconclusive": "neither better nor worse beyond chance"}
    when = f"On snapshots from {compared['since']} on" if compared["since"] else "Over all snapshots"
    return (
        f"{when} the closed loop is {words[compared['verdict']]}: log loss {compared['log_loss_difference']:+.4f} "
        f"(95% {loss[0]:+.4f} to {loss[1]:+.4f}; less is better), ROC AUC {compared['auc_difference']:+.4f} "
        f"({auc[0]:+.4f} to {auc[1]:+.4f}), on {count_noun(compared['rows'], 'outcome')} of "
        f"{count_noun(compared['customers'], 'customer')}."
    )
