"""Rows to score and scored rows in Parquet and CSV files, through PyArrow and a chunk at a time."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from closedloop.adapters.tables import UTC_TIME
from closedloop.errors import ConfigError, DataError
from closedloop.files import replace_file

ColumnKind = Literal["numeric", "categorical", "id", "time"]
# of each kind: how it is stored, what a database may give for it, and what that becomes
KINDS: Mapping[ColumnKind, tuple[pa.DataType, tuple[type, ...], Any]] = {
    "numeric": (pa.float64(), (int, float, Decimal), float),
    "categorical": (pa.string(), (str,), str),
    "id": (pa.string(), (str, int), str),
    "time": (UTC_TIME, (dt.datetime,), lambda time: time),
}
SUFFIXES = (".parquet", ".csv")
BUFFER_BYTES = 1 << 20  # of a column while a row group is read: whole ones would be as large as their writer liked
# cells are text, so that nothing is guessed; an empty one is missing
_CSV_PARSE = pa.csv.ParseOptions(newlines_in_values=True)
_CSV_READ = pa.csv.ReadOptions(use_threads=False, block_size=8 * BUFFER_BYTES)


class RowFile:
    """A file of rows; ``rows_max`` is their number, of a CSV file at most that, as a value may hold a line break.

    Parameters
    ----------
    path
        Of a ``.parquet`` or ``.csv`` file (with a header, comma-separated, in UTF-8).

    Raises
    ------
    ConfigError
        If its name ends otherwise.
    DataError
        If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_text = require_suffix(path) == ".csv"  # whether every cell is text
        with self._explain_errors():
            if self.is_text:
                with pa.csv.open_csv(path, read_options=_CSV_READ, parse_options=_CSV_PARSE) as reader:
                    self.schema = pa.schema([(name, pa.string()) for name in reader.schema.names])
                self.rows_max = max(0, _count_lines(path) - 1)
            else:
                with pq.ParquetFile(path) as file:
                    self.schema, self.rows_max = file.schema_arrow, file.metadata.num_rows

    def read_chunks(self, columns: list[str], chunk_rows: int) -> Iterator[pa.Table]:
        """These columns, ``chunk_rows`` rows at a time, each column in one piece; the last chunk may be shorter.

        Raises
        ------
        DataError
            Where the file is damaged, or a line of it has another number of cells than the header.
        """
        with self._explain_errors():
            if self.is_text:
                options = pa.csv.ConvertOptions(
                    include_columns=columns,
                    column_types=dict.fromkeys(columns, pa.string()),
                    strings_can_be_null=True,
                    null_values=[""],
                )
                with pa.csv.open_csv(self.path, _CSV_READ, _CSV_PARSE, options) as reader:
                    yield from _rechunk(reader, chunk_rows)
            else:
                with pq.ParquetFile(self.path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
                    batches = file.iter_batches(chunk_rows, columns=columns, use_threads=False)
                    yield from _rechunk(batches, chunk_rows)

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.path}: cannot be read: {' '.join(str(error).split())[:300]}") from error


class RowWriter:
    """Writes tables of one schema into a Parquet or CSV file; the same tables give the same bytes."""

    def __init__(self, path: Path, schema: pa.Schema, *, suffix: str, plain: Iterable[str] = ()) -> None:
        self._writer: pa.csv.CSVWriter | pq.ParquetWriter
        if suffix == ".csv":
            self._writer = pa.csv.CSVWriter(path, schema)
        else:
            # a dictionary of values that hardly repeat costs time and room
            repeating = [name for name in schema.names if name not in set(plain)]
            self._writer = pq.ParquetWriter(path, schema, use_dictionary=repeating, compression="zstd")

    def write(self, table: pa.Table) -> None:
        """Append a table, in Parquet as one row group."""
        self._writer.write_table(table)

    def close(self) -> None:
        """Complete the file."""
        self._writer.close()


def require_suffix(path: Path) -> str:
    """The end of a file's name, which says how rows stand in it.

    Raises
    ------
    ConfigError
        If it is none that is known.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a file of rows ends in {' or '.join(SUFFIXES)}; a table is named ADDRESS#TABLE")
    return path.suffix


def write_part(path: Path, table: pa.Table) -> None:
    """Write a table that only `read_part` reads, quickly."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_part(path: Path) -> pa.Table:
    """Read what `write_part` wrote.

    Raises
    ------
    DataError
        If it is damaged.
    """
    try:
        with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
            return reader.read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}); start without --resume") from error


def write_rows(
    path: Path, kinds: Mapping[str, ColumnKind], chunks: Iterable[Sequence[Sequence[Any]]], *, place: str
) -> None:
    """Write rows of Python values, in the order of ``kinds``, into a Parquet file, whole or not at all.

    Raises
    ------
    DataError
        If a value is of another type.
    """
    schema = pa.schema([(name, KINDS[kind][0]) for name, kind in kinds.items()])
    with replace_file(path) as beside, pq.ParquetWriter(beside, schema, compression="zstd") as writer:
        first = 1
        for rows in chunks:
            columns = zip(*rows, strict=True)
            arrays = [
                _to_array(values, kind, f"{place}: column {name}", first)
                for (name, kind), values in zip(kinds.items(), columns, strict=True)
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            first += len(rows)


def _to_array(values: Sequence[Any], kind: ColumnKind, place: str, first: int) -> pa.Array:
    stored, allowed, convert = KINDS[kind]
    found: list[Any] = []
    for row, value in enumerate(values, first):
        if value is not None and (type(value) is bool or not isinstance(value, allowed)):
            names = " or ".join(one.__name__ for one in allowed)
            raise DataError(f"{place}: row {row} holds {value!r:.80}, expected {names}")
        found.append(None if value is None else convert(value))
    return pa.array(found, stored)


def _rechunk(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``rows``, however the file is divided."""
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


def _count_lines(path: Path) -> int:
    last = b"\n"
    count = 0
    with path.open("rb") as stream:
        while block := stream.read(BUFFER_BYTES):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")
