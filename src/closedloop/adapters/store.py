"""The operations store in SQLAlchemy: predictions, outcomes and the deployment row, on SQLite or PostgreSQL."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
import sqlalchemy as sa

from closedloop.adapters.database import Database, describe_cause, is_fault_of_row
from closedloop.errors import ClosedloopError, ServiceUnavailable
from closedloop.migrations.tables import DEPLOYMENTS, OUTCOMES, PREDICTIONS, SPOOL_POSITIONS
from closedloop.records import Outcome, Prediction, Record

if TYPE_CHECKING:
    import pandas as pd

Item = TypeVar("Item")
CHUNK_ROWS = 5_000
# Erased bytes: SQLite's secure_delete misses copies that page splits left behind, PostgreSQL's column statistics
# quote values.
SCRUB = {"sqlite": "VACUUM", "postgresql": "VACUUM (ANALYZE) predictions, outcomes"}
PREDICTION_COLUMNS = [PREDICTIONS.c[name] for name in Prediction.__struct_fields__]
OUTCOME_COLUMNS = {
    PREDICTIONS.c.prediction_id: "str",
    PREDICTIONS.c.customer_id: "object",
    PREDICTIONS.c.snapshot_at: "datetime64[us, UTC]",
    PREDICTIONS.c.predicted_at: "datetime64[us, UTC]",
    PREDICTIONS.c.model_version: "str",
    PREDICTIONS.c.variant: "str",
    PREDICTIONS.c.source: "str",
    PREDICTIONS.c.forced: "bool",
    PREDICTIONS.c.score: "float64",
    PREDICTIONS.c.decision: "int64",
    OUTCOMES.c.outcome: "int64",
    OUTCOMES.c.reported_at: "datetime64[us, UTC]",
}


class DeploymentChanged(ClosedloopError):
    """Somebody else wrote the deployment row first: read it again and decide again."""


@dataclasses.dataclass(frozen=True)
class SpoolPosition:
    """How far a spool has been read: all before ``offset`` (bytes) of ``segment`` is in the store."""

    model_name: str
    spool: str
    segment: int
    offset: int


@dataclasses.dataclass(frozen=True)
class InsertResult:
    """How many records were stored, how many were there already, and (prediction id, reason) of those refused."""

    predictions: int
    outcomes: int
    duplicates: int
    refused: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Removed:
    """How many rows are gone."""

    predictions: int
    outcomes: int


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What serves: ``weight`` is the challenger's share of answers (0 to 1), ``salt`` deals customers to variants."""

    model_name: str
    revision: int
    champion_version: str
    salt: str
    updated_at: dt.datetime
    challenger_version: str | None = None
    challenger_mode: Literal["shadow", "canary"] | None = None
    weight: float = 0.0


