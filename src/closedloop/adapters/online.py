"""Rows of Feast's online store, read without Feast: its client costs 3 s of imports, 100 MB and 0.4 ms a call.

The formats are those of Feast 0.67 with entity keys of version 3; the integration test compares every type with
Feast's own client. A value is a ``ValueProto`` message, of which only numbers and text are decoded.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
import os
import sqlite3
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from closedloop.contract import JOIN_KEY
from closedloop.errors import ConfigError, ServiceUnavailable

logger = logging.getLogger(__name__)
STRING_TYPE = 2  # feast.types.ValueType.STRING
KEY_START = struct.pack("<III", 1, STRING_TYPE, len(JOIN_KEY)) + JOIN_KEY.encode() + struct.pack("<I", STRING_TYPE)
# A message's first byte holds field number and wire type: of a ValueProto
TEXT, INT32, INT64, DOUBLE, FLOAT, BOOL = 0x12, 0x18, 0x20, 0x29, 0x35, 0x38
NULL = b"\x98\x01"
SECONDS = b"\x08"  # of a Timestamp
_unpack_double, _unpack_float = struct.Struct("<xd").unpack, struct.Struct("<xf").unpack
LOCKED_AGAIN_SECONDS = 0.005

Value = float | str | None
State = Literal["fresh", "stale", "unknown"]


class OnlineRow(NamedTuple):
    """A customer's values in the order asked for (numbers are floats), and their snapshot (UTC); None if unknown.

    A snapshot without values: what the store holds of this customer cannot be read.
    """

    values: tuple[Value, ...] | None
    snapshot_at: dt.datetime | None


UNKNOWN = OnlineRow(None, None)
UNREADABLE = OnlineRow(None, dt.datetime.fromtimestamp(0, dt.UTC))


class OnlineReader(Protocol):
    """Reads one view's rows; opened by the first read, and again by the first one after a failure."""

    async def read(self, customer_ids: Sequence[str]) -> list[OnlineRow]:
        """One row for each of ``customer_ids``, by one query for all of them.

        Raises
        ------
        ServiceUnavailable
            If the store does not answer in time, or holds no such view (Redis cannot tell: nobody is known there).
            The message names no address; its cause does.
        """

    async def is_empty(self) -> bool:
        """Whether the store has no row of anybody: SQLite in this view, Redis in all.

        Raises
        ------
        ServiceUnavailable
            If it does not say.
        """

    async def close(self) -> None:
        """Close the connection."""


def open_online_reader(
    config: Mapping[str, Any], project: str, view: str, feature_names: Sequence[str], *, timeout_seconds: float = 0.25
) -> OnlineReader:
    """A reader of ``view``, whose values come in the order of ``feature_names``; nothing is opened yet.

    Parameters
    ----------
    config
        What `pick_online` takes of Feast's configuration.
    timeout_seconds
        A read that takes longer fails.

    Raises
    ------
    ConfigError
        If Feast is configured to write in a form that is not read here.
    """
    online = config["online_store"]
    place = (online["type"], online.get("redis_type", "redis"))
    if place not in (("sqlite", "redis"), ("redis", "redis")):
        found = " with redis_type ".join(place)
        raise ConfigError(f"feature_store.yaml: online_store.type is {found}; sqlite and redis (one server) are read")
    if (version := config.get("entity_key_serialization_version", 3)) != 3:
        raise ConfigError(f"feature_store.yaml: entity_key_serialization_version is {version}, must be 3")
    if config["registry"].get("enable_online_feature_view_versioning"):
        raise ConfigError("feature_store.yaml: registry.enable_online_feature_view_versioning must be off")
    if online["type"] == "sqlite":
        return SqliteReader(online["path"], project, view, feature_names, timeout_seconds)
    return RedisReader(online["connection_string"], project, view, feature_names, timeout_seconds)


