"""Rows in files, through PyArrow and a chunk at a time: whoever wrote them, and under whichever names."""

from __future__ import annotations

import datetime as dt
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from closedloop.config.sources import DataSource, FileSource
from closedloop.errors import ConfigError, DataError
from closedloop.files import replace_file
from closedloop.rules import find_code
from closedloop.tabular import workbooks
from closedloop.tabular.csv_files import COMPRESSED, count_lines, read_batches, read_header
from closedloop.tabular.tables import UTC_TIME, rechunk

ColumnKind = Literal["numeric", "categorical", "id", "time"]
FileFormat = Literal["csv", "parquet", "excel"]
# of each kind: how it is stored, what a database may give for it, and what that becomes
KINDS: Mapping[ColumnKind, tuple[pa.DataType, tuple[type, ...], Any]] = {
    "numeric": (pa.float64(), (int, float, Decimal), float),
    "categorical": (pa.string(), (str, int, float, Decimal, bool), lambda code: find_code(code) or str(code)),
    "id": (pa.string(), (str, int, float, Decimal), lambda code: find_code(code) or str(code)),
    "time": (UTC_TIME, (dt.datetime,), lambda time: time),
}
SUFFIXES = (".parquet", ".csv")
FORMATS: Mapping[str, FileFormat] = {".parquet": "parquet", ".csv": "csv", ".xlsx": "excel", ".xlsm": "excel"}
RULE = f"a file of rows ends in {' or '.join(SUFFIXES)}; a table is named ADDRESS#TABLE"
# what people have instead of these, and how they get one
OTHER_BOOK = "is a workbook of a kind that is not read: save it as .xlsx, or its sheet as CSV UTF-8, and name that file"
CONVERT = {
    (".xls", ".xlsb", ".ods", ".numbers"): OTHER_BOOK,
    (".zip", ".7z", ".rar", ".tar", ".tgz", ".xz"): "is an archive: unpack it, and name the file in it",
}
WHOLE_WITH_COMMA = r"^\s*(-?(?:0|[1-9][0-9]*)),0+\s*$"
NO_COMMA = "(the decimal mark is ',')"
BUFFER_BYTES = 1 << 20  # of a column while a row group is read: whole ones would be as large as their writer liked


