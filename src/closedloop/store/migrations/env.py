"""Run by Alembic to migrate over the connection, and in the transaction, that `Store.upgrade` gives it."""

from __future__ import annotations

from alembic import context

# Alembic sets `config` while it runs this file; importing it otherwise does nothing.
if getattr(context, "config", None) is not None:
    context.configure(connection=context.config.attributes["connection"])
    with context.begin_transaction():
        context.run_migrations()
