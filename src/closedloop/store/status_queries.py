"""Queries of a model for `closedloop status` and Prometheus; no query reads more than a fixed number of rows."""

from __future__ import annotations

import dataclasses
import datetime as dt

import sqlalchemy as sa

from closedloop.store.counted import is_counted
from closedloop.store.database import Database
from closedloop.store.migrations.tables import OUTCOMES, PREDICTIONS
from closedloop.store.samples import select_first_outcome

ROLLING_ROWS, REPORTS_READ = 1_000, 10_000
MATURITY_ROWS = 5_000
RECENT_ROWS = 1_000


@dataclasses.dataclass(frozen=True)
class Share:
    """``part`` of ``whole``."""

    part: int = 0
    whole: int = 0

    @property
    def value(self) -> float | None:
        """As a number; None of nothing."""
        return self.part / self.whole if self.whole else None


class StatusQueries:
    """Accuracy, known outcomes and age of features; shadows and forced versions are left out.

    ``sent_features``: whether requests that carried their features count; a client may send any.
    """

    def __init__(self, database: Database, *, sent_features: bool = False) -> None:
        self.database, self._counted = database, is_counted(sent_features=sent_features)

    def measure_accuracy(self, model_name: str, model_version: str, *, closed_by: dt.datetime) -> Share:
        """Right decisions among the newest 1,000 outcomes of a version: a customer's first prediction of a snapshot.

        Counted are snapshots up to ``closed_by``, so that an open horizon never is. They are sought in the 10,000
        outcomes that arrived last, of whatever model.
        """
        table = PREDICTIONS.c
        newest = sa.select(OUTCOMES).order_by(OUTCOMES.c.sequence.desc()).limit(REPORTS_READ).subquery()
        # a subquery of one value: as an anti-join PostgreSQL would read all outcomes
        outcome = select_first_outcome().label("outcome")
        columns = (table.customer_id, table.prediction_id, table.snapshot_at, table.decision)
        query = (
            sa.select(*columns, outcome, newest.c.sequence)
            .join(newest, newest.c.prediction_id == table.prediction_id)
            .where(*_answered(model_name), self._counted)
            .where(table.model_version == model_version, table.snapshot_at <= closed_by)
            .order_by(table.predicted_at, table.prediction_id, newest.c.sequence)
        )
        first: dict[tuple[str, dt.datetime], tuple[int, bool]] = {}
        with self.database.begin(write=False) as connection:
            for row in connection.execute(query):
                key = (row.customer_id or row.prediction_id, row.snapshot_at)
                first.setdefault(key, (row.sequence, row.decision == row.outcome))
        counted = [right for _, right in sorted(first.values())[-ROLLING_ROWS:]]
        return Share(sum(counted), len(counted))

    def measure_maturity(self, model_name: str, *, closed_by: dt.datetime) -> Share:
        """Counted predictions with an outcome among the newest 5,000 of snapshots up to ``closed_by``."""
        table = PREDICTIONS.c
        newest = (
            sa.select(table.prediction_id)
            .where(*_answered(model_name), self._counted, table.snapshot_at <= closed_by)
            .order_by(table.snapshot_at.desc(), table.prediction_id.desc())
            .limit(MATURITY_ROWS)
            .subquery()
        )
        known = sa.exists().where(OUTCOMES.c.prediction_id == newest.c.prediction_id)
        counts = sa.select(sa.func.count().filter(known), sa.func.count()).select_from(newest)
        with self.database.begin(write=False) as connection:
            return Share(*connection.execute(counts).one())

    def read_features_as_of(self, model_name: str) -> dt.datetime | None:
        """The newest snapshot among the features of the last 1,000 predictions; None if none was looked up."""
        table = PREDICTIONS.c
        last = (
            sa.select(table.features_as_of)
            .where(table.model_name == model_name, self._counted)
            .order_by(table.predicted_at.desc(), table.prediction_id.desc())
            .limit(RECENT_ROWS)
            .subquery()
        )
        with self.database.begin(write=False) as connection:
            found: dt.datetime | None = connection.scalar(sa.select(sa.func.max(last.c.features_as_of)))
        return found

    def read_predicted_at(
        self, model_name: str, *, version: str | None = None, until: dt.datetime | None = None
    ) -> dt.datetime | None:
        """When the newest counted prediction was made (of a version, before a moment), sought in the last 5,000."""
        table = PREDICTIONS.c
        of_model = [table.model_name == model_name, *([] if until is None else [table.predicted_at < until])]
        newest = sa.select(table.prediction_id).where(*of_model)
        newest = newest.order_by(table.predicted_at.desc(), table.prediction_id.desc()).limit(MATURITY_ROWS)
        query = sa.select(sa.func.max(table.predicted_at)).where(
            table.prediction_id.in_(newest), *_answered(model_name), self._counted
        )
        if version is not None:
            query = query.where(table.model_version == version)
        with self.database.begin(write=False) as connection:
            found: dt.datetime | None = connection.scalar(query)
        return found


def _answered(model_name: str) -> tuple[sa.ColumnElement[bool], ...]:
    return (PREDICTIONS.c.model_name == model_name, PREDICTIONS.c.variant != "shadow", ~PREDICTIONS.c.forced)