class RowFile:
    """A file of rows.

    Parameters
    ----------
    path
        Of a Parquet or CSV file (with a header; it may be compressed, as ``.csv.gz`` says), or of a workbook.
    source
        How it is written; None: as the end of its name says, a CSV file in UTF-8 and with commas.
    rename
        Names in the file, and those that they have here.
    wanted
        Names here; one in which a letter and its mark are two in the file gets this spelling.
    numeric
        The columns, by their names here, in which a decimal comma becomes a point. A value that has a point already
        is no number, and gets words that say so.

    Raises
    ------
    ConfigError
        If its name does not say which it is, or what reads a workbook is not installed.
    DataError
        If it cannot be read.
    """

    def __init__(
        self,
        path: Path,
        source: FileSource | None = None,
        *,
        rename: Mapping[str, str] | None = None,
        wanted: Collection[str] = (),
        numeric: Collection[str] = (),
    ) -> None:
        refuse_unread(path)
        if source is None:
            format_ = find_format(path)
            if format_ is None:
                raise ConfigError(f"{path}: {RULE}")
            source = FileSource(type=format_)
        self.path, self._source, self._numeric = path, source, numeric
        self.time_format = source.time_format
        self.is_text = source.type != "parquet"  # whether every cell is text
        schema = self._read_schema()
        names = name_columns(schema.names, rename or {}, wanted)
        self._written = dict(zip(names, schema.names, strict=True))
        self.schema = pa.schema([one.with_name(name) for one, name in zip(schema, names, strict=True)])

    def _read_schema(self) -> pa.Schema:
        if not self.is_text:
            with _explain_errors(self.path), pq.ParquetFile(self.path) as file:
                return file.schema_arrow
        if self._source.type == "excel":
            names = workbooks.read_header(self.path, self._source.sheet)
        else:
            names = read_header(self.path, self._source)
        return pa.schema([(name, pa.string()) for name in names])

    @cached_property
    def rows_max(self) -> int:
        """The number of rows; of a CSV file at most that many, as a value may hold a line break."""
        if self._source.type == "excel":
            return workbooks.count_rows(self.path, self._source.sheet)
        if self.is_text:
            return max(0, count_lines(self.path) - 1)
        with _explain_errors(self.path):
            return int(pq.read_metadata(self.path).num_rows)

    def read_chunks(self, columns: list[str], chunk_rows: int, skip: int = 0) -> Iterator[pa.Table]:
        """These columns, ``chunk_rows`` rows at a time, each column in one piece; the last chunk may be shorter.

        Texts of ``na_values`` are null, and a whole number has no decimal comma. ``skip`` rows are left out at the
        beginning; row groups of Parquet that lie among them are not even read.

        Raises
        ------
        DataError
            Where the file is damaged, a line of it has another number of cells than the header, or one of these columns
            is there twice.
        """
        if twice := sorted(name for name in set(columns) if self.schema.names.count(name) > 1):
            named = ", ".join(map(repr, twice))
            raise DataError(f"{self.path}: more than one column {named}; rename all but one of them")
        batches = self._read([self._written[name] for name in columns], chunk_rows, skip)
        for table in rechunk(batches, chunk_rows):
            yield _translate(table.rename_columns(columns), self._source, self._numeric)

    def _read(self, columns: list[str], chunk_rows: int, skip: int) -> Iterator[pa.RecordBatch]:
        if self._source.type == "excel":
            yield from _skip(workbooks.read_batches(self.path, self._source.sheet, columns), skip)
        elif self.is_text:
            yield from _skip(read_batches(self.path, self._source, columns), skip)
        else:
            with (
                _explain_errors(self.path),
                pq.ParquetFile(self.path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file,
            ):
                groups = list(range(file.num_row_groups))
                while groups and skip >= file.metadata.row_group(groups[0]).num_rows:
                    skip -= file.metadata.row_group(groups.pop(0)).num_rows
                batches = file.iter_batches(chunk_rows, row_groups=groups, columns=columns, use_threads=False)
                yield from _skip(batches, skip)


def _skip(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """All but the first rows."""
    for batch in batches:
        left = batch.slice(min(rows, batch.num_rows))
        rows -= batch.num_rows - left.num_rows
        if left.num_rows:
            yield left


def open_rows(
    path: Path,
    source: DataSource | None,
    rename: Mapping[str, str],
    *,
    needed: Collection[str],
    numeric: Collection[str] = (),
) -> RowFile:
    """Open a file as the data set's own if its header has the ``needed`` columns then, else as it is."""
    if isinstance(source, FileSource) and source.type == find_format(path):
        try:
            own = RowFile(path, source, rename=rename, wanted=needed, numeric=numeric)
        except DataError:
            return RowFile(path)
        if set(needed) <= set(own.schema.names):
            return own
    return RowFile(path)


def name_columns(found: Sequence[str], rename: Mapping[str, str], wanted: Collection[str]) -> list[str]:
    r"""The names that columns get here: renamed, and spelt as in ``wanted`` where a letter and its mark are two there.

    >>> name_columns(["Ge\u0301nero", "x"], {"x": "y"}, ["G\u00e9nero"])
    ['Género', 'y']
    """
    renamed = {_compose(name): ours for name, ours in rename.items()}
    spelt = {_compose(name): name for name in wanted}
    names = [renamed.get(_compose(name), name) for name in found]
    return [spelt.get(_compose(name), name) for name in names]


def _compose(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _translate(table: pa.Table, source: FileSource, numeric: Collection[str]) -> pa.Table:
    """A table whose texts of ``na_values`` are null, and in which a whole number has no decimal comma (``17,0``)."""
    if not source.na_values and source.decimal == ".":
        return table
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            column = table.column(place)
            known = pc.is_in(pc.utf8_trim_whitespace(column), pa.array(source.na_values, field.type))
            column = pc.if_else(known, pa.scalar(None, field.type), column)
            if source.decimal == ",":
                column = pc.replace_substring_regex(column, WHOLE_WITH_COMMA, r"\1")
                column = _point_decimals(column) if field.name in numeric else column
            table = table.set_column(place, field, column)
    return table


def _point_decimals(column: pa.ChunkedArray) -> pa.ChunkedArray:
    wrong = pc.binary_join_element_wise(column, NO_COMMA, " ")
    return pc.if_else(pc.match_substring(column, "."), wrong, pc.replace_substring(column, ",", "."))


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


def find_format(path: Path) -> FileFormat | None:
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
        If it is an address or a folder, or its name says no format that is known.
    """
    if "://" in target:
        raise ConfigError(f"{target}: it is an address, and no file can be written there: {RULE}")
    require_suffix(Path(target))
    if Path(target).is_dir():
        raise ConfigError(f"{target}: it is a folder; name a file")
    return Path(target)


def write_part(path: Path, table: pa.Table) -> None:
    """Write a table that only `read_part` reads, quickly."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def encode_part(table: pa.Table) -> bytes:
    """A table for `decode_part`, on another machine."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def decode_part(content: bytes) -> pa.Table:
    """The table that `encode_part` encoded."""
    with pa.ipc.open_stream(content) as reader:
        return reader.read_all()


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
