"""The evidence for a step of a release: customers, failures and outcomes since the step began."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from closedloop.core.release.entries import Rollout
from closedloop.core.release.sequential import PairedLosses, sum_paired_losses
from closedloop.core.release.types import Remainder, StepEvidence
from closedloop.records import LABEL_RULE
from closedloop.release.money import find_unit, pair_profits, read_values
from closedloop.store.release_queries import Arm

if TYPE_CHECKING:
    import pandas as pd

    from closedloop.adapters.prometheus import ErrorCounts
    from closedloop.core.evaluation.value import CustomerValue
    from closedloop.core.release.types import ArmEvidence
    from closedloop.store.predictions import Predictions
    from closedloop.store.release_queries import ReleaseQueries

# What was answered before then belongs to the step before. A proxy does not say when it has taken up new weights, so it
# gets more time; a service that keeps no revision of its answers has taken up a new row by the first.
TAKEN_UP_AFTER, ROUTED_AFTER = dt.timedelta(seconds=2), dt.timedelta(seconds=15)
TRAFFIC_DAYS = dt.timedelta(days=14)
CLIENT_SHARE_MIN = 0.01  # of the customers: fewer move no percentile of the others
VARIANTS = {True: ("shadow",), False: ("champion", "canary")}
Unit = Literal["customer", "request"]
ByClient = dict[str | None, PairedLosses]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Gathers what a step is decided on.

    Parameters
    ----------
    unit
        What the split deals out: customers, or requests where a proxy splits.
    horizon_days
        Of the data set's outcomes; None: it has none.
    sent_features
        Whether requests that carried their features count.
    value, value_columns
        What a kept customer is worth, and the features that say it; a release takes them as they are at its start.
    """

    queries: ReleaseQueries
    outcomes: Predictions
    errors: ErrorCounts
    unit: Unit
    horizon_days: int | None
    sent_features: bool = False
    value: CustomerValue | None = None
    value_columns: tuple[str, ...] = ()

    def gather(
        self, name: str, rollout: Rollout, *, revision: int, now: dt.datetime, as_of: dt.datetime
    ) -> StepEvidence:
        """Evidence since the step began by ``now``, the service's clock; outcomes that are known by ``as_of``.

        ``revision`` is that of the deployment row which began the step.
        """
        by_proxy = self.unit == "request"
        since = (rollout.routed_at or rollout.step_at) + (ROUTED_AFTER if by_proxy else TAKEN_UP_AFTER)
        # who scores in shadow: the challenger at first, its predecessor at last
        shadows = {"shadow": (False, True), "champion": (True, False)}.get(rollout.step, (False, False))
        # a proxy's split does not wait for the services to take the row up
        by_row = None if by_proxy else revision
        stable = Arm(rollout.predecessor, rollout.version, shadows[0], by_row)
        challenger = Arm(rollout.version, rollout.predecessor, shadows[1], by_row)
        failed = self._count_errors(rollout, (now - since).total_seconds())

        def summarise(arm: Arm, without: str | None = None) -> ArmEvidence:
            found = self.queries.summarise(name, arm, since=since, without=without)
            errors = sum(failed.get(f"{arm.version}/{variant}", 0) for variant in VARIANTS[arm.shadow])
            return dataclasses.replace(found, errors=errors)

        arms, paired = (summarise(stable), summarise(challenger)), self._pair(name, rollout, as_of)
        losses, profits = _sum_by_client(paired, _sum_losses), self._pair_profits(name, rollout, paired)
        asked = list_minorities(self.queries.count_clients(name, challenger, since=since))
        told = list_minorities({client: one.customers for client, one in losses.items()})
        without = tuple(
            Remainder(
                client,
                *((summarise(stable, client), summarise(challenger, client)) if client in asked else arms),
                *(_leave_out(found, client if client in told else None) for found in (losses, profits)),
            )
            for client in sorted({*asked, *told})
        )
        totals = [sum(found.values(), PairedLosses()) for found in (losses, profits)]
        unit = find_unit(rollout.stake)
        hours = max((now - rollout.step_at).total_seconds() / 3600, 0.0)
        step: Any = rollout.step
        counts = rollout.reference_scores, rollout.predecessor_scores
        return StepEvidence(step, hours, *arms, totals[0], counts[0], without, totals[1], unit, counts[1])

    def measure_traffic(self, name: str, now: dt.datetime) -> float | None:
        """Requests a day over the last `TRAFFIC_DAYS`, one a customer; None: none is known."""
        return self.queries.measure_traffic(name, since=now - TRAFFIC_DAYS, until=now)

    def _count_errors(self, rollout: Rollout, seconds: float) -> dict[str, int]:
        if seconds <= 0:
            return {}
        found = self.errors.read_since(rollout.errors_before or {}, seconds, version=rollout.version)
        return {name: round(count) for name, count in found.items()}

    def _pair_profits(self, name: str, rollout: Rollout, paired: pd.DataFrame | None) -> ByClient:
        """The profits of both models' offers to the customers of `_pair`, by who said what became of them."""
        stake = rollout.stake
        if stake is None or paired is None or paired.empty:
            return {}
        kept = read_values(stake, self.outcomes, name, paired["prediction_id"].tolist())
        return _sum_by_client(paired.assign(kept=kept), lambda some: pair_profits(stake, some))

    def _pair(self, name: str, rollout: Rollout, as_of: dt.datetime) -> pd.DataFrame | None:
        """Customers with closed outcomes that both models scored; None where outcomes have no horizon."""
        if self.horizon_days is None:
            return None
        versions = (rollout.predecessor, rollout.version)
        rows = self.outcomes.list_outcomes(
            name,
            as_of=as_of,
            horizon_days=self.horizon_days,
            include_shadow=True,
            versions=versions,
            sent_features=self.sent_features,
            untreated=True,
        )
        rows = rows[rows["customer_id"].notna()]
        # of a customer's predictions on a snapshot the first is here: the predecessor's may be from before the release
        began = (rows["predicted_at"] >= rollout.started_at) | (rows["model_version"] == rollout.predecessor)
        columns = ["prediction_id", "customer_id", "snapshot_at", "score", "outcome", "reported_by"]
        arms = [rows.loc[began & (rows["model_version"] == version), columns] for version in versions]
        both = arms[0].merge(arms[1], on=["customer_id", "snapshot_at"], suffixes=("", "_of_version"))
        return both.drop_duplicates("customer_id")  # the first row counts: one that was counted stays so when more come


def _sum_losses(paired: pd.DataFrame) -> PairedLosses:
    return sum_paired_losses(paired["outcome"], paired["score"], paired["score_of_version"])


def _sum_by_client(paired: pd.DataFrame | None, add_up: Callable[[pd.DataFrame], PairedLosses]) -> ByClient:
    if paired is None:
        return {}
    by_client = paired.groupby("reported_by", dropna=False)
    return {client if isinstance(client, str) else None: add_up(some) for client, some in by_client}


def _leave_out(found: ByClient, client: str | None) -> PairedLosses:
    """The sum over all other clients; None leaves no client out."""
    return sum((one for who, one in found.items() if client is None or who != client), PairedLosses())


def list_minorities(customers: Mapping[str | None, int]) -> list[str]:
    """The clients with less than half of the customers, and enough to be felt."""
    total = sum(customers.values())
    return [
        client
        for client, count in customers.items()
        if client not in (None, LABEL_RULE) and CLIENT_SHARE_MIN * total <= count < total / 2
    ]
