"""The journal of releases and the deployment row: every move of what serves, in order, each with the row it writes."""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from closedloop.core.release.entries import Deployment, Entry
from closedloop.core.release.hash_chain import Link, check_link, extend_chain
from closedloop.errors import ClosedloopError, ConfigError, DataError
from closedloop.store.database import Database
from closedloop.store.migrations.tables import DEPLOYMENTS, JOURNAL, RELEASE_PASSES

logger = logging.getLogger(__name__)


class JournalChanged(ClosedloopError):
    """Another process moved first: read the journal again and decide again."""


class Journal:
    """Append-only, one chain a model; its newest entry says what serves and where a rollout stands.

    The deployment row, which the service follows, is written with the entry in one transaction: neither is ever there
    without the other.

    Parameters
    ----------
    database
        The operations store's.
    keys
        Those that entries are signed with, the newest first: the first one signs. Without any, nothing that is read
        proves that no other process wrote it.
    """

    def __init__(self, database: Database, keys: Sequence[bytes] = ()) -> None:
        self.database, self.keys = database, tuple(keys)

    def append_entry(self, entry: Entry, *, after: Link | None) -> Link:
        """Write the entry that follows ``after`` (None: the first), and its row.

        Raises
        ------
        JournalChanged
            If another entry stands there by now, or another row; nothing is written.
        ConfigError
            If the journal is signed, and there is no key here.
        DataError
            If the row makes no sense: a version that is no number, a weight that is no share, or a challenger without
            a mode.
        """
        name, text = entry.row.model_name, msgspec.json.encode(entry, order="sorted").decode()
        if after is not None and after.key_name is not None and not self.keys:
            raise ConfigError(
                f"the journal of {name} is signed: set CLOSEDLOOP_RELEASE__JOURNAL_KEY, without which no move is made"
            )
        link = extend_chain(name, after, text, self.keys)
        row = msgspec.structs.asdict(read_entry(link).row)  # as whoever reads it checks it
        del row["digests"]
        insert = self.database.insert_into
        next_entry = insert(JOURNAL).values(dataclasses.asdict(link)).on_conflict_do_nothing()
        # a row of the same revision is the entry's own: a note about it changes nothing
        replaced = DEPLOYMENTS.c.revision.in_((entry.row.revision - 1, entry.row.revision))
        next_row = insert(DEPLOYMENTS).values(row)
        next_row = next_row.on_conflict_do_update(index_elements=["model_name"], set_=row, where=replaced)
        with self.database.begin() as connection:
            if any(connection.execute(statement).rowcount != 1 for statement in (next_entry, next_row)):
                raise JournalChanged(
                    f"{self.database.name}: {name} has an entry {link.sequence} of the journal, or another deployment "
                    "row, by now; another process released at the same time: read it and decide again"
                )
        # with the registry's tag, this line shows that a tail was cut
        logger.info("journal entry %d of %s: %s, hash %s", link.sequence, name, entry.action, link.hash)
        return link

    def read_newest(self, model_name: str) -> tuple[Deployment | None, Link | None]:
        """The deployment row and the newest entry, both of one moment; None before the first release."""
        links = sa.select(JOURNAL).filter_by(model_name=model_name).order_by(JOURNAL.c.sequence.desc()).limit(1)
        with self.database.begin(write=False) as connection:
            row = connection.execute(sa.select(DEPLOYMENTS).filter_by(model_name=model_name)).one_or_none()
            head = connection.execute(links).one_or_none()
        return None if row is None else _read_row(row._mapping), None if head is None else Link(**head._mapping)

    def read_deployment(self, model_name: str) -> Deployment | None:
        """The deployment row, with the digests that the newest entry names; None before the first release.

        Raises
        ------
        DataError
            If the row is not what the newest entry wrote, or there are keys and none of them signed that entry.
        """
        row, head = self.read_newest(model_name)
        if head is None:
            return row
        if fault := find_difference(row, head) or self.find_forgery(head):
            raise DataError(fault)
        return read_entry(head).row

    def find_forgery(self, head: Link, *, known_head: str | None = None) -> str | None:
        """Why the newest entry is not to be believed; None if it is, or there is no key to prove it by.

        Parameters
        ----------
        known_head
            The head's mark as the registry has it: an entry from before the first key is believed if it is that.
        """
        name = f"journal of {head.model_name}"
        if not self.keys or (head.key_name is None and known_head == head.mark):
            return None
        if head.key_name is None:
            return (
                f"{name}: entry {head.sequence} is not signed, though CLOSEDLOOP_RELEASE__JOURNAL_KEY is set; "
                "'closedloop release step' signs a journal from before the key, if the registry's tag names its head"
            )
        wrong = check_link(head, self.keys)
        return f"{name}: {wrong}" if wrong else None

    def read(self, model_name: str, *, newest: int | None = None) -> list[Link]:
        """All entries of a model, or so many of the newest; the oldest first."""
        query = sa.select(JOURNAL).filter_by(model_name=model_name).order_by(JOURNAL.c.sequence.desc())
        with self.database.begin(write=False) as connection:
            return [Link(**row._mapping) for row in connection.execute(query.limit(newest))][::-1]

    def read_digests(self, model_name: str) -> dict[str, str]:
        """The digests of versions' model folders, as each was first journaled."""
        found: dict[str, str] = {}
        for link in reversed(self.read(model_name)):
            found |= read_entry(link).row.digests
        return found

    def list_released(self, model_name: str) -> set[str]:
        """Versions that are champion or were, and the one on its way."""
        entries = [read_entry(link) for link in self.read(model_name)]
        on_its_way = [entries[-1].rollout.version] if entries and entries[-1].rollout is not None else []
        return {*(entry.row.champion_version for entry in entries), *on_its_way}

    def note_pass(self, model_name: str, passed_at: dt.datetime) -> None:
        """Keep when a pass of the controller was last done, beside the entries: most passes move nothing."""
        insert = self.database.insert_into(RELEASE_PASSES).values(model_name=model_name, passed_at=passed_at)
        newest = insert.on_conflict_do_update(index_elements=["model_name"], set_={"passed_at": passed_at})
        with self.database.begin() as connection:
            connection.execute(newest)

    def read_pass(self, model_name: str) -> dt.datetime | None:
        """When a pass was last done, or None."""
        query = sa.select(RELEASE_PASSES.c.passed_at).filter_by(model_name=model_name)
        with self.database.begin(write=False) as connection:
            return connection.scalar(query)


def find_difference(row: Deployment | None, head: Link | None) -> str | None:
    """How the deployment row differs from the journal's newest entry; None where it does not, or nothing is journaled.

    Raises
    ------
    DataError
        If the entry cannot be read.
    """
    if head is None or row == msgspec.structs.replace(read_entry(head).row, digests={}):
        return None
    found = "is missing" if row is None else f"(revision {row.revision}, champion {row.champion_version}) is another"
    return (
        f"{head.model_name}: the deployment row {found}; entry {head.sequence} of the journal did not write it: it was "
        "changed without the journal. 'closedloop release promote' or 'release rollback' go on from it"
    )


def _read_row(values: Any) -> Deployment:
    try:
        return msgspec.convert({str(name): value for name, value in values.items()}, Deployment)
    except msgspec.ValidationError as error:
        raise DataError(f"{values['model_name']}: the deployment row cannot be read: {error}") from error


def read_entry(link: Link) -> Entry:
    """The content of an entry.

    Raises
    ------
    DataError
        If it is not what `Journal.append_entry` writes.
    """
    try:
        return msgspec.json.decode(link.entry, type=Entry)
    except msgspec.MsgspecError as error:
        raise DataError(f"journal of {link.model_name}, entry {link.sequence}: {error}") from error
