"""What serves, as a release writes it, and as somebody writes it who can reach the operations store alone."""

from __future__ import annotations

from typing import Any

import msgspec
import sqlalchemy as sa

from closedloop.core.release.entries import Deployment, Entry
from closedloop.store.database import Database
from closedloop.store.journal import Journal
from closedloop.store.migrations.tables import DEPLOYMENTS


def deploy(database: Database, row: Deployment) -> Deployment:
    """Write a row, as the next revision, with its entry of the journal."""
    journal = Journal(database)
    before, head = journal.read_newest(row.model_name)
    row = msgspec.structs.replace(row, revision=(before.revision if before else 0) + 1)
    journal.append_entry(Entry("promote", "a test", row.updated_at, "for a test", row), after=head)
    return row


def change_row(database: Database, model_name: str, **values: Any) -> None:
    """Change the row without the journal."""
    with database.begin() as connection:
        changed = sa.update(DEPLOYMENTS).where(DEPLOYMENTS.c.model_name == model_name).values(values)
        assert connection.execute(changed).rowcount == 1
