"""How a strange file is written: encoding, delimiter and header, found by reading it."""

from __future__ import annotations

import codecs
import csv
import io
import re
import statistics
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pandas as pd
import pyarrow as pa
from charset_normalizer import from_bytes

from closedloop.adapters.openpyxl import list_sheets, read_rows
from closedloop.config.sources import FileSource, SqlSource
from closedloop.core.features.parsing import TIME
from closedloop.core.features.profiles import POINT
from closedloop.errors import DataError, count_noun
from closedloop.files import VARIABLE_PATTERN, names_table
from closedloop.tabular.csv_files import find_broken_lines
from closedloop.tabular.describe.alphabets import PAGES, find_page
from closedloop.tabular.row_tables import select_all
from closedloop.tabular.rows import RowFile, find_format
from closedloop.tabular.sources import list_files, read_chunks

ROWS_MAX, LINES_TRIED, BROKEN_SHOWN = 1_000_000, 500, 10
DELIMITERS = (",", ";", "\t", "|", "^", "~")
BLOCK_BYTES = 1 << 20
# tried where the bytes are neither UTF-8 nor of a Latin page; of those that read the same the first is taken
ENCODINGS = ("cp932", "euc_jp", "gb18030", "big5", "cp949", "cp1251", "cp1253", "cp1255", "cp1256", "koi8_r", *PAGES)
BESIDE_WORDS = re.compile(rb"[\t\r\n ,;\"]+")  # none of these is the second byte of a character
INDEX_NAME = re.compile(r"(?:Unnamed: \d+|__index_level_\d+__|)")  # of an index that pandas wrote


def read_table(place: str, notes: list[str]) -> tuple[FileSource | SqlSource, pd.DataFrame]:
    """The source that ``place`` names (a file, folder or pattern, or ``VARIABLE#table``), and its rows.

    Raises
    ------
    DataError
        If it cannot be read as a table with a header.
    ConfigError
        If a database's variable is not set, or its driver is missing.
    """
    table = re.fullmatch(rf"({VARIABLE_PATTERN})#([\w.]+)", place)
    if table and names_table(place):
        source: FileSource | SqlSource = SqlSource(
            type="sql", url_variable=table[1], query=select_all(table[1], table[2])
        )
        names: list[str] = []
    else:
        source, names = _look_at_file(place, notes)
    parts, rows = [], 0
    for _, _, part in read_chunks(source, None, names):
        parts.append(part)
        rows += len(part)
        if rows >= ROWS_MAX:
            notes.append(f"only the first {count_noun(rows, 'row')} were looked at")
            break
    if not rows:
        raise DataError(f"{place}: there are column names, but no rows")
    frame = pd.concat([part for part in parts if len(part)], ignore_index=True)
    if isinstance(source, FileSource) and source.type != "parquet":
        frame = frame.apply(lambda cells: cells.str.strip())
    return source, frame


def _look_at_file(place: str, notes: list[str]) -> tuple[FileSource, list[str]]:
    """The source of a file, or of the files of a folder or pattern, and the columns that can be read."""
    folder = Path(place).expanduser()
    kinds: tuple[str, ...] = ("csv", "parquet", "excel")
    if folder.is_dir():
        kinds = tuple(kind for kind in kinds if any(find_format(file) == kind for file in folder.iterdir())) or kinds
    first = list_files(place, f".{kinds[0]}", key="the source")[0]
    with first.open("rb") as stream:
        is_parquet = stream.read(4) == b"PAR1"
    if is_parquet:
        source = FileSource(type="parquet", path=place)
        return source, _choose_names(RowFile(first, source), notes)
    if find_format(first) == "excel":
        return FileSource(type="excel", path=place), _look_at_sheet(first, notes)
    source = find_text_format(first).model_copy(update={"path": place})
    for file in list_files(place, ".csv", key="the source"):
        if broken := list(islice(find_broken_lines(file, source), BROKEN_SHOWN + 1)):
            more = "\n  and more" if len(broken) > BROKEN_SHOWN else ""
            raise DataError(f"{file}:\n  " + "\n  ".join(broken[:BROKEN_SHOWN]) + more)
    if source.delimiter != ",":
        notes.append(f"the cells are parted by {source.delimiter!r}: source.delimiter")
    if source.encoding != "utf-8":
        notes.append(f"the bytes are no UTF-8 but {source.encoding} (guessed): source.encoding")
    return source, _choose_names(RowFile(first, source), notes)


