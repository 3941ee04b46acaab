"""A customer's features taken away, of all data sets: rows of the online store, and those of published files."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from closedloop.adapters.online import encode_key, parse_address
from closedloop.contract import JOIN_KEY
from closedloop.errors import ServiceUnavailable

WAIT_SECONDS = 10
SCAN_KEYS = 10_000
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


def erase_published(offline_dir: Path, customer_id: str) -> int:
    """Delete a customer's rows in the published files (project, definition, snapshot); returns how many there were."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from closedloop.adapters.tables import write_table

    count = 0
    for path in sorted(offline_dir.glob("*/*/[0-9]*.parquet")):
        rows = pc.sum(pc.equal(pq.read_table(path, columns=[JOIN_KEY])[JOIN_KEY], customer_id)).as_py() or 0
        if rows:
            table = pq.read_table(path)
            write_table(path, table.filter(pc.not_equal(table[JOIN_KEY], customer_id)))
        count += rows
    return count


def _erase_in_redis(connection_string: str, key: bytes) -> int:
    """A key is that of the customer, and the project's name."""
    from redis import Redis, RedisError

    pattern = re.sub(rb"([*?\[\]\\])", rb"\\\1", key) + b"*"
    try:
        with Redis(**{"socket_timeout": WAIT_SECONDS, **parse_address(connection_string)}) as client:
            found = list(client.scan_iter(pattern, count=SCAN_KEYS))
            return int(client.delete(*found)) if found else 0
    except RedisError as error:
        raise ServiceUnavailable(f"online store: {error}") from None


def _erase_in_sqlite(path: Path, key: bytes) -> int:
    """A view is a table, in which a row is a feature."""
    if not path.exists():
        return 0
    count = 0
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)) as store:
            for (table,) in store.execute(WITH_KEYS).fetchall():
                name = table.replace('"', '""')
                count += store.execute(f'DELETE FROM "{name}" WHERE entity_key = ?', [key]).rowcount > 0  # noqa: S608
            store.execute("VACUUM")
            busy = store.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    except sqlite3.Error as error:
        raise ServiceUnavailable(f"online store {path}: {error}; run it again") from error
    if busy:
        raise ServiceUnavailable(f"online store {path}: its log is in use by another process; run it again")
    return count
