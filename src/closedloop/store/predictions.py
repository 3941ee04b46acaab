"""Predictions, their outcomes, and how far each spool has been read, in the operations store."""

from __future__ import annotations

import dataclasses
import datetime as dt
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import sqlalchemy as sa

from closedloop.adapters.sqlalchemy import describe_cause, is_fault_of_row, read_partitions
from closedloop.core.actions.untreated import find_untreated
from closedloop.errors import ServiceUnavailable
from closedloop.records import Outcome, Prediction, Record
from closedloop.rules import find_code
from closedloop.store.actions import Actions
from closedloop.store.counted import is_counted, order_outcomes
from closedloop.store.database import Database
from closedloop.store.migrations.tables import ACTIONS, OUTCOMES, PREDICTIONS, SPOOL_POSITIONS

if TYPE_CHECKING:
    import pandas as pd

Item = TypeVar("Item")
CHUNK_ROWS = 5_000
# Erased bytes: SQLite's secure_delete misses copies that page splits left behind, PostgreSQL's column statistics
# quote values. Its parallel workers would take more shared memory than a container has (/dev/shm, 64 MB).
SCRUB = {"sqlite": "VACUUM", "postgresql": "VACUUM (ANALYZE, PARALLEL 0) predictions, outcomes, actions"}
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
    OUTCOMES.c.reported_by: "object",
}


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
    """How many rows are gone; ``left`` says what is still to be done, where traces of them are left in the database."""

    predictions: int
    outcomes: int
    left: str = ""
    actions: int = 0


