"""Rows of Feast's online store, read without Feast: its client costs 3 s of imports, 100 MB and 0.4 ms a call."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from closedloop.adapters.online_format import UNKNOWN, OnlineRow, decode_row, encode_key
from closedloop.errors import ConfigError, ServiceUnavailable

logger = logging.getLogger(__name__)
LOCKED_AGAIN_SECONDS = 0.005


class OnlineReader(Protocol):
    """Reads one view's rows; opened by the first read, and again by the first one after a failure."""

    async def read(self, customer_ids: Sequence[str]) -> list[OnlineRow]:
        """One row for each of ``customer_ids``, by one query for all of them.

        Raises
        ------
        ServiceUnavailable
            If the store does not answer in time, or has no such view (with Redis all customers are unknown instead).
            The message names no address; its cause does.
        """

    async def is_empty(self) -> bool:
        """Whether the store has no rows at all: in this view for SQLite, in any view for Redis.

        Raises
        ------
        ServiceUnavailable
            If the store does not answer.
        """

    async def close(self) -> None:
        """Close the connection."""


def open_online_reader(
    config: Mapping[str, Any], project: str, view: str, feature_names: Sequence[str], *, timeout_seconds: float = 0.25
) -> OnlineReader:
    """Make a reader of ``view`` that returns values in the order of ``feature_names``; the first read opens the store.

    Parameters
    ----------
    config
        The part of Feast's configuration that `pick_online` returns.
    timeout_seconds
        A read that takes longer fails.

    Raises
    ------
    ConfigError
        If Feast is configured to write in a format that this reader does not support.
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
    """Pick the keys that `open_online_reader` needs; leave out the registry's address, which may hold a password.

    Parameters
    ----------
    config
        The configuration that `closedloop.adapters.feast_store.read_store_config` returns.
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


def is_stale(snapshot_at: dt.datetime, as_of: dt.datetime, max_age_days: int) -> bool:
    """Whether a row is too old at ``as_of`` to be used; Feast itself never expires a row.

    >>> newyear = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    >>> is_stale(newyear, newyear + dt.timedelta(days=31), 31)
    False
    """
    return as_of - snapshot_at > dt.timedelta(days=max_age_days)


class SqliteReader:
    """Reads an SQLite store: a table for each view, a row for each customer and feature."""

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
        """See `OnlineReader`; the query runs in the event loop's thread, but waiting for a writer's lock does not."""
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
        rows = {key: decode_row(values, newest[key]) for key, values in found.items()}
        return [rows.get(key, UNKNOWN) for key in keys]

    def _connect(self) -> sqlite3.Connection:
        """Return a connection to the file that is now at the path."""
        status = os.stat(self._path)  # noqa: PTH116 - a Path would double the cost of every read
        if self._connection is None or self._file != (status.st_dev, status.st_ino):
            # Not mode=ro: only a connection that may write can roll back the journal of a killed writer. With mode=ro
            # every read would fail until the next write.
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
    """Reads a Redis store: a hash for each customer, with a field for each feature and each view's time."""

    def __init__(
        self, connection_string: str, project: str, view: str, feature_names: Sequence[str], timeout_seconds: float
    ) -> None:
        import mmh3
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        self._timeout_seconds = timeout_seconds
        self._key_end = project.encode()
        fields = [mmh3.mmh3_32_digest(f"{view}:{name}".encode()) for name in feature_names]
        fields.append(f"_ts:{view}".encode())
        self._command_start = b"*%d\r\n" % (len(fields) + 2) + pack_bulk(b"HMGET")
        self._command_end = b"".join(pack_bulk(field) for field in fields)
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
                except NotConnected:  # perhaps a connection from before a restart of the server: try again
                    replies = await self._fetch(keys)
        except (RedisError, TimeoutError) as error:
            # the message hides the store's answer from clients, but tells the operator which of the two happened
            refused = isinstance(error, AuthenticationError | ResponseError)
            what = "it refuses to be read" if refused else f"no rows in {self._timeout_seconds * 1000:.0f} ms"
            raise ServiceUnavailable(f"online store: {what}") from error
        return [UNKNOWN if stamp is None else decode_row(values, stamp) for *values, stamp in replies]

    async def is_empty(self) -> bool:
        """See `OnlineReader`."""
        from redis import RedisError

        try:
            return not await self._client.dbsize()
        except RedisError as error:
            raise ServiceUnavailable("online store: its number of rows cannot be read") from error

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _fetch(self, keys: list[bytes]) -> list[list[bytes | None]]:
        """Send all HMGETs, one a key, at once and return the replies; redis-py's pipeline takes three times as long."""
        pool = self._client.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.send_packed_command(
                [self._command_start + pack_bulk(key) + self._command_end for key in keys]
            )
            return [await connection.read_response(disable_decoding=True) for _ in keys]
        except BaseException:
            # A reply does not name its key: the next read would take an unread reply for another customer's.
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)


def parse_address(connection_string: str) -> dict[str, Any]:
    """Parse Feast's ``host:port,parameter=value,...`` into arguments of the Redis client; JSON values are decoded.

    Raises
    ------
    ConfigError
        If it does not begin with host and port.
    """
    address, *parameters = connection_string.split(",")
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():  # never show the text: it may hold a password
        raise ConfigError("online_store.connection_string: must be host:port,parameter=value,... without a scheme")
    arguments: dict[str, Any] = {"host": host, "port": port}
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        try:
            arguments[name] = json.loads(value)
        except json.JSONDecodeError:
            arguments[name] = value
    return arguments


def pack_bulk(value: bytes) -> bytes:
    """A string of the Redis protocol."""
    return b"$%d\r\n%s\r\n" % (len(value), value)
