"""What each of two models did, from the operations store: requests, customers, latency and scores, in SQL."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import sqlalchemy as sa

from closedloop.adapters.database import Database
from closedloop.core.guardrails import SCORE_BINS
from closedloop.core.rollout import ArmEvidence
from closedloop.migrations.tables import PREDICTIONS
from closedloop.records import Source


class Arms(Database):
    """Reads what a rollout is decided on; requests that a version was forced upon by header are left out.

    ``sources`` are those whose requests are dealt out between the versions: what a batch scores is not.
    """

    def __init__(self, url: str, connections_max: int = 5, sources: Sequence[Source] = ("http",)) -> None:
        super().__init__(url, connections_max)
        self._sources = sources

    def summarise(self, model_name: str, version: str, *, shadow: bool, since: dt.datetime) -> ArmEvidence:
        """What a version answered, or scored in shadow, since a time; errors, which are not stored, are 0."""
        table = PREDICTIONS.c
        chosen = (
            sa.select(table.customer_id, table.score, table.latency_ms)
            .where(table.model_name == model_name, table.model_version == version, table.predicted_at >= since)
            .where((table.variant == "shadow") == shadow, ~table.forced, table.source.in_(self._sources))
            .subquery()
        )
        inside = [
            sa.func.count().filter(chosen.c.score >= low / SCORE_BINS, chosen.c.score < (low + 1) / SCORE_BINS)
            for low in range(SCORE_BINS - 1)
        ]
        counts = sa.select(sa.func.count(), sa.func.count(chosen.c.customer_id.distinct()), *inside)
        with self._begin(write=False) as connection:
            requests, customers, *bins = connection.execute(counts.select_from(chosen)).one()
            place = max(-(-requests * 95 // 100) - 1, 0)
            slowest = sa.select(chosen.c.latency_ms).order_by(chosen.c.latency_ms).offset(place).limit(1)
            p95 = connection.scalar(slowest)
        return ArmEvidence(requests, 0, customers, p95, (*bins, requests - sum(bins)))