class Predictions:
    """Predictions, outcomes, and how far spools have been read."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def insert(
        self,
        records: Sequence[Record],
        position: SpoolPosition | None = None,
        *,
        before_commit: Callable[[InsertResult], None] = lambda _: None,
    ) -> InsertResult:
        """Store records and how far their spool has been read, in one transaction.

        A record that is there already is not doubled, so that a batch may be sent again. Rows that the database cannot
        hold are refused. An outcome may come before its prediction: no query sees it until that is here. Of several
        outcomes of a prediction the first to be reported counts. After an error nothing tells whether the transaction
        was committed: start again from `read_position`.

        Parameters
        ----------
        before_commit
            Called with the result once all is inserted: what it keeps of the refused is safe before the position
            leaves them behind.
        """
        predictions = [_describe_prediction(record) for record in records if isinstance(record, Prediction)]
        outcomes = [msgspec.structs.asdict(record) for record in records if isinstance(record, Outcome)]
        refused: list[tuple[str, str]] = []
        with self.database.begin() as connection:
            predictions_stored = sum(
                self._insert_rows(connection, PREDICTIONS, some, refused) for some in _split(predictions)
            )
            outcomes_stored = sum(self._insert_rows(connection, OUTCOMES, some, refused) for some in _split(outcomes))
            duplicates = len(predictions) + len(outcomes) - predictions_stored - outcomes_stored - len(refused)
            result = InsertResult(predictions_stored, outcomes_stored, duplicates, tuple(refused))
            if position is not None:
                self._write_position(connection, position)
            before_commit(result)
        return result

    def read_position(self, model_name: str, spool: str) -> SpoolPosition | None:
        """How far a spool has been read; None if nothing of it ever was."""
        query = sa.select(SPOOL_POSITIONS).filter_by(model_name=model_name, spool=spool)
        with self.database.begin(write=False) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else SpoolPosition(**row._mapping)

    def list_outcomes(
        self,
        model_name: str,
        *,
        as_of: dt.datetime,
        horizon_days: int,
        include_shadow: bool = False,
        versions: Collection[str] | None = None,
        sent_features: bool = True,
        untreated: bool = False,
    ) -> pd.DataFrame:
        """Scored customers of whom it is known by ``as_of`` what happened; None: by all versions.

        The horizon counts from the snapshot, which is the UTC midnight before the prediction where it had none; an
        outcome reported earlier waits for its end. Customer, snapshot and version give one row: the label rule's
        outcome, else the one that was reported first. A shadow's outcome is that of the prediction which was answered
        in its place. ``sent_features``: whether requests that carried their features count. ``untreated``: leave out
        customers who were treated in a campaign; nobody stands for them.

        Returns
        -------
        DataFrame
            With the columns ``prediction_id``, ``customer_id`` (None for a row without), ``snapshot_at``,
            ``predicted_at``, ``model_version``, ``variant``, ``source``, ``forced``, ``score``, ``decision``,
            ``outcome`` (1 churned, 0 stayed), ``reported_at`` and ``reported_by``; in the order of ``predicted_at``.
        """
        import pandas as pd

        closed = _select_outcomes().where(
            PREDICTIONS.c.model_name == model_name,
            PREDICTIONS.c.snapshot_at <= as_of - dt.timedelta(days=horizon_days),
            ~PREDICTIONS.c.forced,
            is_counted(sent_features=sent_features),
        )
        if not include_shadow:
            closed = closed.where(PREDICTIONS.c.variant != "shadow")
        if versions is not None:
            closed = closed.where(PREDICTIONS.c.model_version.in_(versions))
        found = closed.subquery()
        columns = {column.name: kind for column, kind in OUTCOME_COLUMNS.items()}
        query = sa.select(*[found.c[name] for name in columns]).where(found.c.place == 1)
        with self.database.begin(write=False) as connection:
            rows = pd.read_sql_query(query.order_by(found.c.predicted_at, found.c.prediction_id), connection)
        rows = rows.astype(columns)
        return self._leave_treated(model_name, rows) if untreated and len(rows) else rows

    def _leave_treated(self, model_name: str, rows: pd.DataFrame) -> pd.DataFrame:
        since, until = rows["snapshot_at"].min(), rows["snapshot_at"].max()
        who = set(rows["customer_id"].dropna())
        actions = Actions(self.database).read_touching(model_name, since=since, until=until, customers=who)
        repeats = find_untreated(rows, actions, time="snapshot_at", blind=False).repeats
        return rows[repeats > 0].reset_index(drop=True)

    def read_predictions(
        self,
        model_name: str,
        *,
        ids: Collection[str] | None = None,
        since: dt.datetime | None = None,
    ) -> Iterator[list[Prediction]]:
        """Predictions in chunks of at most 5,000: those with these ids, and made since a time.

        Without ids they come in the order of ``predicted_at``.
        """
        table = PREDICTIONS
        query = sa.select(*PREDICTION_COLUMNS).where(table.c.model_name == model_name)
        if since is not None:
            query = query.where(table.c.predicted_at >= since)
        queries = [query.order_by(table.c.predicted_at, table.c.prediction_id)]
        if ids is not None:
            queries = [query.where(table.c.prediction_id.in_(some)) for some in _split(list(ids))]
        for one in queries:
            with self.database.begin(write=False) as connection:
                for rows in read_partitions(connection, one, CHUNK_ROWS)[1]:
                    yield [Prediction(*row) for row in rows]

    def purge(self, model_name: str, *, keep_days: int, as_of: dt.datetime) -> Removed:
        """Delete predictions made more than ``keep_days`` before ``as_of``, with their outcomes.

        Outcomes as old as that whose prediction never came go too, of whatever model. See `erase` for what is left.
        """
        since = as_of - dt.timedelta(days=keep_days)
        known = sa.exists().where(PREDICTIONS.c.prediction_id == OUTCOMES.c.prediction_id)
        old = sa.and_(PREDICTIONS.c.predicted_at < since, PREDICTIONS.c.model_name == model_name)
        return self._delete(old, sa.and_(OUTCOMES.c.reported_at < since, ~known))

    def erase(self, customer_id: str) -> Removed:
        """Delete a customer's predictions, outcomes and actions, of all models, under each spelling of the id.

        On SQLite the file and its log are rewritten, so that no byte is left. On PostgreSQL rows and column
        statistics are gone; its write-ahead log, archives and backups hold them until they are rotated. A spool
        that was not drained yet may bring rows back: erase again after it is. Where another process keeps the
        database from being rewritten, the rows are gone all the same, and ``left`` says to run it again.
        """
        spelt = list_spellings(customer_id)
        return self._delete(PREDICTIONS.c.customer_id.in_(spelt), acted_on=spelt)

    def _delete(
        self, chosen: sa.ColumnElement[bool], *others: sa.ColumnElement[bool], acted_on: Sequence[str] = ()
    ) -> Removed:
        """Delete predictions with their outcomes, ``others`` among the outcomes, and these customers' actions."""
        ids = sa.select(PREDICTIONS.c.prediction_id).where(chosen)
        doomed = sa.or_(OUTCOMES.c.prediction_id.in_(ids), *others)
        with self.database.begin() as connection:
            outcomes = connection.execute(sa.delete(OUTCOMES).where(doomed)).rowcount
            predictions = connection.execute(sa.delete(PREDICTIONS).where(chosen)).rowcount
            actions = connection.execute(sa.delete(ACTIONS).where(ACTIONS.c.customer_id.in_(acted_on))).rowcount
        try:
            self._scrub()
        except ServiceUnavailable as error:
            left = f"{error}; the rows are deleted, but traces of them are left in the database: run it again"
            return Removed(predictions, outcomes, left, actions)
        return Removed(predictions, outcomes, actions=actions)

    def _scrub(self) -> None:
        with self.database.explain_errors(), self.database.connect(None) as connection:
            connection.execute(sa.text(SCRUB[self.database.dialect]))
            if self.database.dialect == "sqlite":
                busy = connection.execute(sa.text("PRAGMA wal_checkpoint(TRUNCATE)")).scalar_one()
                if busy:
                    raise ServiceUnavailable(f"{self.database.name}: its write-ahead log is in use by another process")

    def _insert_rows(
        self, connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]], refused: list[tuple[str, str]]
    ) -> int:
        """Insert, and return how many were not there before; what the database cannot hold is found by halving."""
        try:
            with connection.begin_nested():
                return self.database.insert_new(connection, table, rows)
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
        insert = self.database.insert_into(SPOOL_POSITIONS).values(dataclasses.asdict(position))
        connection.execute(insert.on_conflict_do_update(index_elements=["model_name", "spool"], set_=values))