class Store(Database):
    """The operations tables: what was predicted, what happened, what serves, and how far spools have been read."""

    def insert(self, records: Sequence[Record], position: SpoolPosition | None = None) -> InsertResult:
        """Store records and how far their spool has been read, in one transaction.

        A record that is there already is not doubled, so that a batch may be sent again. Refused are outcomes of
        predictions that are not here, and rows that the database cannot hold. Of several outcomes of a prediction
        the first to be reported counts. After an error nothing tells whether the transaction was committed: start again
        from `read_position`.
        """
        predictions = [_describe_prediction(record) for record in records if isinstance(record, Prediction)]
        outcomes = [msgspec.structs.asdict(record) for record in records if isinstance(record, Outcome)]
        refused: list[tuple[str, str]] = []
        with self._begin() as connection:
            predictions_stored = sum(
                self._insert_rows(connection, PREDICTIONS, some, refused) for some in _split(predictions)
            )
            known = _find_predictions(connection, {row["prediction_id"] for row in outcomes})
            of_known = [row for row in outcomes if row["prediction_id"] in known]
            strange = [row["prediction_id"] for row in outcomes if row["prediction_id"] not in known]
            refused += [(prediction_id, "no such prediction") for prediction_id in strange]
            outcomes_stored = sum(self._insert_rows(connection, OUTCOMES, some, refused) for some in _split(of_known))
            if position is not None:
                self._write_position(connection, position)
        duplicates = len(predictions) + len(outcomes) - predictions_stored - outcomes_stored - len(refused)
        return InsertResult(predictions_stored, outcomes_stored, duplicates, tuple(refused))

    def read_position(self, model_name: str, spool: str) -> SpoolPosition | None:
        """How far a spool has been read; None if nothing of it ever was."""
        found = self._find_row(SPOOL_POSITIONS, model_name=model_name, spool=spool)
        return None if found is None else SpoolPosition(**found)

    def read_deployment(self, model_name: str) -> Deployment | None:
        """The deployment row of a model; None before its first release."""
        found = self._find_row(DEPLOYMENTS, model_name=model_name)
        return None if found is None else Deployment(**found)

    def _find_row(self, table: sa.Table, **key: str) -> dict[str, Any] | None:
        with self._begin(write=False) as connection:
            row = connection.execute(sa.select(table).filter_by(**key)).one_or_none()
        return None if row is None else dict(row._mapping)

    def write_deployment(self, deployment: Deployment, expected_revision: int) -> Deployment:
        """Replace the row that was read with ``expected_revision`` (0: there was none); returns it as it is stored.

        Its revision is the next one, whatever ``deployment`` says.

        Raises
        ------
        DeploymentChanged
            If the row has another revision by now; nothing is written.
        DataError
            If the weight is not a share, or a challenger has no mode or the mode no challenger.
        """
        stored = dataclasses.replace(deployment, revision=expected_revision + 1)
        table, values = DEPLOYMENTS, dataclasses.asdict(stored)
        at_expected = sa.and_(table.c.model_name == stored.model_name, table.c.revision == expected_revision)
        with self._begin() as connection:
            if expected_revision == 0:
                written = connection.execute(self._insert_into(table).values(values).on_conflict_do_nothing()).rowcount
            else:
                written = connection.execute(sa.update(table).where(at_expected).values(values)).rowcount
        if written != 1:
            raise DeploymentChanged(
                f"{self.name}: the deployment of {stored.model_name} is no longer at revision {expected_revision}; "
                "somebody else changed it: read it and decide again"
            )
        return stored

    def list_outcomes(
        self,
        model_name: str,
        *,
        as_of: dt.datetime,
        horizon_days: int,
        include_shadow: bool = False,
        versions: Collection[str] | None = None,
    ) -> pd.DataFrame:
        """Scored customers of whom it is known by ``as_of`` what happened; None: by all versions.

        The horizon counts from the snapshot, which is the UTC midnight before the prediction where it had none; an
        outcome reported earlier waits for its end. Customer, snapshot and version give one row: the outcome that
        was reported first, since spools are drained in any order. A shadow's outcome is that of the prediction which
        was answered in its place.

        Returns
        -------
        DataFrame
            With the columns ``prediction_id``, ``customer_id`` (None for a row without), ``snapshot_at``,
            ``predicted_at``, ``model_version``, ``variant``, ``source``, ``forced``, ``score``, ``decision``,
            ``outcome`` (1 churned, 0 stayed) and ``reported_at``; in the order of ``predicted_at``.
        """
        import pandas as pd

        closed = _select_outcomes().where(
            PREDICTIONS.c.model_name == model_name,
            PREDICTIONS.c.snapshot_at <= as_of - dt.timedelta(days=horizon_days),
            ~PREDICTIONS.c.forced,
        )
        if not include_shadow:
            closed = closed.where(PREDICTIONS.c.variant != "shadow")
        if versions is not None:
            closed = closed.where(PREDICTIONS.c.model_version.in_(versions))
        found = closed.subquery()
        columns = {column.name: kind for column, kind in OUTCOME_COLUMNS.items()}
        query = sa.select(*[found.c[name] for name in columns]).where(found.c.place == 1)
        with self._begin(write=False) as connection:
            rows = pd.read_sql_query(query.order_by(found.c.predicted_at, found.c.prediction_id), connection)
        return rows.astype(columns)

    def read_predictions(
        self,
        model_name: str,
        *,
        ids: Collection[str] | None = None,
        since: dt.datetime | None = None,
        until: dt.datetime | None = None,
    ) -> Iterator[list[Prediction]]:
        """Predictions in chunks of at most 5,000: those with these ids, and made in [since, until).

        Without ids they come in the order of ``predicted_at``.
        """
        table = PREDICTIONS
        query = sa.select(*PREDICTION_COLUMNS).where(table.c.model_name == model_name)
        if since is not None:
            query = query.where(table.c.predicted_at >= since)
        if until is not None:
            query = query.where(table.c.predicted_at < until)
        queries = [query.order_by(table.c.predicted_at, table.c.prediction_id)]
        if ids is not None:
            queries = [query.where(table.c.prediction_id.in_(some)) for some in _split(list(ids))]
        for one in queries:
            with self._begin(write=False) as connection:
                streamed = connection.execution_options(yield_per=CHUNK_ROWS).execute(one)
                for rows in streamed.partitions():
                    yield [Prediction(*row) for row in rows]

    def purge(self, model_name: str, *, keep_days: int, as_of: dt.datetime) -> Removed:
        """Delete predictions made more than ``keep_days`` before ``as_of``, with their outcomes.

        See `erase` for what is left of them.
        """
        old = PREDICTIONS.c.predicted_at < as_of - dt.timedelta(days=keep_days)
        return self._delete(sa.and_(old, PREDICTIONS.c.model_name == model_name))

    def erase(self, customer_id: str) -> Removed:
        """Delete a customer's predictions and outcomes, of all models.

        On SQLite the file and its log are rewritten, so that no byte is left. On PostgreSQL rows and column
        statistics are gone; its write-ahead log, archives and backups hold them until they are rotated. A spool
        that was not drained yet may bring rows back: erase again after it is.

        Raises
        ------
        ServiceUnavailable
            Also if the rows are gone, but another process keeps the file from being rewritten: run it again.
        """
        return self._delete(PREDICTIONS.c.customer_id == customer_id)

    def _delete(self, chosen: sa.ColumnElement[bool]) -> Removed:
        ids = sa.select(PREDICTIONS.c.prediction_id).where(chosen)
        with self._begin() as connection:
            outcomes = connection.execute(sa.delete(OUTCOMES).where(OUTCOMES.c.prediction_id.in_(ids))).rowcount
            predictions = connection.execute(sa.delete(PREDICTIONS).where(chosen)).rowcount
        try:
            self._scrub()
        except ServiceUnavailable as error:
            message = f"{error}; the rows are deleted, but traces of them are left in the database: run it again"
            raise ServiceUnavailable(message) from None
        return Removed(predictions, outcomes)

    def _scrub(self) -> None:
        with self._explain_errors(), self._connect(None) as connection:
            connection.execute(sa.text(SCRUB[self._dialect]))
            if self._dialect == "sqlite":
                busy = connection.execute(sa.text("PRAGMA wal_checkpoint(TRUNCATE)")).scalar_one()
                if busy:
                    raise ServiceUnavailable(f"{self.name}: its write-ahead log is in use by another process")

    def _insert_rows(
        self, connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]], refused: list[tuple[str, str]]
    ) -> int:
        """Insert, and return how many were not there before; what the database cannot hold is found by halving."""
        try:
            with connection.begin_nested():
                return self._insert_new(connection, table, rows)
        except (sa.exc.StatementError, ValueError) as error:
            if not is_fault_of_row(error):
                raise
            if len(rows) == 1:
                refused.append((rows[0]["prediction_id"], describe_cause(error)))
                return 0
        middle = len(rows) // 2
        return sum(self._insert_rows(connection, table, half, refused) for half in (rows[:middle], rows[middle:]))

    def _write_position(self, connection: sa.Connection, position: SpoolPosition) -> None:
        values = {"segment": position.segment, "offset": position.offset}
        insert = self._insert_into(SPOOL_POSITIONS).values(dataclasses.asdict(position))
        connection.execute(insert.on_conflict_do_update(index_elements=["model_name", "spool"], set_=values))


