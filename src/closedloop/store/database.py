"""The operations store's database, SQLite or PostgreSQL: one engine, its transactions, and its schema's revision."""

from __future__ import annotations

import datetime as dt
import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql, sqlite

from closedloop.adapters.sqlalchemy import VALUE_ERRORS, create_engine, describe_cause
from closedloop.errors import ConfigError, DataError, ServiceUnavailable
from closedloop.store.migrations.tables import SCHEMA_COMPATIBILITY

# What PostgreSQL does as SQLite does: a transaction that only reads sees the tables of one moment.
ISOLATION = {None: "AUTOCOMMIT", "BEGIN": "REPEATABLE READ"}
UPGRADE_LOCK = 0x636C6F73  # any number, as long as every release takes the same


class NothingDeployed(ConfigError):
    """The store has no tables yet."""


class Database:
    """The operations store's database: one a process, for any number of threads, not to be taken through a fork.

    The query classes (`Predictions`, `Journal`, `Checks`, `Samples`, ...) take it. Its methods and theirs raise
    ServiceUnavailable if it is unreachable, locked, full or damaged, ConfigError if its schema is not this release's,
    and DataError for a value that its column refuses. No message holds the password.

    Parameters
    ----------
    url
        ``sqlite:///file`` or ``postgresql://user:password@host/database``.
    connections_max
        Connections that this process opens at once; a thread that needs one more waits for half a minute.

    Raises
    ------
    ConfigError
        If the address is of another kind, or its driver is not installed.
    """

    def __init__(self, url: str, connections_max: int = 5) -> None:
        self.engine = create_engine(url, connections_max)
        weakref.finalize(self, self.engine.dispose)  # of what nobody closed, at the latest when the process ends
        self._schema_known = False
        self.name = f"operations store {self.engine.url.set(query={}).render_as_string(hide_password=True)}"
        self.dialect = self.engine.dialect.name
        self.insert_into = sqlite.insert if self.dialect == "sqlite" else postgresql.insert

    def close(self) -> None:
        """Let go of all connections."""
        self.engine.dispose()

    def upgrade(self) -> None:
        """Create the tables or bring them to this release; any number of processes may do so at once.

        Raises
        ------
        ConfigError
            If a newer release has upgraded the store to what this one cannot use, or its folder cannot be made.
        ServiceUnavailable
            If the database is unreachable or full, or another upgrade takes longer than 10 seconds.
        """
        prepared = self._prepare_file() if self.dialect == "sqlite" else nullcontext()
        with (
            self.explain_errors(),
            prepared,
            self.connect("BEGIN IMMEDIATE") as connection,
            connection.begin(),
        ):
            if self.dialect == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(UPGRADE_LOCK)))
            found, newest = self._read_revision(connection)
            if found is None or found <= newest:  # a newer release's tables are left as they are
                command.upgrade(configure_alembic(connection), "head")

    @contextmanager
    def _prepare_file(self) -> Iterator[None]:
        """Make the folder, lock it for the length of the block, and let readers of the file go on beside a writer."""
        folder = Path(self.engine.url.database or "").parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"operations.url: {folder} cannot be made ({error.strerror})") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two that change the journal's mode at once do not wait for each other
            with self.connect(None) as connection:  # it cannot change inside a transaction
                connection.execute(sa.text("PRAGMA journal_mode = WAL"))
            yield
        finally:
            os.close(lock)

    def read_clock_offset(self) -> float:
        """Seconds that the server's clock is ahead of ours; 0 for a file."""
        with self.begin(write=False) as connection:
            if self.dialect == "sqlite":
                return 0.0
            found = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
        return float((found - dt.datetime.now(dt.UTC)).total_seconds())

    def connect(self, begin: str | None) -> sa.Connection:
        """A connection; ``begin`` is how SQLite's transaction starts: to write, to read, or None for none at all.

        On PostgreSQL the transaction is of the same kind.
        """
        level = ISOLATION.get(begin) if self.dialect == "postgresql" else None
        options = {"isolation_level": level} if level else {}
        return self.engine.connect().execution_options(begin=begin, **options)

    def insert_new(self, connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> int:
        """Insert rows with the same keys, but for those that are there already; returns how many were not."""
        statement = self.insert_into(table)
        if self.dialect == "sqlite":
            return connection.execute(statement.on_conflict_do_nothing(), rows).rowcount
        # One JSON document is twice as fast as a row at a time, and costs this process a sixth.
        times = [value for row in rows for value in row.values() if isinstance(value, dt.datetime)]
        if any(value.tzinfo is None for value in times):
            raise ValueError("a time without a zone")
        columns = [sa.column(name, table.c[name].type) for name in rows[0]]
        document = sa.func.json_to_recordset(sa.bindparam("rows", rows, type_=sa.JSON))
        read = document.table_valued(*columns).render_derived(with_types=True)
        chosen = statement.from_select(list(rows[0]), sa.select(*read.c))
        return connection.execute(chosen.on_conflict_do_nothing()).rowcount

    @contextmanager
    def begin(self, *, write: bool = True) -> Iterator[sa.Connection]:
        """A transaction, committed when the block succeeds; one that only reads sees the store of one moment."""
        with self.explain_errors():
            self._require_schema()
            # a writer takes SQLite's lock at once: one that reads first could be refused it without waiting
            with self.connect("BEGIN IMMEDIATE" if write else "BEGIN") as connection, connection.begin():
                yield connection

    @contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Turn SQLAlchemy's errors into ours, without their cause, whose text quotes customers' values."""
        try:
            yield
        except VALUE_ERRORS as error:
            raise DataError(f"{self.name}: {describe_cause(error)}") from None
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            raise ServiceUnavailable(f"{self.name}: {describe_cause(error)}") from None

    def _require_schema(self) -> None:
        if self._schema_known:
            return
        file = self.engine.url.database if self.dialect == "sqlite" else None
        if file and not Path(file).exists():  # SQLite would make an empty one, or speak of a file it cannot open
            remedy = "run `make run`, or `closedloop store upgrade`"
            raise NothingDeployed(f"{self.name}: nothing is deployed yet, there is no such file; {remedy}")
        with self.connect("BEGIN") as connection:
            found, newest = self._read_revision(connection)
        if found is None or found < newest:
            state = "has no tables yet" if found is None else f"is at revision {found}, this release needs {newest}"
            kind = NothingDeployed if found is None else ConfigError
            raise kind(f"{self.name}: it {state}; run `closedloop store upgrade`")
        self._schema_known = True

    def _read_revision(self, connection: sa.Connection) -> tuple[str | None, str]:
        """The store's revision and this release's; a newer one is refused unless it says that this code runs on it.

        So releases can be rolled out, and back, one after the other.
        """
        known = [script.revision for script in ScriptDirectory.from_config(configure_alembic()).walk_revisions()]
        found = MigrationContext.configure(connection).get_current_revision()
        if found is not None and found not in known and self._read_oldest(connection) not in known:
            raise ConfigError(
                f"{self.name}: it is at revision {found}, which a newer release made; this one knows up to "
                f"{known[0]}: install the newer one"
            )
        return found, known[0]

    def _read_oldest(self, connection: sa.Connection) -> str | None:
        """The oldest revision whose code runs on this store, as the migrations wrote it."""
        if not sa.inspect(connection).has_table(SCHEMA_COMPATIBILITY.name):
            return None
        return connection.scalar(sa.select(SCHEMA_COMPATIBILITY.c.oldest_revision))


def configure_alembic(connection: sa.Connection | None = None) -> Config:
    """Where this release's migrations are, and the connection that they use."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "closedloop.store:migrations")
    return config
