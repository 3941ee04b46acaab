"""SQLAlchemy: engines for SQLite and PostgreSQL, and error messages without customer data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from closedloop.errors import ConfigError
from closedloop.extras import explain_missing

VALUE_ERRORS = (sa.exc.DataError, sa.exc.IntegrityError)
LOCK_WAIT_SECONDS = 10
# A host that vanished without closing the connection must not hang the caller. The address' query string overrides.
POSTGRES_LIMITS = {
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "5",
    "keepalives_count": "2",
    "tcp_user_timeout": "15000",
    "options": f"-c lock_timeout={LOCK_WAIT_SECONDS}s",
}


def create_engine(address: str, connections_max: int) -> sa.Engine:
    """Create an engine whose waits have time limits.

    Raises
    ------
    ConfigError
        If the address is of another database kind, or its driver is not installed.
    """
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
            execution_options={"preserve_rowcount": True},  # also keep the row count of an insert
            json_serializer=lambda values: msgspec.json.encode(values).decode(),
            json_deserializer=msgspec.json.decode,
        )
    except sa.exc.ArgumentError:
        raise ConfigError(f"operations.url: it is not an address; {allowed}") from None  # it may hold a password
    except ModuleNotFoundError as error:
        raise explain_missing(error, "operations.url") from None
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


def read_partitions(
    connection: sa.Connection, query: sa.Executable, rows: int
) -> tuple[list[str], Iterator[Sequence[Any]]]:
    """The columns of a query, and its rows, so many at a time: no driver holds more of them."""
    result = connection.execution_options(yield_per=rows).execute(query)
    return list(result.keys()), result.partitions(rows)  # which does not follow yield_per by itself


def is_fault_of_row(error: sa.exc.StatementError | ValueError) -> bool:
    """Whether a value caused the error: it cannot be converted, its column refuses it, or it is too long to index."""
    too_long = str(getattr(getattr(error, "orig", None), "sqlstate", "")).startswith("54")
    return too_long or not isinstance(error, sa.exc.DBAPIError) or isinstance(error, VALUE_ERRORS)


def describe_cause(error: Exception) -> str:
    """The driver's message on one line, without the statement and the row that PostgreSQL quotes."""
    cause = getattr(error, "orig", None) or error
    primary = getattr(getattr(cause, "diag", None), "message_primary", None)
    return " ".join(str(primary or cause).split())