def _describe_prediction(record: Prediction) -> dict[str, Any]:
    midnight = record.predicted_at.astimezone(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return {**msgspec.structs.asdict(record), "snapshot_at": record.features_as_of or midnight}


def _select_outcomes() -> sa.Select[Any]:
    """Predictions with each outcome of theirs, and its place among those of customer, snapshot and version."""
    table = PREDICTIONS.c
    place = sa.func.row_number().over(
        partition_by=(sa.func.coalesce(table.customer_id, table.prediction_id), table.snapshot_at, table.model_version),
        order_by=(OUTCOMES.c.reported_at, OUTCOMES.c.sequence, table.prediction_id),
    )
    answered = sa.func.coalesce(table.answered_id, table.prediction_id)
    return sa.select(*OUTCOME_COLUMNS, place.label("place")).join(OUTCOMES, OUTCOMES.c.prediction_id == answered)


def _find_predictions(connection: sa.Connection, ids: set[str]) -> set[str]:
    column = PREDICTIONS.c.prediction_id
    return {
        known for some in _split(list(ids)) for known in connection.scalars(sa.select(column).where(column.in_(some)))
    }


def _split(items: list[Item]) -> list[list[Item]]:
    """Parts that a statement can take as parameters."""
    return [items[start : start + CHUNK_ROWS] for start in range(0, len(items), CHUNK_ROWS)]
