"""A customer's features taken away, of all data sets: rows of the online store, published and working files."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from closedloop.adapters.online import KEY_START, encode_key, parse_address
from closedloop.contract import JOIN_KEY
from closedloop.errors import ServiceUnavailable

WAIT_SECONDS = 10
SCAN_KEYS = 10_000
PUBLISHING_SECONDS_MAX = 3_600
WORKING_DIRS = ("state/refresh", "state/outcomes")
WITH_KEYS = (
    "SELECT t.name FROM sqlite_master t, pragma_table_info(t.name) c WHERE t.type = 'table' AND c.name = 'entity_key'"
)


def erase_online(online: Mapping[str, Any], customer_id: str) -> int:
    """Delete a customer's online rows, which Feast cannot; returns how many: one a definition, on Redis a project.

    An SQLite file and its log are rewritten, so that no byte is left.

    Parameters
    ----------
    online
        ``online_store`` of Feast's configuration, as `closedloop.adapters.feast.read_store_config` returns it.

    Raises
    ------
    ServiceUnavailable
        If the store cannot be reached, or another process keeps its file from being rewritten: run it again.
    """
    key = encode_key(customer_id)
    if online["type"] == "redis":
        return _erase_in_redis(online["connection_string"], key)
    return _erase_in_sqlite(Path(online["path"]), key)


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


def erase_published(offline_dir: Path, customer_id: str) -> int | None:
    """Delete a customer's rows in the published files (project, definition, snapshot).

    Returns
    -------
    int or None
        How many there were; None: no file is there, which is no proof that none is elsewhere.

    Raises
    ------
    ServiceUnavailable
        If a file or folder cannot be read or written, or one is being published.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from closedloop.adapters.tables import write_table

    count = 0
    try:
        paths = _list_published(offline_dir)
        for path in paths:
            rows = pc.sum(pc.equal(pq.read_table(path, columns=[JOIN_KEY])[JOIN_KEY], customer_id)).as_py() or 0
            if rows:
                table = pq.read_table(path)
                write_table(path, table.filter(pc.not_equal(table[JOIN_KEY], customer_id)))
            count += rows
    except (OSError, pa.ArrowInvalid) as error:
        raise ServiceUnavailable(f"published features in {offline_dir}: {error}; run it again") from error
    return count if paths else None


def erase_working_files(root: Path) -> None:
    """Delete the tables that `closedloop refresh` and `closedloop outcomes` read anew, of all customers.

    Raises
    ------
    ServiceUnavailable
        If a file cannot be deleted.
    """
    for name in WORKING_DIRS:
        try:
            shutil.rmtree(root / name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ServiceUnavailable(f"working files in {root / name}: {error}; run it again") from error


def _list_published(offline_dir: Path) -> list[Path]:
    """Unlike `Path.glob`, which passes over a folder that it may not read."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    if not offline_dir.exists():
        return []
    walk = os.walk(offline_dir, onerror=refuse, followlinks=True)
    found = [Path(folder, name) for folder, _, names in walk for name in names]
    for path in found:
        if path.match(".[0-9]*.parquet.*"):
            _erase_half(path)
    return sorted(path for path in found if path.match("[0-9]*.parquet"))


def _erase_half(path: Path) -> None:
    """Delete what a publication that was killed has left; one that lives has it under its own name within the hour."""
    with contextlib.suppress(FileNotFoundError):
        if time.time() - path.stat().st_mtime < PUBLISHING_SECONDS_MAX:
            raise ServiceUnavailable(f"published features: {path} is or just was being written; run it again later")
        path.unlink()


def _erase_in_redis(connection_string: str, key: bytes) -> int:
    """A key is that of the customer, and the project's name."""
    with _open_redis(connection_string) as client:
        found = list(client.scan_iter(_match(key), count=SCAN_KEYS))
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
    """Redis' pattern of the keys that begin so."""
    return re.sub(rb"([*?\[\]\\])", rb"\\\1", key) + b"*"


def _erase_in_sqlite(path: Path, key: bytes) -> int:
    """A view is a table, in which a row is a feature."""
    if not path.exists():
        return 0
    with _open_sqlite(path) as store:
        count = 0
        for name in _list_views(store):
            count += store.execute(f"DELETE FROM {name} WHERE entity_key = ?", [key]).rowcount > 0  # noqa: S608
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
    """Their tables' names, quoted."""
    return ['"' + name.replace('"', '""') + '"' for (name,) in store.execute(WITH_KEYS).fetchall()]
