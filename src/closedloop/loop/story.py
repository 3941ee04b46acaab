"""What a replay tells: both arms over time, paired on the same customers, and every event."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from closedloop.core.comparison import compare_models
from closedloop.core.metrics import measure_classification

if TYPE_CHECKING:
    from closedloop.adapters.checks import Check


class Event(NamedTuple):
    """Something that happened on a day of the simulated clock; ``kind`` is the picture's."""

    at: dt.date
    kind: str
    what: str
    why: str


@dataclasses.dataclass
class Story:
    """Filled tick by tick.

    Attributes
    ----------
    frozen
        One frame a tick: ``customer_id``, ``snapshot_at`` and the first model's ``score``.
    """

    events: list[Event] = dataclasses.field(default_factory=list)
    ticks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    frozen: list[pd.DataFrame] = dataclasses.field(default_factory=list)

    def tell(self, at: dt.date, kind: str, what: str, why: str = "") -> None:
        """Add an event."""
        self.events.append(Event(at, kind, what, why))


def describe_check(check: Check) -> dict[str, Any]:
    """What the monitor's verdict rests on: drift by feature, and the outcomes beside what was expected of them."""
    evidence = check.evidence
    drift, found = evidence.get("drift", {}), evidence.get("realised")
    effects = {name: shift["effect"] for name, shift in drift.get("features", {}).items()}
    told = {
        "verdict": check.verdict,
        "model_version": check.model_version,
        "drift": max(effects.values(), default=None),
        "drifted": {name: effects[name] for name in drift.get("drifted", ())},
    }
    if found is None:
        return told
    figures = {name: found[name] for name in ("brier", "churn_rate", "expected", "breach")}
    return told | {"outcomes_of": evidence["outcomes_until"][:10], "realised": figures}


def pair_arms(outcomes: pd.DataFrame, frozen: list[pd.DataFrame]) -> pd.DataFrame:
    """Customer and snapshot with outcome, the score that was answered first, and the frozen model's.

    Parameters
    ----------
    outcomes : DataFrame
        As `Store.list_outcomes` returns them, in the order of the answers.
    """
    first = outcomes.drop_duplicates(["customer_id", "snapshot_at"])
    columns = ["customer_id", "snapshot_at", "model_version", "score", "outcome"]
    return first[columns].merge(pd.concat(frozen), on=["customer_id", "snapshot_at"], suffixes=("", "_frozen"))


def measure_ticks(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """ROC AUC and log loss of both arms on each snapshot of which customers both left and stayed."""
    found = []
    for snapshot, rows in pairs.groupby("snapshot_at"):
        if rows["outcome"].nunique() < 2:
            continue
        arms = {
            arm: measure_classification(rows["outcome"], rows[column], 0.5)
            for arm, column in (("closed", "score"), ("frozen", "score_frozen"))
        }
        figures = {arm: {name: round(all_[name], 5) for name in ("roc_auc", "log_loss")} for arm, all_ in arms.items()}
        rates = {"customers": len(rows), "churn_rate": round(float(rows["outcome"].mean()), 4)}
        found.append({"snapshot": f"{snapshot:%Y-%m-%d}", **rates, **figures})
    return found


def compare_arms(pairs: pd.DataFrame, since: dt.date | None, *, seed: int) -> dict[str, Any] | None:
    """The closed arm against the frozen one on snapshots from ``since`` on; paired bootstrap over customers.

    Differences are closed minus frozen. None where there is nothing to compare.
    """
    if since is not None:
        pairs = pairs[pairs["snapshot_at"] >= pd.Timestamp(since, tz="UTC")]
    if pairs.empty or pairs["outcome"].nunique() < 2:
        return None
    arms = pairs["outcome"], pairs["score_frozen"], pairs["score"]
    compared = compare_models(
        *arms, champion_threshold=0.5, challenger_threshold=0.5, seed=seed, customers=pairs["customer_id"]
    )
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
        f"({auc[0]:+.4f} to {auc[1]:+.4f}), on {compared['rows']:,} outcomes of {compared['customers']:,} customers."
    )
