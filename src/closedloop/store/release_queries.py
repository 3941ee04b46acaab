"""The record of each of two models in the operations store: customers, latency and scores, in SQL."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from closedloop.core.release.guardrails import SCORE_BINS
from closedloop.core.release.types import ArmEvidence
from closedloop.records import Source
from closedloop.store.counted import is_counted
from closedloop.store.database import Database
from closedloop.store.migrations.tables import PREDICTIONS


class Arm(NamedTuple):
    """The version whose figures are asked for, the one beside it, and whether it scored in shadow.

    ``revision`` is that of the deployment row which began the step: what a worker answered by an earlier one, because
    it had not taken this one up yet, belongs to the step before. None: any revision counts.
    """

    version: str
    beside: str
    shadow: bool
    revision: int | None = None


class ReleaseQueries:
    """Reads what a release is decided on; requests that a version was forced upon by header are left out.

    Parameters
    ----------
    sources
        Whose requests are dealt out between the versions: what a batch scores is not.
    sent_features
        Whether requests that carried their features count too: a client that makes them up says what is measured.
    sticky
        Whether a customer stays with the version that it is dealt to: a request that another one answered is from
        before the service had taken the step up. False behind a proxy, where a customer is its first request's.
    """

    def __init__(
        self,
        database: Database,
        sources: Sequence[Source] = ("http",),
        *,
        sent_features: bool = False,
        sticky: bool = True,
    ) -> None:
        self.database, self._sources, self._sent_features = database, sources, sent_features
        self._sticky = sticky

    def summarise(self, model_name: str, arm: Arm, *, since: dt.datetime, without: str | None = None) -> ArmEvidence:
        """The answers of a version, or its scores in shadow, since a time; errors, which are not stored, are 0.

        A customer counts once, by its first request to the version that it was dealt to; ``without`` leaves a
        client's requests out.
        """
        chosen = self._select(model_name, arm, since).subquery()
        kept = chosen.c.client.is_distinct_from(without) if without is not None else sa.true()
        mine = sa.select(chosen).where(chosen.c.model_version == arm.version, chosen.c.dealt_to == arm.version, kept)
        requests = sa.select(sa.func.count()).select_from(mine.where(chosen.c.place_of_day == 1).subquery())
        first = mine.where(chosen.c.place == 1).subquery()
        inside = [
            sa.func.count().filter(first.c.score >= low / SCORE_BINS, first.c.score < (low + 1) / SCORE_BINS)
            for low in range(SCORE_BINS - 1)
        ]
        with self.database.begin(write=False) as connection:
            customers, *bins = connection.execute(sa.select(sa.func.count(), *inside).select_from(first)).one()
            place = max(-(-customers * 95 // 100) - 1, 0)
            slowest = sa.select(first.c.latency_ms).order_by(first.c.latency_ms).offset(place).limit(1)
            found = connection.scalar(requests) or 0, connection.scalar(slowest)
        return ArmEvidence(found[0], 0, customers, found[1], (*bins, customers - sum(bins)))

    def count_clients(self, model_name: str, arm: Arm, *, since: dt.datetime) -> dict[str | None, int]:
        """How many customers of this arm and the one beside each client was the first to ask for."""
        chosen = self._select(model_name, arm, since).subquery()
        query = sa.select(chosen.c.client, sa.func.count()).where(
            chosen.c.place == 1, chosen.c.model_version == chosen.c.dealt_to
        )
        query = query.group_by(chosen.c.client)
        with self.database.begin(write=False) as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def measure_traffic(self, model_name: str, *, since: dt.datetime, until: dt.datetime) -> float | None:
        """Requests a day that were answered since, one a customer and day; None if there were none.

        The days count from the first request on: a service may have been started since.
        """
        table = PREDICTIONS.c
        customer = sa.func.coalesce(table.customer_id, table.prediction_id)
        query = (
            sa.select(customer.label("customer"), sa.func.date(self._utc()).label("day"))
            .where(table.model_name == model_name, table.predicted_at >= since, table.predicted_at < until)
            .where(table.variant != "shadow", ~table.forced, table.source.in_(self._sources))
            .where(is_counted(sent_features=self._sent_features))
            .distinct()
            .subquery()
        )
        with self.database.begin(write=False) as connection:
            requests, first = connection.execute(sa.select(sa.func.count(), sa.func.min(query.c.day))).one()
        if not requests:
            return None
        began = dt.datetime.combine(dt.date.fromisoformat(str(first)), dt.time(), dt.UTC)
        return float(requests / max((until - max(began, since)) / dt.timedelta(days=1), 1.0))

    def _utc(self) -> sa.ColumnElement[Any]:
        """When a prediction was made, UTC."""
        at = PREDICTIONS.c.predicted_at
        return sa.func.timezone("UTC", at) if self.database.dialect == "postgresql" else at

    def _select(self, model_name: str, arm: Arm, since: dt.datetime) -> sa.Select[Any]:
        """Requests with their place among those of their customer, and among those of customer and day."""
        table = PREDICTIONS.c
        customer = sa.func.coalesce(table.customer_id, table.prediction_id)
        # a service of an earlier release keeps no revision: the time alone says whether it counts
        taken_up = sa.func.coalesce(table.revision, arm.revision) >= arm.revision if arm.revision else sa.true()
        order = (table.predicted_at, table.prediction_id)
        newest_first = (table.predicted_at.desc(), table.prediction_id.desc())
        dealt_to = sa.func.first_value(table.model_version)
        by = (customer, table.model_version)
        by_day = (*by, sa.func.date(self._utc()))
        columns = (
            dealt_to.over(partition_by=customer, order_by=newest_first if self._sticky else order).label("dealt_to"),
            table.model_version,
            table.client,
            table.score,
            table.latency_ms,
            sa.func.row_number().over(partition_by=by, order_by=order).label("place"),
            sa.func.row_number().over(partition_by=by_day, order_by=order).label("place_of_day"),
        )
        return (
            sa.select(*columns)
            .where(table.model_name == model_name, table.model_version.in_((arm.version, arm.beside)))
            .where(table.predicted_at >= since, taken_up, (table.variant == "shadow") == arm.shadow)
            .where(~table.forced, table.source.in_(self._sources), is_counted(sent_features=self._sent_features))
        )
