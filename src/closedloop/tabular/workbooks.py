"""Sheets of Excel workbooks as tables of text: a header, and as many cells in each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from closedloop.adapters.openpyxl import read_rows
from closedloop.errors import DataError, count_noun

BATCH_ROWS = 10_000


def read_header(path: Path, sheet: str | None) -> list[str]:
    """The names in the first row that is not empty; a cell without a name in its midst is ''.

    Raises
    ------
    DataError
        If the sheet is empty, or the file cannot be read.
    ConfigError
        If what reads it is not installed.
    """
    _, cells = next(read_rows(path, sheet), (0, []))
    if not cells:
        raise DataError(f"{path}: the sheet is empty; a header row with column names is required")
    return [cell or "" for cell in _trim(cells)]


def read_batches(path: Path, sheet: str | None, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The columns of these names, in their order, as text; an empty cell is null, and a row of them is left out.

    Raises
    ------
    DataError
        With file and row, where one has cells beside those of the header.
    """
    header = read_header(path, sheet)
    places = [header.index(name) for name in columns]
    schema = pa.schema([(name, pa.string()) for name in columns])
    held: list[list[str | None]] = []
    rows = read_rows(path, sheet)
    next(rows)
    for number, cells in rows:
        if len(_trim(cells)) > len(header):
            counts = f"it has {count_noun(len(_trim(cells)), 'cell')}, the header has {len(header)}"
            raise DataError(f"{path}, row {number}: {counts}; give every column a name, and take away notes beside")
        held.append([cells[place] if place < len(cells) else None for place in places])
        if len(held) == BATCH_ROWS:
            yield _to_batch(held, schema)
            held = []
    if held:
        yield _to_batch(held, schema)


def count_rows(path: Path, sheet: str | None) -> int:
    """The number of rows below the header that are not empty."""
    return max(0, sum(1 for _ in read_rows(path, sheet)) - 1)


def _trim(cells: list[str | None]) -> list[str | None]:
    """Without the empty cells at its end."""
    width = max((place for place, cell in enumerate(cells, 1) if cell is not None), default=0)
    return cells[:width]


def _to_batch(rows: list[list[str | None]], schema: pa.Schema) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if schema.names else ()
    return pa.RecordBatch.from_arrays([pa.array(column, pa.string()) for column in columns], schema=schema)
