"""Delete rows of Feast's online store, for which Feast has no call."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from closedloop.adapters.online_format import KEY_START, encode_key
from closedloop.adapters.online_store import parse_address
from closedloop.errors import ServiceUnavailable

WAIT_SECONDS = 10
SCAN_KEYS = 10_000
WITH_KEYS = (
    "SELECT t.name FROM sqlite_master t, pragma_table_info(t.name) c WHERE t.type = 'table' AND c.name = 'entity_key'"
)


def erase_online(online: Mapping[str, Any], spellings: Sequence[str]) -> int:
    """Delete a customer's rows; return how many were deleted.

    A customer has one row for each feature definition in SQLite, and one for each project in Redis. An SQLite file and
    its log are rewritten, so that no byte of a deleted row is left.

    Parameters
    ----------
    online
        ``online_store`` of Feast's configuration, as `closedloop.adapters.feast_store.read_store_config` returns it.
    spellings
        How the customer's id may have been written.

    Raises
    ------
    ServiceUnavailable
        If the store cannot be reached, or another process uses its file so that it cannot be rewritten: run it again.
    """
    keys = [encode_key(name) for name in spellings]
    if online["type"] == "redis":
        return _erase_in_redis(online["connection_string"], keys)
    return _erase_in_sqlite(Path(online["path"]), keys)


def is_anybody_online(online: Mapping[str, Any]) -> bool:
    """Whether there are online rows of any customer, in any data set.

    Raises
    ------
    ServiceUnavailable
        If the store cannot be reached.
    """
    if online["type"] == "redis":
        with _open_redis(online["connection_string"]) as client:
            return next(client.scan_iter(_match(KEY_START), count=SCAN_KEYS), None) is not None
    path = Path(online["path"])
    if not path.exists():
        return False
    with _open_sqlite(path) as store:
        return any(store.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() for name in _list_views(store))  # noqa: S608


def _erase_in_redis(connection_string: str, keys: Sequence[bytes]) -> int:
    """Delete a customer's hashes, one a project: their Redis key is the entity key followed by the project's name."""
    with _open_redis(connection_string) as client:
        found = [one for key in keys for one in client.scan_iter(_match(key), count=SCAN_KEYS)]
        return int(client.delete(*found)) if found else 0


@contextlib.contextmanager
def _open_redis(connection_string: str) -> Iterator[Any]:
    from redis import Redis, RedisError

    try:
        with Redis(**{"socket_timeout": WAIT_SECONDS, **parse_address(connection_string)}) as client:
            yield client
    except RedisError as error:
        raise ServiceUnavailable(f"online store: {error}") from None


def _match(key: bytes) -> bytes:
    """The Redis pattern that matches keys with this beginning."""
    return re.sub(rb"([*?\[\]\\])", rb"\\\1", key) + b"*"


def _erase_in_sqlite(path: Path, keys: Sequence[bytes]) -> int:
    """Delete a customer's rows: SQLite has one table for each view, and one row for each feature."""
    if not path.exists():
        return 0
    with _open_sqlite(path) as store:
        count = 0
        for name in _list_views(store):
            deleted = store.executemany(f"DELETE FROM {name} WHERE entity_key = ?", [[key] for key in keys])  # noqa: S608
            count += deleted.rowcount > 0
        store.execute("VACUUM")
        busy = store.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    if busy:
        raise ServiceUnavailable(f"online store {path}: its log is in use by another process; run it again")
    return count


@contextlib.contextmanager
def _open_sqlite(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)) as store:
            yield store
    except sqlite3.Error as error:
        raise ServiceUnavailable(f"online store {path}: {error}; run it again") from error


def _list_views(store: sqlite3.Connection) -> list[str]:
    """The quoted names of the views' tables."""
    return ['"' + name.replace('"', '""') + '"' for (name,) in store.execute(WITH_KEYS).fetchall()]
