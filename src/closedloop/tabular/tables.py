"""Parquet tables through PyArrow: the canonical form of all data between the stages."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from closedloop.core.features.daily import EVENTS_COLUMNS
from closedloop.errors import DataError
from closedloop.files import replace_file

if TYPE_CHECKING:
    import pandas as pd

CONTENT_KEY = b"closedloop.content"
GROUP_ROWS = 1 << 17
UTC_TIME = pa.timestamp("us", tz="UTC")
# types by the names that core gives them
TYPES = {"string": pa.string(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_(), "date": pa.date32()}
TYPES |= {"timestamp(6)": UTC_TIME}


def build_schema(columns: Mapping[str, str]) -> pa.Schema:
    """The schema of a table whose columns have types of these names (``TYPES``); times are UTC microseconds."""
    return pa.schema([(name, TYPES[kind]) for name, kind in columns.items()])


EVENT_SCHEMA = build_schema(EVENTS_COLUMNS)


def write_table(path: Path, table: pa.Table | pd.DataFrame, schema: pa.Schema | None = None) -> None:
    """Write one Parquet file, whole or not at all, with a digest of its content in the footer.

    The digest lets a reader tell from the footer alone whether the content changed.
    """
    if not isinstance(table, pa.Table):
        table = pa.Table.from_pandas(table, schema=schema, preserve_index=False)
    table = table.replace_schema_metadata(None).combine_chunks()
    digest = hashlib.sha256(str(table.schema).encode())
    for column in table.columns:
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                if buffer is not None:
                    digest.update(buffer)
    table = table.replace_schema_metadata({CONTENT_KEY: digest.hexdigest().encode()})
    with replace_file(path) as beside:
        pq.write_table(table, beside, compression="zstd")


def write_batches(
    path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema, metadata: Mapping[bytes, bytes] | None = None
) -> int:
    """Write batches to one Parquet file; returns the number of rows.

    Row groups have a fixed size, so that the bytes depend on the rows alone and not on how they were batched.
    """
    # a dictionary of floats that hardly repeat costs time and saves nothing
    dictionary = [field.name for field in schema if not pa.types.is_floating(field.type)]
    described, rows = schema.with_metadata(dict(metadata or {})), 0
    with pq.ParquetWriter(path, described, compression="lz4", use_dictionary=dictionary) as writer:
        for table in rechunk((batch.cast(schema) for batch in batches), GROUP_ROWS):
            writer.write_table(table, row_group_size=GROUP_ROWS)
            rows += table.num_rows
    return rows


def rechunk(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``rows``, however they were divided; the last table may be shorter."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += batch.num_rows
        while count >= rows:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, rows).combine_chunks()
            waiting = table.slice(rows).to_batches()
            count -= rows
    if count:
        yield pa.Table.from_batches(waiting).combine_chunks()


def read_table(path: Path, columns: Sequence[str] | None = None, *, made_by: str) -> pd.DataFrame:
    """Read one Parquet file, or a folder of them in the order of their names.

    Raises
    ------
    DataError
        If it is missing or damaged; the message says which stage makes it.
    """
    try:
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{path}: holds no Parquet file; '{made_by}' writes them")
        tables = [pq.read_table(file, columns=list(columns) if columns else None) for file in files]
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); '{made_by}' writes it") from error
    for file, table in zip(files, tables, strict=True):
        _require_schema(file, table.schema, tables[0].schema, columns or (), made_by=made_by)
    frame: pd.DataFrame = pa.concat_tables(tables).to_pandas()
    return frame


def _require_schema(file: Path, found: pa.Schema, first: pa.Schema, columns: Sequence[str], *, made_by: str) -> None:
    missing = [name for name in columns if name not in found.names]
    if missing:
        raise DataError(f"{file}: no column {', '.join(missing)}; '{made_by}' writes it")
    if found.equals(first):
        return
    differing = [f"{field.name}: {field.type}" for field in found if field not in list(first)]
    differing += [f"no {name}" for name in first.names if name not in found.names]
    what = ", ".join(differing) or "columns in another order"
    raise DataError(f"{file}: {what}, unlike the files before it; '{made_by}' writes it")


def read_footer(path: Path, key: bytes) -> bytes | None:
    """The value of a key in a Parquet file's footer; None if the key is not there, or the file is no Parquet."""
    try:
        metadata = pq.read_metadata(path).metadata
    except (OSError, pa.ArrowInvalid):
        return None
    value: bytes | None = metadata.get(key) if metadata else None
    return value


def count_rows(path: Path) -> int:
    """The rows of a Parquet file, from its footer."""
    return int(pq.read_metadata(path).num_rows)


def delete_rows(path: Path, column: str, values: Sequence[str]) -> int:
    """Delete the rows of a Parquet file with one of these values in a column; returns how many there were.

    Raises
    ------
    DataError
        If the file cannot be read.
    """
    wanted = pa.array(values, pa.string())
    try:
        count = pc.sum(pc.is_in(pq.read_table(path, columns=[column])[column], wanted)).as_py() or 0
        if count:
            table = pq.read_table(path)
            write_table(path, table.filter(pc.invert(pc.is_in(table[column], wanted))))
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from error
    return int(count)


def write_event_days(folder: Path, events: pd.DataFrame) -> int:
    """Write an event log as one file per UTC day, ``YYYY-MM-DD.parquet``; returns the number of days.

    Parameters
    ----------
    folder
        An existing, empty folder.
    events
        Columns of ``EVENT_SCHEMA``, in any order of rows. A day is stored by type, customer, time and amount: grouping
        by type and customer is nearly twice as fast where their rows stand together.
    """
    if events.empty:
        return 0
    dated = events.assign(day=events["time"].dt.tz_convert("UTC").dt.tz_localize(None).dt.floor("D"))
    ordered = dated.sort_values(["day", "event_type", "customer_id", "time", "amount"], kind="stable")
    table = pa.Table.from_pandas(ordered, schema=EVENT_SCHEMA, preserve_index=False).combine_chunks()
    days = ordered["day"].to_numpy().astype("datetime64[D]")
    starts = np.flatnonzero(np.r_[True, days[1:] != days[:-1]])
    for start, stop in zip(starts, np.r_[starts[1:], len(days)], strict=True):
        day = days[start].item()
        # a slice shares its parent's buffers: taking the rows makes the content digest that of this day alone
        write_table(folder / f"{day}.parquet", table.take(pa.array(np.arange(start, stop))))
    return len(starts)


def list_event_days(folder: Path) -> list[dt.date]:
    """The days of which ``folder`` holds a file, in order."""
    return sorted(dt.date.fromisoformat(path.stem) for path in folder.glob("*.parquet"))
