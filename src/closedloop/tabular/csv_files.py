"""CSV files through PyArrow: each cell is text, and each line as long as the header or an error with file and line."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from closedloop.config.sources import FileSource
from closedloop.errors import DataError

BLOCK_BYTES = 1 << 23
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")  # PyArrow reads these by the end of the name
csv.field_size_limit(BLOCK_BYTES)  # of a line: PyArrow reads no row that is longer than two blocks
BAD_BYTE = re.compile("[\udc80-\udcff]")  # how Python's "surrogateescape" marks a byte that is not of the encoding


def read_header(path: Path, source: FileSource) -> list[str]:
    """The names in the first line that is not empty.

    Raises
    ------
    DataError
        If the file cannot be read, or holds no such line.
    """
    with _explain_errors(path, source), _open_text(path, source) as stream:
        names = next((cells for cells in csv.reader(_list_lines(stream), delimiter=source.delimiter) if cells), None)
    if names is None:
        raise DataError(f"{path}: the file is empty; a header line with column names is required")
    if BAD_BYTE.search("".join(names)):
        raise DataError(f"{path}, {find_broken_line(path, source)}")
    return names


def read_batches(path: Path, source: FileSource, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The columns of these names, in their order, as text; an empty cell is null.

    Raises
    ------
    DataError
        With file and line, where a line has another number of cells than the header, a quoted value does not end, or
        a byte is not of the encoding.
    """
    stream = _CountingStream(path)
    convert = pa.csv.ConvertOptions(
        include_columns=list(dict.fromkeys(columns)),
        column_types=dict.fromkeys(columns, pa.string()),
        strings_can_be_null=True,
        null_values=[""],
    )
    read = pa.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, encoding=source.encoding)
    parse = pa.csv.ParseOptions(delimiter=source.delimiter, newlines_in_values=True)
    with _explain_errors(path, source):
        try:
            with pa.csv.open_csv(stream, read, parse, convert) as reader:
                yield from reader
        finally:
            stream.close()
    # PyArrow lets the end of the file end a quoted value, and with it all lines that the value has swallowed
    if stream.quotes % 2 and (broken := find_broken_line(path, source)):
        raise DataError(f"{path}, {broken}")


def count_lines(path: Path) -> int:
    """The number of lines, of which a quoted value may hold several; they end as PyArrow has it: by CR, LF or both."""
    last = b"\n"
    count = 0
    with pa.input_stream(path, compression="detect") as stream:
        while block := stream.read(BLOCK_BYTES):
            block = last + block.replace(b"\0", b"")  # of UTF-16
            count += block.count(b"\n", 1) + block.count(b"\r", 1) - block.count(b"\r\n")
            last = block[-1:]
    return count + (last not in b"\r\n")


def find_broken_line(path: Path, source: FileSource) -> str | None:
    """The first line that breaks a rule, and the rule; None if Python's reader finds none."""
    return next(find_broken_lines(path, source), None)


def find_broken_lines(path: Path, source: FileSource) -> Iterator[str]:
    """Each line that breaks a rule, and the rule."""
    line, width = 1, 0
    with _open_text(path, source) as stream:
        reader = csv.reader(_list_lines(stream), delimiter=source.delimiter, strict=True)
        try:
            for cells in reader:
                width = width or len(cells)
                if BAD_BYTE.search("".join(cells)):
                    yield (
                        f"line {line}: holds bytes that are not {source.encoding}; save the file as UTF-8, or name its "
                        "encoding in the data set's config (source.encoding)"
                    )
                elif cells and len(cells) != width:
                    counts = f"the number of cells is {len(cells)}, but {width} in the header"
                    yield f"line {line}: {counts}{_guess_cause(cells, width)}"
                line = reader.line_num + 1
        except csv.Error as error:
            rule = "a quoted value does not end" if "unexpected end" in str(error) else str(error)
            yield f"line {line}: {rule}"


def _list_lines(stream: io.TextIOWrapper) -> Iterator[str]:
    """The lines of a file, none of which is held whole where it has no end (a small archive may unpack to one)."""
    while line := stream.readline(BLOCK_BYTES):
        if len(line) == BLOCK_BYTES:
            raise csv.Error(f"more than {BLOCK_BYTES:,} characters without a line break")
        yield line


def _guess_cause(cells: Sequence[str], width: int) -> str:
    if len(cells) < width:
        return "; is the file cut off?"
    if len(cells) == width + 1 and not cells[-1]:
        return "; a delimiter at the end of a line makes an empty cell: take it away, or give it a name in the header"
    return "; quote a cell that holds the delimiter"


@contextmanager
def _explain_errors(path: Path, source: FileSource) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, UnicodeError, csv.Error) as error:
        broken = None
        with suppress(UnicodeError):  # UTF-16 that does not begin as such: no line can be told from another
            broken = find_broken_line(path, source)
        reason = f", {broken}" if broken else f": cannot be read as csv: {' '.join(str(error).split())[:300]}"
        raise DataError(f"{path}{reason}") from error
    except (OSError, LookupError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as csv: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def _open_text(path: Path, source: FileSource) -> Iterator[io.TextIOWrapper]:
    encoding = "utf-8-sig" if codecs.lookup(source.encoding).name == "utf-8" else source.encoding
    with (
        pa.input_stream(path, compression="detect") as stream,
        io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="") as lines,
    ):
        yield lines


class _CountingStream:
    """A file, unpacked, as PyArrow takes one from Python; ``quotes`` is the number of quotes read so far."""

    def __init__(self, path: Path) -> None:
        self._stream = pa.input_stream(path, compression="detect")
        self.quotes = 0

    @property
    def closed(self) -> bool:
        return bool(self._stream.closed)

    def read(self, size: int = -1) -> bytes:
        block: bytes = self._stream.read(size)
        self.quotes += block.count(b'"')
        return block

    def close(self) -> None:
        self._stream.close()
