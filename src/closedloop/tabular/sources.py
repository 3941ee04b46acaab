"""Other people's data, file by file or through a query: which of them to read, and their rows as frames."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from closedloop.config.sources import FileSource, SqlSource
from closedloop.errors import ConfigError, DataError
from closedloop.tabular.row_tables import read_query
from closedloop.tabular.rows import FORMATS, RowFile, find_format, name_columns, refuse_unread

logger = logging.getLogger(__name__)
CHUNK_ROWS = 500_000


def list_files(path: str, suffix: str, *, key: str = "data.source") -> list[Path]:
    """The files that a path names: itself, those in a folder (with ``suffix``), or those that a glob matches.

    In a folder the case of the ending does not matter, a compressed CSV file counts, and hidden files do not.
    ``key`` is the parameter that the path comes from, for the error.

    Raises
    ------
    DataError
        If it names none.
    """
    place, suffix = Path(path).expanduser(), ".xlsx" if suffix == ".excel" else suffix
    if place.is_dir():
        there = sorted(file for file in place.iterdir() if file.is_file())
        files = [file for file in there if find_format(file) == FORMATS[suffix] and not file.name.startswith(".")]
        if left_out := [file.name for file in there if file not in files]:
            logger.info("%s: no %s files, left out: %s", place, suffix, ", ".join(left_out)[:300])
    elif place.is_file():
        files = [place]
    else:
        files = sorted(Path(found) for found in glob.glob(str(place)))  # noqa: PTH207  the pattern may be absolute
    if not files:
        raise DataError(f"{key} {path!r}: no such file, no {suffix} file in such a folder, and no match as a glob")
    for file in files:
        refuse_unread(file)
    return files


def read_chunks(
    source: FileSource | SqlSource,
    path: str | None,
    columns: Sequence[str],
    *,
    all_columns: bool = False,
    rename: Mapping[str, str] | None = None,
    key: str = "data.source",
) -> Iterator[tuple[str, int, pd.DataFrame]]:
    """Yield (file name, number of the chunk's first row counted from 1, rows).

    Cells of CSV files and workbooks come as text, so that nothing is guessed; Parquet and SQL keep their types.

    Parameters
    ----------
    columns
        The names that must be there, and are read.
    all_columns
        Whether the others are read too.
    rename
        Names in the source, and those that they get here.

    Raises
    ------
    DataError
        If a file is missing, empty, not in its encoding, not parseable, or lacks a column or has it twice.
    ConfigError
        If no source is named, or the database's environment variable is not set.
    """
    names = dict(rename or {})
    if isinstance(source, SqlSource):
        yield from _read_query(source, columns, names, all_columns=all_columns)
        return
    chosen = path or source.path
    if chosen is None:
        role = key.removeprefix("data.")
        once = ", or make run DATASET=NAME SOURCE=PATH" if role == "source" else ""
        raise ConfigError(
            f"{key}: this data set has no path of its own; give one: {role}.path in configs/datasets/NAME.yaml{once}"
        )
    for path_ in list_files(chosen, f".{source.type}", key=key):
        file = RowFile(path_, source, rename=names, wanted=columns)
        _require_columns(path_.name, file.schema.names, columns, all_columns=all_columns)
        wanted = [name for name in file.schema.names if all_columns or name in columns]
        first = 1
        for table in file.read_chunks(wanted, CHUNK_ROWS):
            # as floats, long ids beside a null would become alike
            yield path_.name, first, table.to_pandas(integer_object_nulls=True)
            first += len(table)


def _read_query(
    source: SqlSource, columns: Sequence[str], names: Mapping[str, str], *, all_columns: bool
) -> Iterator[tuple[str, int, pd.DataFrame]]:
    first = 1
    for found, rows in read_query(source.url_variable, source.query, chunk_rows=CHUNK_ROWS):
        found = name_columns(found, names, columns)
        _require_columns("the query", found, columns, all_columns=all_columns)
        # objects: pandas would make floats of whole numbers beside a NULL
        yield "query", first, pd.DataFrame(list(rows), columns=found, dtype=object)
        first += len(rows)


def _require_columns(place: str, found: Sequence[str], columns: Sequence[str], *, all_columns: bool) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        hint = ""
        if len(found) == 1 and any(character in found[0] for character in ";\t|"):
            hint = "; is source.delimiter right?"
        raise DataError(f"{place}: no column {', '.join(map(repr, missing))}; its columns: {', '.join(found)}{hint}")
    repeated = sorted({name for name in found if found.count(name) > 1 and (all_columns or name in columns)})
    if repeated:
        raise DataError(f"{place}: more than one column {', '.join(map(repr, repeated))}; rename all but one of them")
