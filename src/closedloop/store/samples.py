"""The monitor's view of the operations store: samples of fixed size, however many rows stand behind them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from closedloop.adapters.sqlalchemy import read_partitions
from closedloop.store.counted import is_counted, is_ruled, order_outcomes
from closedloop.store.database import Database
from closedloop.store.migrations.tables import OUTCOMES, PREDICTIONS

if TYPE_CHECKING:
    import pandas as pd

CHUNK_ROWS = 5_000
DRAWN_TIMES = (1, 4, 16)


class Sample(NamedTuple):
    """Rows drawn by their ids, which are random, and how many predictions they were drawn from."""

    rows: pd.DataFrame
    predictions: int


class Samples:
    """Predictions that were answered by one version, by samples; shadows and forced versions are left out.

    ``sent_features``: whether requests that carried their features count; a client may send any.
    """

    def __init__(self, database: Database, *, sent_features: bool = False) -> None:
        self.database, self._sent_features = database, sent_features

    def sample_window(
        self,
        model_name: str,
        model_version: str,
        features: Sequence[str],
        *,
        since: dt.datetime,
        until: dt.datetime,
        rows_max: int,
    ) -> Sample:
        """About ``rows_max`` customers at most with a prediction in [since, until): the first of each in it.

        Returns
        -------
        Sample
            With ``features``, ``score``, ``decision``, ``customer_id`` and ``client``; ``predictions`` counts all in
            the window.
        """
        import pandas as pd

        inside = (PREDICTIONS.c.predicted_at >= since, PREDICTIONS.c.predicted_at < until)
        columns = ("customer_id", "score", "decision", "client", "features")
        others = PREDICTIONS.alias()
        earlier = self._select_earlier(others, model_version).where(
            others.c.predicted_at >= since,
            sa.tuple_(others.c.predicted_at, others.c.prediction_id)
            < sa.tuple_(PREDICTIONS.c.predicted_at, PREDICTIONS.c.prediction_id),
        )
        count, rows = self._draw(
            lambda drawn: drawn.with_only_columns(*_pick(columns)).where(~earlier.exists()),
            model_name,
            model_version,
            inside,
            rows_max,
        )
        values = pd.DataFrame.from_records([row.features for row in rows], columns=list(features))
        known = [tuple(row)[:4] for row in rows]
        return Sample(values.join(pd.DataFrame.from_records(known, columns=list(columns[:4]))), count)

    def sample_outcomes(
        self, model_name: str, model_version: str, *, after: dt.datetime, until: dt.datetime, rows_max: int
    ) -> Sample:
        """About ``rows_max`` known outcomes at most of snapshots in (after, until], one a customer and snapshot.

        Returns
        -------
        Sample
            With ``score``, ``decision``, ``customer_id``, ``snapshot_at``, ``outcome`` (the label rule's, else the
            first that was reported) and ``reported_by``.
        """
        import pandas as pd

        inside = (PREDICTIONS.c.snapshot_at > after, PREDICTIONS.c.snapshot_at <= until)
        columns = ("customer_id", "score", "decision", "snapshot_at")
        others = PREDICTIONS.alias()
        earlier = self._select_earlier(others, model_version).where(
            others.c.snapshot_at == PREDICTIONS.c.snapshot_at,
            sa.tuple_(others.c.predicted_at, others.c.prediction_id)
            < sa.tuple_(PREDICTIONS.c.predicted_at, PREDICTIONS.c.prediction_id),
            sa.exists().where(OUTCOMES.c.prediction_id == others.c.prediction_id),
        )
        known = sa.exists().where(OUTCOMES.c.prediction_id == PREDICTIONS.c.prediction_id)
        picked = (*_pick(columns), select_first_outcome(), select_first_outcome("reported_by"))
        count, rows = self._draw(
            lambda drawn: drawn.with_only_columns(*picked).where(known, ~earlier.exists()),
            model_name,
            model_version,
            inside,
            rows_max,
        )
        records = [tuple(row) for row in rows]
        return Sample(pd.DataFrame.from_records(records, columns=[*columns, "outcome", "reported_by"]), count)

    def list_unlabelled_snapshots(self, model_name: str, *, until: dt.datetime) -> list[dt.datetime]:
        """Snapshots up to and including ``until`` of predictions without an outcome by the label rule."""
        query = sa.select(PREDICTIONS.c.snapshot_at).where(*_unlabelled(model_name), PREDICTIONS.c.snapshot_at <= until)
        with self.database.begin(write=False) as connection:
            return sorted(connection.scalars(query.distinct()))

    def read_unlabelled(self, model_name: str, snapshot: dt.datetime) -> Iterator[list[tuple[str, str]]]:
        """(prediction id, customer id) of a snapshot's predictions without an outcome by the label rule, in chunks."""
        query = sa.select(PREDICTIONS.c.prediction_id, PREDICTIONS.c.customer_id).where(
            *_unlabelled(model_name), PREDICTIONS.c.snapshot_at == snapshot
        )
        with self.database.begin(write=False) as connection:
            for rows in read_partitions(connection, query, CHUNK_ROWS)[1]:
                yield [(row.prediction_id, row.customer_id) for row in rows]

    def _answered(self, table: sa.FromClause, model_version: str) -> tuple[sa.ColumnElement[bool], ...]:
        of_version = (table.c.model_version == model_version, table.c.variant != "shadow", ~table.c.forced)
        return (*of_version, is_counted(table, sent_features=self._sent_features))

    def _select_earlier(self, others: sa.FromClause, model_version: str) -> sa.Select[Any]:
        """Predictions of the same customer; of several the first counts, so that each is drawn with the same chance."""
        # an expression that no index serves: by customer there are few rows, by time or snapshot there are all
        of_model = sa.func.lower(others.c.model_name) == sa.func.lower(PREDICTIONS.c.model_name)
        same = (others.c.customer_id == PREDICTIONS.c.customer_id, of_model)
        return sa.select(sa.literal(1)).select_from(others).where(*same, *self._answered(others, model_version))

    def _draw(
        self,
        keep: Callable[[sa.Select[Any]], sa.Select[Any]],
        model_name: str,
        model_version: str,
        inside: tuple[sa.ColumnElement[bool], ...],
        rows_max: int,
    ) -> tuple[int, Sequence[sa.Row[Any]]]:
        """How many predictions there are, and what is kept of those whose id is among the lowest.

        An id is random whatever it was given for, so that it is a fair lot; counting and drawing read an index alone.
        Where most that are drawn are of other versions, or of customers who were there before, more are drawn: at most
        16 times as many.
        """
        of_model = (PREDICTIONS.c.model_name == model_name, *inside)
        query = sa.select(PREDICTIONS).where(*of_model, *self._answered(PREDICTIONS, model_version))
        rows: Sequence[sa.Row[Any]] = ()
        with self.database.begin(write=False) as connection:
            count = connection.scalar(sa.select(sa.func.count()).select_from(PREDICTIONS).where(*of_model)) or 0
            for times in DRAWN_TIMES:
                drawn = query
                if is_part := count > rows_max * times:
                    drawn = query.where(PREDICTIONS.c.prediction_id < f"{int(rows_max * times / count * 16**8):08x}")
                rows = connection.execute(keep(drawn.order_by(PREDICTIONS.c.prediction_id))).all()
                if not is_part or len(rows) * DRAWN_TIMES[1] >= rows_max:
                    break
        return count, rows


def select_first_outcome(column: str = "outcome") -> sa.ScalarSelect[Any]:
    """A column of the outcome that counts for a prediction; None if none is known."""
    reports = OUTCOMES.alias()
    of_prediction = sa.select(reports.c[column]).where(reports.c.prediction_id == PREDICTIONS.c.prediction_id)
    return of_prediction.order_by(*order_outcomes(reports)).limit(1).scalar_subquery()


def _pick(columns: Sequence[str]) -> list[sa.Column[Any]]:
    return [PREDICTIONS.c[name] for name in columns]


def _unlabelled(model_name: str) -> tuple[sa.ColumnElement[bool], ...]:
    ruled = sa.exists().where(OUTCOMES.c.prediction_id == PREDICTIONS.c.prediction_id, is_ruled())
    return (
        PREDICTIONS.c.model_name == model_name,
        PREDICTIONS.c.variant != "shadow",
        PREDICTIONS.c.customer_id.is_not(None),
        ~ruled,
    )
