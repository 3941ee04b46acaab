"""Rows to score and scored rows in database tables, through SQLAlchemy: SQLite or PostgreSQL."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from closedloop.adapters.database import describe_cause
from closedloop.errors import ConfigError, DataError, ServiceUnavailable

CHUNK_ROWS = 5_000
VARIABLE_PATTERN = r"[A-Za-z_][A-Za-z0-9_]*"
ALLOWED = "sqlite:///file.db#table, postgresql+psycopg://user@host/database#table or VARIABLE#table"
_TYPES: Mapping[type, Any] = {str: sa.Text(), int: sa.BigInteger(), float: sa.Double()}


class RowTable(NamedTuple):
    """A table (or view), and the database where it stands; ``place`` names both without a password."""

    place: str
    url: sa.URL
    name: str
    schema: str | None


def find_table(text: str) -> RowTable | None:
    """The table that an argument ADDRESS#TABLE names; None where it names a file.

    An address with a password is a secret: it stands in an environment variable, whose name is given in its place.

    Raises
    ------
    ConfigError
        If it is no address, of another database, holds a password or names a variable that is not set.
    """
    if "#" not in text or text.endswith((".csv", ".parquet")):
        return None
    address, _, name = text.rpartition("#")
    schema, _, table = name.rpartition(".")
    from_variable = re.fullmatch(VARIABLE_PATTERN, address) is not None
    if from_variable and not os.environ.get(address):
        raise ConfigError(f"{text}: the environment variable {address} is not set")
    try:
        url = sa.make_url(os.environ[address] if from_variable else address)
    except (sa.exc.ArgumentError, ValueError):  # a port that is no number is a bare ValueError
        raise ConfigError(
            f"{address if from_variable else 'ADDRESS'}#{name}: not an address; allowed: {ALLOWED}"
        ) from None
    place = f"{address if from_variable else url.render_as_string(hide_password=True)}#{name}"
    if url.password is not None and not from_variable:
        raise ConfigError(
            f"{place}: put an address with a password into an environment variable, and give VARIABLE#{name}"
        )
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg") or not table:
        raise ConfigError(f"{place}: allowed are {ALLOWED}")
    return RowTable(place, url, table, schema or None)


def read_rows(
    table: RowTable, required: Sequence[str], optional: Sequence[str]
) -> tuple[list[str], Iterator[Sequence[Sequence[Any]]]]:
    """The columns that are there, and their rows in chunks: one statement's, so that they belong together.

    They come in the order of the primary key, or where there is none in that of all these columns, so that the same
    rows are numbered the same again.

    Raises
    ------
    DataError
        If there is no such table, or it lacks a required column.
    ServiceUnavailable
        If the database cannot be reached.
    """
    with _open(table) as engine:
        found = _reflect(engine, table)
    missing = [name for name in required if name not in found.columns]
    if missing:
        raise DataError(
            f"{table.place}: no column {', '.join(missing)}; its columns: {', '.join(found.columns.keys())}"
        )
    names = [*required, *(name for name in optional if name in found.columns)]
    columns = [found.columns[name] for name in names]
    query = sa.select(*columns).order_by(*(list(found.primary_key.columns) or columns))

    def read() -> Iterator[Sequence[Sequence[Any]]]:
        with _open(table) as engine, engine.connect() as connection:
            yield from connection.execution_options(yield_per=CHUNK_ROWS).execute(query).partitions()

    return names, read()


def insert_rows(
    table: RowTable, columns: Mapping[str, type], key: str, chunks: Iterable[Sequence[Mapping[str, Any]]]
) -> None:
    """Insert rows whose key is not there yet, a chunk a transaction; the table is made if it is missing.

    Raises
    ------
    DataError
        If the table has another primary key or lacks a column, or the database refuses a value.
    ServiceUnavailable
        If the database cannot be reached; what was inserted stays, and is not doubled the next time.
    """
    with _open(table) as engine:
        wanted = sa.Table(
            table.name,
            sa.MetaData(schema=table.schema),
            *(
                sa.Column(name, _TYPES[kind], primary_key=name == key, nullable=name != key)
                for name, kind in columns.items()
            ),
        )
        wanted.create(engine, checkfirst=True)
        found = _reflect(engine, table)
        missing = [name for name in columns if name not in found.columns]
        keys = [column.name for column in found.primary_key.columns]
        if missing or keys != [key]:
            raise DataError(
                f"{table.place}: it has the columns {', '.join(found.columns.keys())} and the primary key "
                f"{', '.join(keys) or 'none'}; needed are {', '.join(columns)} with the primary key {key}"
            )
        insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert
        statement = insert(wanted).on_conflict_do_nothing()
        for rows in chunks:
            with engine.begin() as connection:
                connection.execute(statement, list(rows))


def _reflect(engine: sa.Engine, table: RowTable) -> sa.Table:
    try:
        return sa.Table(table.name, sa.MetaData(), schema=table.schema, autoload_with=engine)
    except sa.exc.NoSuchTableError:
        raise DataError(f"{table.place}: there is no such table") from None


@contextmanager
def _open(table: RowTable) -> Iterator[sa.Engine]:
    """The database, for the length of the block; what goes wrong is told without the address."""
    try:
        engine = sa.create_engine(table.url, hide_parameters=True)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{table.place} needs the Python package {error.name}: install closedloop[postgres]"
        ) from None
    try:
        yield engine
    except sa.exc.OperationalError as error:
        raise ServiceUnavailable(f"{table.place}: {describe_cause(error)}") from None
    except sa.exc.SQLAlchemyError as error:
        raise DataError(f"{table.place}: {describe_cause(error)}") from None
    finally:
        engine.dispose()