def pick_online(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `open_online_reader` reads of Feast's configuration: not the registry's address, nor a password in it.

    Parameters
    ----------
    config
        What `closedloop.adapters.feast.read_store_config` returns.
    """
    read = {
        "online_store": ("type", "redis_type", "path", "connection_string"),
        "registry": ("enable_online_feature_view_versioning",),
    }
    picked = {
        part: {name: config[part][name] for name in names if name in config[part]} for part, names in read.items()
    }
    version = "entity_key_serialization_version"
    return picked | ({version: config[version]} if version in config else {})


def state_of(snapshot_at: dt.datetime | None, as_of: dt.datetime, max_age_days: int) -> State:
    """Whether a row may be used at ``as_of``; Feast itself never expires one.

    >>> newyear = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    >>> state_of(newyear, newyear + dt.timedelta(days=31), 31)
    'fresh'
    """
    if snapshot_at is None:
        return "unknown"
    return "stale" if as_of - snapshot_at > dt.timedelta(days=max_age_days) else "fresh"


class SqliteReader:
    """A table a view, a row a customer and feature."""

    def __init__(
        self, path: str, project: str, view: str, feature_names: Sequence[str], timeout_seconds: float
    ) -> None:
        self._path, self._view, self._timeout_seconds = path, view, timeout_seconds
        table = f"{project}_{view}".replace('"', '""')
        self._query = f'SELECT entity_key, feature_name, value, event_ts FROM "{table}" WHERE entity_key IN '  # noqa: S608
        self._any_query = f'SELECT 1 FROM "{table}" LIMIT 1'  # noqa: S608
        self._positions = {name: position for position, name in enumerate(feature_names)}
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    async def read(self, customer_ids: Sequence[str]) -> list[OnlineRow]:
        """See `OnlineReader`; the query takes the loop's thread, waiting for a writer's lock does not."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._timeout_seconds
        while True:
            try:
                return self._select([encode_key(customer) for customer in customer_ids])
            except (sqlite3.Error, OSError) as error:
                locked = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
                if not locked or clock() >= deadline:
                    await self.close()
                    raise ServiceUnavailable(f"online store: {self._explain(error)}") from error
            await asyncio.sleep(LOCKED_AGAIN_SECONDS)

    async def is_empty(self) -> bool:
        """See `OnlineReader`."""
        try:
            return self._connect().execute(self._any_query).fetchone() is None
        except (sqlite3.Error, OSError) as error:
            raise ServiceUnavailable(f"online store: {self._explain(error)}") from error

    async def close(self) -> None:
        """Close the file."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _select(self, keys: list[bytes]) -> list[OnlineRow]:
        marks = ",".join("?" * len(keys))
        found: dict[bytes, list[bytes | None]] = {}
        newest: dict[bytes, int] = {}
        for key, name, value, second in self._connect().execute(f"{self._query}({marks})", keys).fetchall():
            values = found.get(key)
            if values is None:
                values = found[key] = [None] * len(self._positions)
                newest[key] = second
            elif second > newest[key]:
                newest[key] = second
            position = self._positions.get(name)
            if position is not None:
                values[position] = value
        rows = {key: _decode_row(values, newest[key]) for key, values in found.items()}
        return [rows.get(key, UNKNOWN) for key in keys]

    def _connect(self) -> sqlite3.Connection:
        """The connection to the file that is there now."""
        status = os.stat(self._path)  # noqa: PTH116 - a Path would double the cost of every read
        if self._connection is None or self._file != (status.st_dev, status.st_ino):
            # Not mode=ro: a writer that was killed leaves a journal that only a connection that may write rolls back,
            # and every read would fail until somebody writes again.
            uri = f"{Path(self._path).as_uri()}?mode=rw"
            self._connection = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)
            self._connection.execute("PRAGMA query_only=ON")
            self._file = (status.st_dev, status.st_ino)
        return self._connection

    def _explain(self, error: Exception) -> str:
        if isinstance(error, OSError) or "no such table" in str(error):
            return f"it holds no view {self._view}; train or refresh first"
        return str(error)


class RedisReader:
    """A hash a customer, whose fields are the features and the time of each view."""

    def __init__(
        self, connection_string: str, project: str, view: str, feature_names: Sequence[str], timeout_seconds: float
    ) -> None:
        try:
            import mmh3
            from redis.asyncio import Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ImportError as error:
            raise ConfigError("online_store.type redis: install closedloop[redis]") from error
        self._timeout_seconds = timeout_seconds
        self._key_end = project.encode()
        fields = [mmh3.mmh3_32_digest(f"{view}:{name}".encode()) for name in feature_names]
        fields.append(f"_ts:{view}".encode())
        self._command_start = b"*%d\r\n" % (len(fields) + 2) + _pack_bulk(b"HMGET")
        self._command_end = b"".join(_pack_bulk(field) for field in fields)
        # redis-py would otherwise wait for seconds between attempts to connect
        self._client = Redis(**parse_address(connection_string), retry=Retry(NoBackoff(), 0))

    async def read(self, customer_ids: Sequence[str]) -> list[OnlineRow]:
        """See `OnlineReader`."""
        from redis import AuthenticationError, RedisError, ResponseError
        from redis import ConnectionError as NotConnected

        keys = [encode_key(customer) + self._key_end for customer in customer_ids]
        try:
            async with asyncio.timeout(self._timeout_seconds):
                try:
                    replies = await self._fetch(keys)
                except NotConnected:  # perhaps only a connection from before the server was started again
                    replies = await self._fetch(keys)
        except (RedisError, TimeoutError) as error:
            # a client is not told of what the store says, but an operator must know which of both it is
            refused = isinstance(error, AuthenticationError | ResponseError)
            what = "it refuses to be read" if refused else f"no rows in {self._timeout_seconds * 1000:.0f} ms"
            raise ServiceUnavailable(f"online store: {what}") from error
        return [UNKNOWN if stamp is None else _decode_row(values, stamp) for *values, stamp in replies]

    async def is_empty(self) -> bool:
        """See `OnlineReader`."""
        from redis import RedisError

        try:
            return not await self._client.dbsize()
        except RedisError as error:
            raise ServiceUnavailable("online store: it does not say how much it holds") from error

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _fetch(self, keys: list[bytes]) -> list[list[bytes | None]]:
        """Replies to one HMGET a key, sent at once, packed here: redis-py's pipeline takes three times as long."""
        pool = self._client.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.send_packed_command(
                [self._command_start + _pack_bulk(key) + self._command_end for key in keys]
            )
            return [await connection.read_response(disable_decoding=True) for _ in keys]
        except BaseException:
            # A reply does not name its key: one left unread would be taken for another customer's.
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)


