"""Rows of database tables and queries by the chunk, through SQLAlchemy; tables are written in SQLite or PostgreSQL."""

from __future__ import annotations

import datetime as dt
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from closedloop.adapters.sqlalchemy import describe_cause, read_partitions
from closedloop.errors import ConfigError, DataError, ServiceUnavailable
from closedloop.extras import explain_missing, find_extra
from closedloop.files import VARIABLE_PATTERN, names_table

CHUNK_ROWS = 5_000
ALLOWED = "sqlite:///file.db#table, postgresql+psycopg://user@host/database#table or VARIABLE#table"
_OBJECTS = (UUID, IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network)
_TYPES: Mapping[type, Any] = {str: sa.Text(), int: sa.BigInteger(), float: sa.Double(), dt.date: sa.Date()}


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
    if not names_table(text):
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
    url = _choose_driver(url)
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
    with _open(table.place, table.url) as engine:
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
        with _open(table.place, table.url) as engine, engine.connect() as connection:
            yield from map(_spell, read_partitions(connection, query, CHUNK_ROWS)[1])

    return names, read()


def read_query(variable: str, query: str, *, chunk_rows: int) -> Iterator[tuple[list[str], Sequence[Sequence[Any]]]]:
    """The columns and rows of a query, in chunks; the first one comes even without rows.

    Parameters
    ----------
    variable
        The environment variable with the database's address, which holds a password and is shown nowhere.
    query
        One statement; nothing that it writes is kept.

    Raises
    ------
    ConfigError
        If the variable is not set, or the database's driver is not installed.
    DataError
        If the address or the query is wrong.
    ServiceUnavailable
        If the database cannot be reached.
    """
    place = f"source.query ({variable})"
    with _open(place, _read_address(variable, place)) as engine, engine.connect() as connection:
        try:
            names, partitions = read_partitions(connection, sa.text(query), chunk_rows)
            yield names, ()
            for rows in partitions:
                yield names, _spell(rows)
        except sa.exc.SQLAlchemyError as error:  # SQLite says "OperationalError" of a wrong query too
            raise DataError(f"{place}: {describe_cause(error)}") from None


def _spell(rows: Sequence[Sequence[Any]]) -> Sequence[Sequence[Any]]:
    """Rows with texts in place of UUIDs and network addresses, which a driver gives as objects of Python."""
    firsts = [next((one for one in column if one is not None), None) for column in zip(*rows, strict=True)]
    places = {place for place, first in enumerate(firsts) if isinstance(first, _OBJECTS)}
    if not places:
        return rows
    return [[str(one) if place in places and one is not None else one for place, one in enumerate(row)] for row in rows]


def select_all(variable: str, table: str) -> str:
    """The query of all rows of a table, ``name`` or ``schema.name``, in the words of the variable's database.

    Raises
    ------
    ConfigError
        If the variable is not set, or the database's driver is not installed.
    DataError
        If the variable holds no address.
    """
    with _open(table, _read_address(variable, table)) as engine:
        quote = engine.dialect.identifier_preparer.quote
        return f"SELECT * FROM {'.'.join(quote(part) for part in table.split('.'))}"  # noqa: S608  quoted


def _choose_driver(url: sa.URL) -> sa.URL:
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _read_address(variable: str, place: str) -> sa.URL:
    if not (address := os.environ.get(variable)):
        raise ConfigError(f"source.url_variable: the environment variable {variable} is not set")
    try:
        return _choose_driver(sa.make_url(address))
    except (sa.exc.ArgumentError, ValueError) as error:  # a port that is no number is a bare ValueError
        raise DataError(f"{place}: {type(error).__name__}: {variable} holds no address of a database") from None


def require_table(table: RowTable, columns: Collection[str], key: str) -> None:
    """See that rows can be inserted into a table, or that it can be made, before they are computed.

    Raises
    ------
    DataError
        If the table has another primary key or lacks a column, or its schema is missing.
    ServiceUnavailable
        If the database cannot be reached.
    """
    with _open(table.place, table.url) as engine:
        inspector = sa.inspect(engine)
        if inspector.has_table(table.name, table.schema):
            _require_shape(_reflect(engine, table), table.place, columns, key)
        elif table.schema is not None and not inspector.has_schema(table.schema):
            raise DataError(f"{table.place}: there is no such schema; create it, or name a table of another one")


def _require_shape(found: sa.Table, place: str, columns: Collection[str], key: str) -> None:
    keys = [column.name for column in found.primary_key.columns]
    if keys != [key] or any(name not in found.columns for name in columns):
        raise DataError(
            f"{place}: it has the columns {', '.join(found.columns.keys())} and the primary key "
            f"{', '.join(keys) or 'none'}; needed are {', '.join(columns)} with the primary key {key}"
        )


def insert_rows(
    table: RowTable,
    columns: Mapping[str, type],
    key: str,
    chunks: Iterable[Sequence[Mapping[str, Any]]],
    *,
    replaced: Mapping[str, Any] | None = None,
) -> None:
    """Insert rows whose key is not there yet, in one transaction; the table is made if it is missing.

    Parameters
    ----------
    replaced
        Values of columns: rows that have them go in the same transaction, so that readers see the old or the new ones.

    Raises
    ------
    DataError
        If the table has another primary key or lacks a column, or the database refuses a value.
    ServiceUnavailable
        If the database cannot be reached; no row was inserted then.
    """
    with _open(table.place, table.url) as engine:
        wanted = sa.Table(
            table.name,
            sa.MetaData(schema=table.schema),
            *(
                sa.Column(name, _TYPES[kind], primary_key=name == key, nullable=name != key)
                for name, kind in columns.items()
            ),
        )
        wanted.create(engine, checkfirst=True)
        _require_shape(_reflect(engine, table), table.place, columns, key)
        insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert
        statement = insert(wanted).on_conflict_do_nothing()
        with engine.begin() as connection:
            if replaced:
                connection.execute(sa.delete(wanted).where(*(wanted.c[name] == one for name, one in replaced.items())))
            for rows in chunks:
                connection.execute(statement, list(rows))


def _reflect(engine: sa.Engine, table: RowTable) -> sa.Table:
    try:
        return sa.Table(table.name, sa.MetaData(), schema=table.schema, autoload_with=engine)
    except sa.exc.NoSuchTableError:
        raise DataError(f"{table.place}: there is no such table") from None


@contextmanager
def _open(place: str, url: sa.URL) -> Iterator[sa.Engine]:
    """The database, for the length of the block; what goes wrong is told without the address."""
    try:
        engine = sa.create_engine(url, hide_parameters=True)
    except ModuleNotFoundError as error:
        raise explain_missing(error, place) from None
    except sa.exc.NoSuchModuleError:  # the database is known by its driver alone
        kind = url.get_backend_name()
        extra = find_extra(kind)
        remedy = f"install closedloop[{extra}]" if extra else f"install a driver of {kind} for SQLAlchemy"
        raise ConfigError(f"{place} needs a driver of {kind}, which is not installed: {remedy}") from None
    except sa.exc.ArgumentError as error:  # a database that SQLAlchemy does not know
        raise DataError(f"{place}: {describe_cause(error)}") from None
    try:
        yield engine
    except sa.exc.OperationalError as error:
        raise ServiceUnavailable(f"{place}: {describe_cause(error)}") from None
    except sa.exc.SQLAlchemyError as error:
        raise DataError(f"{place}: {describe_cause(error)}") from None
    finally:
        engine.dispose()
