"""Monitoring checks and retrainings in the operations store, on SQLite or PostgreSQL."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Any, Literal

import sqlalchemy as sa

from closedloop.adapters.database import Database
from closedloop.errors import ClosedloopError, DataError
from closedloop.migrations.tables import CHECKS, RETRAININGS
from closedloop.records import digest_position

Verdict = Literal["none", "watch", "alert", "retrain"]
State = Literal["requested", "running", "registered", "refused", "failed"]
OPEN_STATES: tuple[State, ...] = ("requested", "running")
# running to running: a runner that was killed is taken over; failed to running: it is tried again
NEXT_STATES: dict[State, tuple[State, ...]] = {
    "requested": ("running",),
    "running": ("running", "registered", "refused", "failed"),
    "failed": ("running",),
    "registered": (),
    "refused": (),
}
MONITOR_LOCK = 0x6D6F6E69  # any number, as long as every release takes the same


class RetrainingChanged(ClosedloopError):
    """Somebody else moved the retraining on: read it again and decide again."""


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
    ``detail`` says why it was refused or failed; both stay None until then.
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
    state: State = "requested"
    model_version: str | None = None
    detail: str | None = None


class Checks(Database):
    """What monitors found, and the retrainings that followed."""

    def record_check(self, check: Check, retraining: Retraining | None = None) -> tuple[Check, Retraining | None]:
        """Store a check and the retraining that it asks for, in one transaction; returns both as they are stored.

        A model has one check at a moment: of monitors that run at once the first to write is recorded, and the
        others get what it wrote. No retraining is stored while another of this model is requested or running.
        """
        with self._begin() as connection:
            if self._dialect == "postgresql":  # SQLite's writers wait for each other anyway
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MONITOR_LOCK)))
            insert = self._insert_into(CHECKS).values(dataclasses.asdict(check))
            # as_of decides, since the id follows from it; another id would be another release's way to name it
            if connection.execute(insert.on_conflict_do_nothing()).rowcount and retraining is not None:
                open_ones = sa.select(RETRAININGS.c.trigger_id).where(
                    RETRAININGS.c.model_name == check.model_name, RETRAININGS.c.state.in_(OPEN_STATES)
                )
                if connection.execute(open_ones.limit(1)).first() is None:
                    connection.execute(self._insert_into(RETRAININGS).values(dataclasses.asdict(retraining)))
            same = sa.and_(CHECKS.c.model_name == check.model_name, CHECKS.c.as_of == check.as_of)
            stored = Check(**connection.execute(sa.select(CHECKS).where(same)).one()._mapping)
            caused = sa.select(RETRAININGS).where(RETRAININGS.c.check_id == stored.check_id)
            row = connection.execute(caused).first()
        return stored, None if row is None else Retraining(**row._mapping)

    def list_checks(self, model_name: str, *, until: dt.datetime | None = None, limit: int = 100) -> list[Check]:
        """Checks with ``as_of`` up to and including ``until``, the newest first."""
        query = sa.select(CHECKS).where(CHECKS.c.model_name == model_name)
        if until is not None:
            query = query.where(CHECKS.c.as_of <= until)
        with self._begin(write=False) as connection:
            rows = connection.execute(query.order_by(CHECKS.c.as_of.desc()).limit(limit)).all()
        return [Check(**row._mapping) for row in rows]

    def read_judged_at(self, model_name: str, version: str) -> dt.datetime | None:
        """When the newest check of a version was recorded whose window had enough rows to judge; None: never."""
        own = (CHECKS.c.model_name == model_name, CHECKS.c.model_version == version)
        judged = CHECKS.c.evidence["drift"].as_string().is_not(None)
        query = sa.select(CHECKS.c.recorded_at).where(*own, judged).order_by(CHECKS.c.as_of.desc()).limit(1)
        with self._begin(write=False) as connection:
            found: dt.datetime | None = connection.execute(query).scalar()
        return found

    def request_retraining(self, retraining: Retraining) -> Retraining:
        """Store the request of a person or of CI; one with its trigger id that is there already is returned instead."""
        with self._begin() as connection:
            insert = self._insert_into(RETRAININGS).values(dataclasses.asdict(retraining))
            connection.execute(insert.on_conflict_do_nothing(index_elements=["trigger_id"]))
            return _read_retraining(connection, retraining.trigger_id)

    def read_retraining(self, trigger_id: str) -> Retraining:
        """The retraining with this trigger id.

        Raises
        ------
        DataError
            If there is none.
        """
        with self._begin(write=False) as connection:
            return _read_retraining(connection, trigger_id)

    def list_retrainings(
        self, model_name: str, *, until: dt.datetime | None = None, limit: int = 100
    ) -> list[Retraining]:
        """Retrainings with ``as_of`` up to and including ``until``, the newest first."""
        table = RETRAININGS
        query = sa.select(table).where(table.c.model_name == model_name)
        if until is not None:
            query = query.where(table.c.as_of <= until)
        with self._begin(write=False) as connection:
            ordered = query.order_by(table.c.as_of.desc(), table.c.updated_at.desc(), table.c.trigger_id)
            rows = connection.execute(ordered.limit(limit)).all()
        return [Retraining(**row._mapping) for row in rows]

    def count_retrainings(self, model_name: str) -> dict[State, int]:
        """How many retrainings of a model are in each state."""
        table = RETRAININGS.c
        query = sa.select(table.state, sa.func.count()).where(table.model_name == model_name).group_by(table.state)
        with self._begin(write=False) as connection:
            found: dict[str, int] = {row[0]: row[1] for row in connection.execute(query)}
        return {state: found.get(state, 0) for state in NEXT_STATES}

    def advance_retraining(
        self,
        retraining: Retraining,
        state: State,
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
        with self._begin() as connection:
            written = connection.execute(sa.update(table).where(as_read).values(values)).rowcount
            stored = _read_retraining(connection, retraining.trigger_id)
        if written != 1:
            raise RetrainingChanged(
                f"{self.name}: retraining {retraining.trigger_id} is {stored.state} since {stored.updated_at:%F %T}; "
                f"it was {retraining.state} when it was read"
            )
        return stored


def name_check(model_name: str, as_of: dt.datetime) -> str:
    """The id of a model's check at a moment, and of the retraining that it causes: 32 hexadecimal digits."""
    return digest_position("check", model_name, as_of.astimezone(dt.UTC).isoformat())


def _read_retraining(connection: sa.Connection, trigger_id: str) -> Retraining:
    row = connection.execute(sa.select(RETRAININGS).where(RETRAININGS.c.trigger_id == trigger_id)).one_or_none()
    if row is None:
        raise DataError(f"retraining {trigger_id}: there is none with this trigger id")
    return Retraining(**row._mapping)