def parse_address(connection_string: str) -> dict[str, Any]:
    """Feast's ``host:port,parameter=value,...`` as arguments of the Redis client; values are JSON where they can be.

    Raises
    ------
    ConfigError
        If it does not begin with host and port.
    """
    address, *parameters = connection_string.split(",")
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():  # what comes after it may be a password
        raise ConfigError("online_store.connection_string: must be host:port,parameter=value,... without a scheme")
    arguments: dict[str, Any] = {"host": host, "port": port}
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        try:
            arguments[name] = json.loads(value)
        except json.JSONDecodeError:
            arguments[name] = value
    return arguments


def _pack_bulk(value: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(value), value)


def encode_key(customer_id: str) -> bytes:
    """Feast's entity key; text that is no valid Unicode gets one that no customer has."""
    encoded = customer_id.encode("utf-8", "surrogatepass")
    return KEY_START + struct.pack("<I", len(encoded)) + encoded


def _decode_row(values: Sequence[bytes | None], stamp: int | bytes) -> OnlineRow:
    try:
        return OnlineRow(tuple([_decode_value(value) if value else None for value in values]), _decode_time(stamp))
    except (IndexError, OverflowError, TypeError, ValueError, struct.error) as error:
        logger.error("online store: a value that is neither number nor text: %s", error)
        return UNREADABLE  # the others of this read have theirs


def _decode_value(message: bytes) -> Value:
    """A ``ValueProto`` that is not empty: it holds one field, so that the first tag decides."""
    tag = message[0]
    if tag == DOUBLE:
        return _unpack_double(message)[0]  # type: ignore[no-any-return]
    if tag == TEXT:
        return message[_read_varint(message, 1)[1] :].decode()
    if tag in (INT64, INT32, BOOL):
        return float(_read_varint(message, 1)[0])
    if tag == FLOAT:
        return _unpack_float(message)[0]  # type: ignore[no-any-return]
    if message.startswith(NULL):
        return None
    raise ValueError(f"a message that starts with byte {tag:#04x}")


def _decode_time(stamp: int | bytes) -> dt.datetime:
    """What Redis holds, a ``Timestamp`` message, or what SQLite holds: Feast took the UTC time for a local one."""
    if isinstance(stamp, bytes):
        seconds = _read_varint(stamp, 1)[0] if stamp[:1] == SECONDS else 0
        return dt.datetime.fromtimestamp(seconds, dt.UTC)
    return dt.datetime.fromtimestamp(stamp, dt.UTC).astimezone().replace(tzinfo=dt.UTC)


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    """A signed 64-bit integer, seven bits a byte from the lowest, and the position behind it."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value - (1 << 64 if value >> 63 else 0), position
