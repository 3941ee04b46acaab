"""The journal of releases: every move of what serves, in order, each entry hashed together with the one before."""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
from typing import Any

import msgspec
import sqlalchemy as sa

from closedloop.adapters.database import Database
from closedloop.adapters.store import Deployment
from closedloop.core.chain import Link, extend_chain
from closedloop.errors import ClosedloopError, DataError
from closedloop.migrations.tables import JOURNAL, RELEASE_PASSES

logger = logging.getLogger(__name__)


class JournalChanged(ClosedloopError):
    """Somebody else wrote the next entry first: read the journal again and decide again."""


class Rollout(msgspec.Struct, frozen=True):
    """A version on its way: ``step`` is one of `closedloop.core.rollout`, and began at ``step_at``.

    ``predecessor`` is whom it is compared with, since ``started_at``; ``errors_before`` is what was counted of errors
    before the step, by "version/variant" (None: the next pass reads it); ``reference_scores`` are those that the
    version was evaluated by, counted in bins. ``routed_at``: since when requests count, where that is not the step's
    beginning.
    """

    version: str
    predecessor: str
    step: str
    started_at: dt.datetime
    step_at: dt.datetime
    errors_before: dict[str, float] | None = {}
    reference_scores: tuple[int, ...] = ()
    routed_at: dt.datetime | None = None


class Entry(msgspec.Struct, frozen=True):
    """One move: ``row`` is what serves from here on, ``rollout`` what is still to be decided about it.

    ``rejected`` is the version that lost with this move and is not released again by itself; ``feature_service`` is
    the champion's.
    """

    action: str
    actor: str
    recorded_at: dt.datetime
    reason: str
    row: Deployment
    rollout: Rollout | None = None
    rejected: str | None = None
    feature_service: str | None = None
    evidence: dict[str, Any] = {}


class Journal(Database):
    """Append-only, one chain a model; what is in it says both what serves and where a rollout stands."""

    def append(self, model_name: str, entry: Entry, *, after: Link | None) -> Link:
        """Write the entry that follows ``after`` (None: the first).

        Raises
        ------
        JournalChanged
            If another entry stands there by now; nothing is written.
        """
        text = msgspec.json.encode(entry, order="sorted").decode()
        link = extend_chain(model_name, after, text)
        with self._begin() as connection:
            values = dataclasses.asdict(link)
            written = connection.execute(self._insert_into(JOURNAL).values(values).on_conflict_do_nothing()).rowcount
        if written != 1:
            raise JournalChanged(
                f"{self.name}: the journal of {model_name} has an entry {link.sequence} by now; "
                "somebody else released at the same time: read it and decide again"
            )
        # with the registry's tag, what a cut tail is seen by
        logger.info("journal entry %d of %s: %s, hash %s", link.sequence, model_name, entry.action, link.hash)
        return link

    def read(self, model_name: str, *, newest: int | None = None) -> list[Link]:
        """All entries of a model, or so many of the newest; the oldest first."""
        query = sa.select(JOURNAL).where(JOURNAL.c.model_name == model_name).order_by(JOURNAL.c.sequence.desc())
        with self._begin(write=False) as connection:
            return [Link(**row._mapping) for row in connection.execute(query.limit(newest))][::-1]

    def read_head(self, model_name: str) -> Link | None:
        """The newest entry, or None."""
        query = sa.select(JOURNAL).where(JOURNAL.c.model_name == model_name).order_by(JOURNAL.c.sequence.desc())
        with self._begin(write=False) as connection:
            row = connection.execute(query.limit(1)).one_or_none()
        return None if row is None else Link(**row._mapping)

    def note_pass(self, model_name: str, passed_at: dt.datetime) -> None:
        """Keep when a pass of the controller was last done, beside the entries: most passes move nothing."""
        insert = self._insert_into(RELEASE_PASSES).values(model_name=model_name, passed_at=passed_at)
        newest = insert.on_conflict_do_update(index_elements=["model_name"], set_={"passed_at": passed_at})
        with self._begin() as connection:
            connection.execute(newest)

    def read_pass(self, model_name: str) -> dt.datetime | None:
        """When a pass was last done, or None."""
        query = sa.select(RELEASE_PASSES.c.passed_at).filter_by(model_name=model_name)
        with self._begin(write=False) as connection:
            return connection.scalar(query)


def read_entry(link: Link) -> Entry:
    """What an entry says.

    Raises
    ------
    DataError
        If it is not what `Journal.append` writes.
    """
    try:
        return msgspec.json.decode(link.entry, type=Entry)
    except msgspec.MsgspecError as error:
        raise DataError(f"journal of {link.model_name}, entry {link.sequence}: {error}") from error
