"""Monitoring checks and retrainings in the operations store, on SQLite or PostgreSQL."""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
from typing import Any, Literal

import sqlalchemy as sa

from closedloop.core.monitoring.verdict import Verdict
from closedloop.errors import ClosedloopError, DataError
from closedloop.records import digest_position
from closedloop.store.database import Database
from closedloop.store.migrations.tables import CHECKS, RETRAININGS

RetrainingState = Literal["requested", "running", "registered", "refused", "failed"]
OPEN_STATES: tuple[RetrainingState, ...] = ("requested", "running")
# running to running: a runner that was killed is taken over; failed to running: it is tried again
NEXT_STATES: dict[RetrainingState, tuple[RetrainingState, ...]] = {
    "requested": ("running",),
    "running": ("running", "registered", "refused", "failed"),
    "failed": ("running",),
    "registered": (),
    "refused": (),
}
TRIGGER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
TRIGGER_ID_RULE = "up to 128 letters, digits, dots, dashes and underscores, a letter or digit first"
VERSION = re.compile(r"[1-9][0-9]{0,17}")
MONITOR_LOCK = 0x6D6F6E69  # any number, as long as every release takes the same


class RetrainingChanged(ClosedloopError):
    """Another process moved the retraining on: read it again and decide again."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One pass of the monitor over the predictions made in [since, until), with the evidence for its verdict."""

    check_id: str
    model_name: str
    model_version: str
    as_of: dt.datetime
    since: dt.datetime
    until: dt.datetime
    predictions: int
    outcomes: int
    verdict: Verdict
    evidence: dict[str, Any]
    recorded_at: dt.datetime


@dataclasses.dataclass(frozen=True)
class Retraining:
    """One retraining: who asked for it and why, and what became of it.

    ``trigger_id`` is the check's id if the monitor asked. ``model_version`` is the registered challenger's,
    ``detail`` says why it was refused or failed, or which kind of model it made; both stay None until then.
    """

    trigger_id: str
    model_name: str
    requested_by: str
    reason: str
    as_of: dt.datetime
    updated_at: dt.datetime
    check_id: str | None = None
    data_start_date: dt.date | None = None
    data_end_date: dt.date | None = None
    state: RetrainingState = "requested"
    model_version: str | None = None
    detail: str | None = None