def _describe_prediction(record: Prediction) -> dict[str, Any]:
    midnight = record.predicted_at.astimezone(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return {**msgspec.structs.asdict(record), "snapshot_at": record.features_as_of or midnight}


def _select_outcomes() -> sa.Select[Any]:
    """Predictions with each outcome of theirs, and its place among those of customer, snapshot and version."""
    table = PREDICTIONS.c
    place = sa.func.row_number().over(
        partition_by=(sa.func.coalesce(table.customer_id, table.prediction_id), table.snapshot_at, table.model_version),
        order_by=(*order_outcomes(), table.prediction_id),
    )
    answered = sa.func.coalesce(table.answered_id, table.prediction_id)
    return sa.select(*OUTCOME_COLUMNS, place.label("place")).join(OUTCOMES, OUTCOMES.c.prediction_id == answered)


def list_spellings(customer_id: str) -> tuple[str, ...]:
    """How a customer's id may have been written: as given, ``1``, and as in rows from before ids had one form.

    Those are ``1.0``, and a letter and its mark as two characters.

    >>> list_spellings("1.0")
    ('1', '1.0')
    >>> list_spellings("A1")
    ('A1',)
    """
    code = find_code(customer_id) or customer_id
    as_float = f"{code}.0" if find_code(f"{code}.0") == code else code
    return tuple(dict.fromkeys((code, as_float, unicodedata.normalize("NFD", code), customer_id)))


def _split(items: list[Item]) -> list[list[Item]]:
    """Parts that a statement can take as parameters."""
    return [items[start : start + CHUNK_ROWS] for start in range(0, len(items), CHUNK_ROWS)]