def _look_at_sheet(path: Path, notes: list[str]) -> list[str]:
    """The columns of a workbook's first sheet that can be read."""
    sheet, *others = list_sheets(path)
    if others:
        notes.append(f"the sheet {sheet!r} is read, not {', '.join(map(repr, others))}: source.sheet names another")
    file = RowFile(path, FileSource(type="excel"))
    rows = [[cell or "" for cell in cells] for _, cells in islice(read_rows(path), LINES_TRIED)]
    _require_header(path, [file.schema.names, *rows[1:]])
    return _choose_names(file, notes)


def _choose_names(file: RowFile, notes: list[str]) -> list[str]:
    names = list(file.schema.names)
    twice = sorted({name for name in names if names.count(name) > 1 and name})
    if twice:
        notes.append(f"{', '.join(map(repr, twice))} stands there more than once: left out; rename all but one")
    if any(INDEX_NAME.fullmatch(name) for name in names):
        notes.append("a column without a name (the index of a data frame?) is left out")
    return [name for name in names if name not in twice and not INDEX_NAME.fullmatch(name)]


def find_text_format(path: Path) -> FileSource:
    """Encoding and delimiter of a CSV file.

    Raises
    ------
    DataError
        If its first line is no header of the lines below it.
    """
    encoding = _find_encoding(path)
    with pa.input_stream(path, compression="detect") as stream:
        block = stream.read(BLOCK_BYTES)
    text = codecs.decode(block, "utf-8-sig" if encoding == "utf-8" else encoding, "replace")
    if len(block) == BLOCK_BYTES:
        text = text[: max(text.rfind("\n"), text.rfind("\r")) + 1]
    tried = {mark: _read_lines(text, mark) for mark in DELIMITERS}
    # Commas may be decimal marks: the header has none of these, and so another number of cells.
    delimiter = max(DELIMITERS, key=lambda mark: _score_lines(tried[mark]))
    _require_header(path, tried[delimiter])
    return FileSource(type="csv", encoding=encoding, delimiter=delimiter)


def _find_encoding(path: Path) -> str:
    block = next(_read_blocks(path), b"")
    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if not block:
        raise DataError(f"{path}: the file is empty; a header line with column names is required")
    if b"\0" in block[:1000]:
        return "utf-16-le"
    if (odd := _find_undecodable(path, "utf-8")) is None:
        return "utf-8"
    # ASCII tells nothing, and there may be much of it
    words = [word for word in BESIDE_WORDS.split(odd) if not word.isascii()]
    ranked = [page] if (page := find_page(words)) else []
    found = from_bytes(b"\n".join(words), cp_isolation=[*ENCODINGS]).best()
    fitting = found.could_be_from_charset if found else []
    ranked += [*(name for name in ENCODINGS if name in fitting), "cp1252"]
    return next((name for name in ranked if _find_undecodable(path, name) is None), "latin-1")


def _read_blocks(path: Path) -> Iterator[bytes]:
    with pa.input_stream(path, compression="detect") as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block


def _find_undecodable(path: Path, encoding: str) -> bytes | None:
    """The first block with bytes that are not of the encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    for block in _read_blocks(path):
        try:
            decoder.decode(block)
        except UnicodeDecodeError:
            return block
    return None


def _read_lines(text: str, delimiter: str) -> list[list[str]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    return [cells for cells, _ in zip((cells for cells in reader if cells), range(LINES_TRIED), strict=False)]


def _find_width(lines: list[list[str]]) -> int:
    return statistics.mode([len(cells) for cells in lines[1:]] or [len(lines[0])]) if lines else 0


def _score_lines(lines: list[list[str]]) -> tuple[bool, float, int]:
    width = _find_width(lines)
    if width < 2:
        return False, 0.0, 0
    return len(lines[0]) == width, round(sum(len(cells) == width for cells in lines) / len(lines), 2), width


def _require_header(path: Path, lines: list[list[str]]) -> None:
    if not lines:
        raise DataError(f"{path}: the file is empty; a header line with column names is required")
    width, header = _find_width(lines), lines[0]
    if len(header) != width:
        counts = f"line 1 has {count_noun(len(header), 'cell')}, most others have {width}"
        raise DataError(f"{path}: {counts}: delete what stands above the header, and give every column a name")
    data = [cell for cell in header if POINT.fullmatch(cell.strip()) or TIME.match(cell.strip())]
    if 2 * len(data) >= len(header):
        raise DataError(f"{path}: line 1 holds {', '.join(data[:3])}: a header line with column names is required")
