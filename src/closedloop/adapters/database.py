"""A SQLAlchemy database, SQLite or PostgreSQL: transactions, its schema's revision, and errors that say what to do."""

from __future__ import annotations

import datetime as dt
import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from closedloop.errors import ConfigError, DataError, ServiceUnavailable

if TYPE_CHECKING:
    from alembic.config import Config

VALUE_ERRORS = (sa.exc.DataError, sa.exc.IntegrityError)
UPGRADE_LOCK = 0x636C6F73  # any number, as long as every release takes the same
LOCK_WAIT_SECONDS = 10
# A host that is gone without a word must not hang the caller. The address' own query string wins.
POSTGRES_LIMITS = {
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "5",
    "keepalives_count": "2",
    "tcp_user_timeout": "15000",
    "options": f"-c lock_timeout={LOCK_WAIT_SECONDS}s",
}


class Database:
    """The operations store's database; for any number of threads, and not to be taken through a fork.

    Its methods, and those of what is built on it, raise ServiceUnavailable if it is unreachable, locked, full or
    damaged, ConfigError if its schema is not this release's, and DataError for a value that its column refuses. No
    message holds the password.

    Parameters
    ----------
    url
        ``sqlite:///file`` or ``postgresql://user:password@host/database``.
    connections_max
        Connections open at once; whoever needs one more waits for half a minute.

    Raises
    ------
    ConfigError
        If the address is of another kind, or its driver is not installed.
    """

    def __init__(self, url: str, connections_max: int = 5) -> None:
        self._engine = _create_engine(url, connections_max)
        weakref.finalize(self, self._engine.dispose)  # of what nobody closed, at the latest when the process ends
        self._schema_known = False
        self.name = f"operations store {self._engine.url.set(query={}).render_as_string(hide_password=True)}"
        self._dialect = self._engine.dialect.name
        self._insert_into = sqlite.insert if self._dialect == "sqlite" else postgresql.insert

    def close(self) -> None:
        """Let go of all connections."""
        self._engine.dispose()

    def upgrade(self) -> None:
        """Create the tables or bring them to this release; any number of processes may do so at once.

        Raises
        ------
        ConfigError
            If a newer release has upgraded the store to what this one cannot use, or its folder cannot be made.
        ServiceUnavailable
            If the database is unreachable or full, or another upgrade takes longer than 10 seconds.
        """
        from alembic import command

        prepared = self._prepare_file() if self._dialect == "sqlite" else nullcontext()
        with (
            self._explain_errors(),
            prepared,
            self._connect("BEGIN IMMEDIATE") as connection,
            connection.begin(),
        ):
            if self._dialect == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(UPGRADE_LOCK)))
            found, newest = self._read_revision(connection)
            if found is None or found <= newest:  # a newer release's tables are left as they are
                command.upgrade(_configure_alembic(connection), "head")

    @contextmanager
    def _prepare_file(self) -> Iterator[None]:
        """Make the folder, lock it for the length of the block, and let readers of the file go on beside a writer."""
        folder = Path(self._engine.url.database or "").parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"operations.url: {folder} cannot be made ({error.strerror})") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two that change the journal's mode at once do not wait for each other
            with self._connect(None) as connection:  # it cannot change inside a transaction
                connection.execute(sa.text("PRAGMA journal_mode = WAL"))
            yield
        finally:
            os.close(lock)

    def read_clock_offset(self) -> float:
        """Seconds that the server's clock is ahead of ours; 0 for a file."""
        with self._begin(write=False) as connection:
            if self._dialect == "sqlite":
                return 0.0
            found = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
        return float((found - dt.datetime.now(dt.UTC)).total_seconds())

    def _connect(self, begin: str | None) -> sa.Connection:
        """A connection; ``begin`` is how SQLite's transaction starts, and None stands for none, on PostgreSQL too."""
        options = {"isolation_level": "AUTOCOMMIT"} if begin is None and self._dialect == "postgresql" else {}
        return self._engine.connect().execution_options(begin=begin, **options)

    def _insert_new(self, connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> int:
        """Insert rows with the same keys, but for those that are there already; returns how many were not."""
        statement = self._insert_into(table)
        if self._dialect == "sqlite":
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
    def _begin(self, *, write: bool = True) -> Iterator[sa.Connection]:
        """A transaction, committed when the block succeeds."""
        with self._explain_errors():
            self._require_schema()
            # a writer takes SQLite's lock at once: one that reads first could be refused it without waiting
            with self._connect("BEGIN IMMEDIATE" if write else "BEGIN") as connection, connection.begin():
                yield connection

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
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
        file = self._engine.url.database if self._dialect == "sqlite" else None
        if file and not Path(file).exists():  # SQLite would make an empty one, or speak of a file it cannot open
            remedy = "run `make run`, or `closedloop store upgrade`"
            raise ConfigError(f"{self.name}: nothing is deployed yet, there is no such file; {remedy}")
        with self._connect("BEGIN") as connection:
            found, newest = self._read_revision(connection)
        if found is None or found < newest:
            state = "has no tables yet" if found is None else f"is at revision {found}, this release needs {newest}"
            raise ConfigError(f"{self.name}: it {state}; run `closedloop store upgrade`")
        self._schema_known = True

    def _read_revision(self, connection: sa.Connection) -> tuple[str | None, str]:
        """The store's revision and this release's; a newer one is refused unless it says that this code runs on it.

        So releases can be rolled out, and back, one after the other.
        """
        from alembic.migration import MigrationContext
        from alembic.script import ScriptDirectory

        known = [script.revision for script in ScriptDirectory.from_config(_configure_alembic()).walk_revisions()]
        found = MigrationContext.configure(connection).get_current_revision()
        if found is not None and found not in known and self._read_oldest(connection) not in known:
            raise ConfigError(
                f"{self.name}: it is at revision {found}, which a newer release made; this one knows up to "
                f"{known[0]}: install the newer one"
            )
        return found, known[0]

    def _read_oldest(self, connection: sa.Connection) -> str | None:
        """The oldest revision whose code runs on this store, as the migrations wrote it."""
        from closedloop.migrations.tables import SCHEMA_COMPATIBILITY

        if not sa.inspect(connection).has_table(SCHEMA_COMPATIBILITY.name):
            return None
        return connection.scalar(sa.select(SCHEMA_COMPATIBILITY.c.oldest_revision))


def _create_engine(address: str, connections_max: int) -> sa.Engine:
    allowed = "allowed are sqlite:///file and postgresql://user:password@host/database"
    try:
        url = sa.make_url(address)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        arguments: dict[str, Any] = {}
        if url.drivername == "sqlite":
            # isolation_level None: Python's driver would begin transactions late, and commit before a table is made
            arguments = {"timeout": LOCK_WAIT_SECONDS, "isolation_level": None}
        elif url.drivername == "postgresql+psycopg":
            url = url.set(query=POSTGRES_LIMITS | dict(url.query))
        else:
            raise ConfigError(f"operations.url: found {url.drivername}, {allowed}")
        engine = sa.create_engine(
            url,
            connect_args=arguments,
            pool_size=connections_max,
            max_overflow=0,
            pool_pre_ping=True,
            execution_options={"preserve_rowcount": True},  # of an insert too
            json_serializer=lambda values: msgspec.json.encode(values).decode(),
            json_deserializer=msgspec.json.decode,
        )
    except sa.exc.ArgumentError:
        raise ConfigError(f"operations.url: it is not an address; {allowed}") from None  # it may hold a password
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"operations.url needs the Python package {error.name}: install closedloop[postgres]"
        ) from None
    if url.drivername == "sqlite":
        sa.event.listen(engine, "connect", _enforce_references)
        sa.event.listen(engine, "begin", _begin_transaction)
    return engine


def _enforce_references(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_transaction(connection: sa.Connection) -> None:
    begin = connection.get_execution_options()["begin"]
    if begin is not None:
        connection.exec_driver_sql(begin)


def load_alembic() -> None:
    """Import all that `Database` takes of it: of two threads that do so at once, one may find half a module."""
    import alembic.command
    import alembic.migration
    import alembic.script  # noqa: F401


def _configure_alembic(connection: sa.Connection | None = None) -> Config:
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "closedloop:migrations")
    return config


def is_fault_of_row(error: sa.exc.StatementError | ValueError) -> bool:
    """Whether a value is to blame: converting it failed, its column refused it, or it is too long for an index."""
    too_long = str(getattr(getattr(error, "orig", None), "sqlstate", "")).startswith("54")
    return too_long or not isinstance(error, sa.exc.DBAPIError) or isinstance(error, VALUE_ERRORS)


def describe_cause(error: Exception) -> str:
    """The driver's own words on one line, without the statement, and without the row that PostgreSQL quotes."""
    cause = getattr(error, "orig", None) or error
    primary = getattr(getattr(cause, "diag", None), "message_primary", None)
    return " ".join(str(primary or cause).split())
