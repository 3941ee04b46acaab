"""Rows of one snapshot, written to Redis in the format of Feast's store.

Feast makes an object of every value, and takes nine times as long. Here a column's values become bytes at once.
"""

from __future__ import annotations

import datetime as dt
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from closedloop.adapters.online_format import DOUBLE, encode_key, encode_text, encode_time
from closedloop.adapters.online_store import pack_bulk, parse_address
from closedloop.contract import JOIN_KEY

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_ROWS = 2_000
PLAIN = {"type", "redis_type", "connection_string", "skip_dedup"}  # of other options of the store Feast takes care


def is_plain_redis(online: Mapping[str, Any]) -> bool:
    """Whether a store is one Redis server without options that change what is written."""
    return online["type"] == "redis" and online.get("redis_type", "redis") == "redis" and set(online) <= PLAIN


def write_snapshot(
    connection_string: str, project: str, view: str, file: Path, numeric: Sequence[str], text: Sequence[str]
) -> int:
    """Write every row of a snapshot's Parquet file over what the store holds of its customer; returns their number.

    Parameters
    ----------
    file
        Columns ``customer_id``, ``event_timestamp`` (UTC) and the features, a row a customer.
    numeric, text
        Names of the features that are 64-bit floats, and of those that are text.

    Raises
    ------
    redis.RedisError
        If the server cannot be reached, or refuses a row.
    """
    import pyarrow.parquet as pq
    from redis import Redis

    count = 0
    with Redis(**parse_address(connection_string)) as client, pq.ParquetFile(file) as rows:
        pool = client.connection_pool
        connection = pool.get_connection()
        try:
            for batch in rows.iter_batches(CHUNK_ROWS, columns=[JOIN_KEY, "event_timestamp", *numeric, *text]):
                connection.send_packed_command(list(_pack_rows(batch, project, view, numeric, text)))
                for _ in range(len(batch)):
                    connection.read_response()
                count += len(batch)
        except BaseException:
            connection.disconnect()  # its answers belong to rows that nobody waits for
            raise
        finally:
            pool.release(connection)
    return count


def _pack_rows(
    batch: pa.RecordBatch, project: str, view: str, numeric: Sequence[str], text: Sequence[str]
) -> Iterator[bytes]:
    """One HSET a row, as the Redis protocol has it."""
    start = b"*%d\r\n" % (4 + 2 * (len(numeric) + len(text))) + pack_bulk(b"HSET")
    end, time_field = project.encode(), pack_bulk(f"_ts:{view}".encode())
    numbers, known = _pack_numbers(batch, view, numeric)
    blanks = [_pack_field(view, name) + pack_bulk(b"") for name in numeric]
    texts = [_pack_texts(batch.column(name), _pack_field(view, name)) for name in text]
    stamps: dict[dt.datetime, bytes] = {}
    whole = (known.sum(axis=1) == len(numeric)).tolist()
    for place, (customer, at) in enumerate(
        zip(batch.column(JOIN_KEY).to_pylist(), batch.column("event_timestamp").to_pylist(), strict=True)
    ):
        if at not in stamps:
            stamps[at] = time_field + pack_bulk(encode_time(at))
        row = [start, pack_bulk(encode_key(customer) + end), stamps[at]]
        if whole[place]:
            row.append(numbers[place].tobytes())
        else:
            row += [
                numbers[place, number].tobytes() if known[place, number] else blanks[number]
                for number in range(len(numeric))
            ]
        yield b"".join([*row, *(column[place] for column in texts)])


def _pack_numbers(batch: pa.RecordBatch, view: str, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Field and value of each number, rows x columns x bytes, and which of the values are known."""
    starts = [_pack_field(view, name) + b"$9\r\n" + bytes([DOUBLE]) for name in names]
    size = len(starts[0]) if starts else 0
    packed = np.zeros((len(batch), len(names), size + struct.calcsize("<d") + 2), np.uint8)
    known = np.ones((len(batch), len(names)), bool)
    for place, (name, start) in enumerate(zip(names, starts, strict=True)):
        values = batch.column(name).cast("float64").to_numpy(zero_copy_only=False).astype("<f8")
        packed[:, place, :size] = np.frombuffer(start, np.uint8)
        packed[:, place, size:-2] = np.ascontiguousarray(values).view(np.uint8).reshape(len(batch), -1)
        packed[:, place, -2:] = np.frombuffer(b"\r\n", np.uint8)
        known[:, place] = ~np.isnan(values)
    return packed, known


def _pack_texts(column: pa.Array, field: bytes) -> list[bytes]:
    """Field and value of each text."""
    values = column.to_pylist()
    packed = {value: field + pack_bulk(b"" if value is None else encode_text(value)) for value in set(values)}
    return [packed[value] for value in values]


def _pack_field(view: str, name: str) -> bytes:
    import mmh3

    return pack_bulk(mmh3.mmh3_32_digest(f"{view}:{name}".encode()))
