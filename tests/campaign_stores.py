"""An operations store for campaigns."""

from __future__ import annotations

import sqlalchemy as sa

from closedloop.store.database import Database


def empty_store(address: str) -> str:
    """The database with its tables, and nothing of earlier tests in them; its address."""
    opened = Database(address)
    opened.upgrade()
    with opened.begin() as connection:
        for table in ("actions", "campaigns", "outcomes", "predictions"):
            connection.execute(sa.text(f"DELETE FROM {table}"))
    opened.close()
    return address
