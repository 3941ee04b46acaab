"""Rows to score and scored rows in Parquet and CSV files, through PyArrow and a chunk at a time."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from closedloop.errors import ConfigError, DataError
from closedloop.files import replace_file
from closedloop.rules import find_code
from closedloop.tabular import workbooks
from closedloop.tabular.csv_files import COMMAS, COMPRESSED, TextFormat, count_lines, read_batches, read_header
from closedloop.tabular.tables import UTC_TIME, rechunk

ColumnKind = Literal["numeric", "categorical", "id", "time"]
# of each kind: how it is stored, what a database may give for it, and what that becomes
KINDS: Mapping[ColumnKind, tuple[pa.DataType, tuple[type, ...], Any]] = {
    "numeric": (pa.float64(), (int, float, Decimal), float),
    "categorical": (pa.string(), (str, int, float, Decimal, bool), lambda code: find_code(code) or str(code)),
    "id": (pa.string(), (str, int, float, Decimal), lambda code: find_code(code) or str(code)),
    "time": (UTC_TIME, (dt.datetime,), lambda time: time),
}
SUFFIXES = (".parquet", ".csv")
FORMATS = {".parquet": "parquet", ".csv": "csv", ".xlsx": "excel", ".xlsm": "excel"}
RULE = f"a file of rows ends in {' or '.join(SUFFIXES)}; a table is named ADDRESS#TABLE"
# what people have instead of these, and how they get one
OTHER_BOOK = "is a workbook of a kind that is not read: save it as .xlsx, or its sheet as CSV UTF-8, and name that file"
CONVERT = {
    (".xls", ".xlsb", ".ods", ".numbers"): OTHER_BOOK,
    (".zip", ".7z", ".rar", ".tar", ".tgz", ".xz"): "is an archive: unpack it, and name the file in it",
}
BUFFER_BYTES = 1 << 20  # of a column while a row group is read: whole ones would be as large as their writer liked


class RowFile:
    """A file of rows.

    Parameters
    ----------
    path
        Of a Parquet or CSV file (with a header; it may be compressed, as ``.csv.gz`` says), or of a workbook.
    format_
        Which of these it is; None: as the end of its name says.
    text
        How a CSV file is written.
    sheet
        Which sheet of a workbook is read; None: the first one.

    Raises
    ------
    ConfigError
        If its name does not say which it is, or what reads a workbook is not installed.
    DataError
        If it cannot be read.
    """

    time_format: str | None = None  # None: as ISO 8601 has it

    def __init__(
        self, path: Path, *, format_: str | None = None, text: TextFormat = COMMAS, sheet: str | None = None
    ) -> None:
        self.path, self._text, self._sheet = path, text, sheet
        refuse_unread(path)
        format_ = format_ or find_format(path)
        if format_ is None:
            raise ConfigError(f"{path}: {RULE}")
        self._is_workbook = format_ == "excel"
        self.is_text = format_ != "parquet"  # whether every cell is text
        if self.is_text:
            names = workbooks.read_header(path, sheet) if self._is_workbook else read_header(path, text)
            self.schema = pa.schema([(name, pa.string()) for name in names])
        else:
            with _explain_errors(path), pq.ParquetFile(path) as file:
                self.schema = file.schema_arrow

    @cached_property
    def rows_max(self) -> int:
        """The number of rows; of a CSV file at most that many, as a value may hold a line break."""
        if self._is_workbook:
            return workbooks.count_rows(self.path, self._sheet)
        if self.is_text:
            return max(0, count_lines(self.path) - 1)
        with _explain_errors(self.path):
            return int(pq.read_metadata(self.path).num_rows)

    def read_chunks(self, columns: list[str], chunk_rows: int) -> Iterator[pa.Table]:
        """These columns, ``chunk_rows`` rows at a time, each column in one piece; the last chunk may be shorter.

        Raises
        ------
        DataError
            Where the file is damaged, a line of it has another number of cells than the header, or one of these columns
            is there twice.
        """
        self._require_once(columns)
        yield from self._read(columns, chunk_rows)

    def _read(self, columns: list[str], chunk_rows: int) -> Iterator[pa.Table]:
        if self._is_workbook:
            yield from rechunk(workbooks.read_batches(self.path, self._sheet, columns), chunk_rows)
            return
        if self.is_text:
            yield from rechunk(read_batches(self.path, self._text, columns), chunk_rows)
            return
        with _explain_errors(self.path), pq.ParquetFile(self.path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            yield from rechunk(file.iter_batches(chunk_rows, columns=columns, use_threads=False), chunk_rows)

    def _require_once(self, columns: list[str]) -> None:
        if twice := sorted(name for name in set(columns) if self.schema.names.count(name) > 1):
            named = ", ".join(map(repr, twice))
            raise DataError(f"{self.path}: more than one column {named}; rename all but one of them")


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet: {' '.join(str(error).split())[:300]}") from error


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


def find_format(path: Path) -> str | None:
    """The format that the end of a file's name says, in whatever case; None if it is none."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return next((format_ for suffix, format_ in FORMATS.items() if name.endswith(suffix)), None)


def refuse_unread(path: Path) -> None:
    """Say how a file becomes one that is read, where its name says that it is none.

    Raises
    ------
    DataError
        With the way out.
    """
    for endings, advice in CONVERT.items():
        if path.name.lower().endswith(endings):
            raise DataError(f"{path}: {advice}")


def require_suffix(path: Path) -> str:
    """The end of the name of a file to write, which says its format.

    Raises
    ------
    ConfigError
        If it is none that is known.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: {RULE}")
    return path.suffix


def require_file(target: str) -> Path:
    """The file here that an argument names.

    Raises
    ------
    ConfigError
        If it is an address, or its name says no format that is known.
    """
    if "://" in target:
        raise ConfigError(f"{target}: it is an address, and no file can be written there: {RULE}")
    require_suffix(Path(target))
    return Path(target)


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
        is_allowed = isinstance(value, allowed) and (bool in allowed or type(value) is not bool)
        if value is not None and not is_allowed:
            names = " or ".join(one.__name__ for one in allowed)
            raise DataError(f"{place}: row {row} holds {value!r:.80}, expected {names}")
        found.append(None if value is None else convert(value))
    return pa.array(found, stored)