class Checks:
    """The checks of monitors, and the retrainings that followed."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def record_check(self, check: Check, retraining: Retraining | None = None) -> tuple[Check, Retraining | None]:
        """Store a check and the retraining that it asks for, in one transaction; returns both as they are stored.

        A model has one check at a moment: of monitors that run at once the first to write is recorded, and the
        others get what it wrote. No retraining is stored while another of this model is requested or running.
        """
        with self.database.begin() as connection:
            if self.database.dialect == "postgresql":  # SQLite's writers wait for each other anyway
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MONITOR_LOCK)))
            insert = self.database.insert_into(CHECKS).values(dataclasses.asdict(check))
            # as_of decides, since the id follows from it; another id would be another release's way to name it
            if connection.execute(insert.on_conflict_do_nothing()).rowcount and retraining is not None:
                open_ones = sa.select(RETRAININGS.c.trigger_id).where(
                    RETRAININGS.c.model_name == check.model_name, RETRAININGS.c.state.in_(OPEN_STATES)
                )
                if connection.execute(open_ones.limit(1)).first() is None:
                    connection.execute(self.database.insert_into(RETRAININGS).values(dataclasses.asdict(retraining)))
            same = sa.and_(CHECKS.c.model_name == check.model_name, CHECKS.c.as_of == check.as_of)
            stored = Check(**connection.execute(sa.select(CHECKS).where(same)).one()._mapping)
            caused = sa.select(RETRAININGS).where(RETRAININGS.c.check_id == stored.check_id)
            row = connection.execute(caused).first()
        return stored, None if row is None else _load_retraining(row)

    def list_checks(self, model_name: str, *, until: dt.datetime | None = None, limit: int = 100) -> list[Check]:
        """Checks with ``as_of`` up to and including ``until``, the newest first."""
        query = sa.select(CHECKS).where(CHECKS.c.model_name == model_name)
        if until is not None:
            query = query.where(CHECKS.c.as_of <= until)
        with self.database.begin(write=False) as connection:
            rows = connection.execute(query.order_by(CHECKS.c.as_of.desc()).limit(limit)).all()
        return [Check(**row._mapping) for row in rows]

    def request_retraining(self, retraining: Retraining) -> Retraining:
        """Store the request of a person or of CI; one with its trigger id that is there already is returned instead."""
        with self.database.begin() as connection:
            insert = self.database.insert_into(RETRAININGS).values(dataclasses.asdict(retraining))
            connection.execute(insert.on_conflict_do_nothing(index_elements=["trigger_id"]))
            return _read_retraining(connection, retraining.trigger_id)

    def read_retraining(self, trigger_id: str) -> Retraining:
        """The retraining with this trigger id.

        Raises
        ------
        DataError
            If there is none.
        """
        with self.database.begin(write=False) as connection:
            return _read_retraining(connection, trigger_id)

    def list_retrainings(
        self, model_name: str, *, until: dt.datetime | None = None, limit: int = 100
    ) -> list[Retraining]:
        """Retrainings with ``as_of`` up to and including ``until``, the newest first."""
        table = RETRAININGS
        query = sa.select(table).where(table.c.model_name == model_name)
        if until is not None:
            query = query.where(table.c.as_of <= until)
        with self.database.begin(write=False) as connection:
            ordered = query.order_by(table.c.as_of.desc(), table.c.updated_at.desc(), table.c.trigger_id)
            rows = connection.execute(ordered.limit(limit)).all()
        return [_load_retraining(row) for row in rows]

    def count_retrainings(self, model_name: str) -> dict[RetrainingState, int]:
        """How many retrainings of a model are in each state."""
        table = RETRAININGS.c
        query = sa.select(table.state, sa.func.count()).where(table.model_name == model_name).group_by(table.state)
        with self.database.begin(write=False) as connection:
            found: dict[str, int] = {row[0]: row[1] for row in connection.execute(query)}
        return {state: found.get(state, 0) for state in NEXT_STATES}

    def advance_retraining(
        self,
        retraining: Retraining,
        state: RetrainingState,
        *,
        now: dt.datetime,
        model_version: str | None = None,
        detail: str | None = None,
    ) -> Retraining:
        """Move a retraining from the state in which it was read to the next; returns it as it is stored.

        requested -> running -> registered, refused or failed; a failed one, and one whose runner was killed, may be
        set to running again. Of two that claim the same one succeeds.

        Raises
        ------
        RetrainingChanged
            If it was moved since it was read; nothing is written.
        DataError
            If ``state`` does not follow its state, or there is no such retraining.
        """
        if state not in NEXT_STATES[retraining.state]:
            allowed = ", ".join(NEXT_STATES[retraining.state]) or "nothing, it has ended"
            raise DataError(
                f"retraining {retraining.trigger_id} is {retraining.state}: found {state}, next is {allowed}"
            )
        table = RETRAININGS
        as_read = sa.and_(
            table.c.trigger_id == retraining.trigger_id,
            table.c.state == retraining.state,
            table.c.updated_at == retraining.updated_at,
        )
        # a clock that stands still, or goes back, must not let two claims pass for one
        at = max(now, retraining.updated_at + dt.timedelta(microseconds=1))
        values = {"state": state, "updated_at": at, "model_version": model_version, "detail": detail}
        with self.database.begin() as connection:
            written = connection.execute(sa.update(table).where(as_read).values(values)).rowcount
            stored = _read_retraining(connection, retraining.trigger_id)
        if written != 1:
            raise RetrainingChanged(
                f"{self.database.name}: retraining {retraining.trigger_id} is {stored.state} since "
                f"{stored.updated_at:%F %T}; it was {retraining.state} when it was read"
            )
        return stored


def name_check(model_name: str, as_of: dt.datetime) -> str:
    """The id of a model's check at a moment, and of the retraining that it causes: 32 hexadecimal digits."""
    return digest_position("check", model_name, as_of.astimezone(dt.UTC).isoformat())


def _load_retraining(row: sa.Row[Any]) -> Retraining:
    """A row as it is used: its ids become a run's name, folders, and words of a command.

    Raises
    ------
    DataError
        If one of them is none.
    """
    found = Retraining(**row._mapping)
    if not TRIGGER_ID.fullmatch(found.trigger_id):
        raise DataError(f"retraining {found.trigger_id!r}: a trigger id is {TRIGGER_ID_RULE}")
    if found.model_version is not None and not VERSION.fullmatch(found.model_version):
        raise DataError(f"retraining {found.trigger_id}: version {found.model_version!r} is no number of the registry")
    return found


def _read_retraining(connection: sa.Connection, trigger_id: str) -> Retraining:
    row = connection.execute(sa.select(RETRAININGS).where(RETRAININGS.c.trigger_id == trigger_id)).one_or_none()
    if row is None:
        raise DataError(f"retraining {trigger_id}: there is none with this trigger id")
    return _load_retraining(row)
