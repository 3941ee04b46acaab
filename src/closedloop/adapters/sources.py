"""Other people's data: CSV and Parquet files or a database, read in chunks of text rows."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from closedloop.dataset import FileSource, SqlSource
from closedloop.errors import ConfigError, DataError

logger = logging.getLogger(__name__)
CHUNK_ROWS = 500_000


def list_files(path: str, suffix: str, *, key: str = "data.source") -> list[Path]:
    """The files that a path names: itself, those in a folder (with ``suffix``), or those that a glob matches.

    ``key`` is the parameter that the path comes from, for the error.

    Raises
    ------
    DataError
        If it names none.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(place.glob(f"*{suffix}"))
    elif place.is_file():
        files = [place]
    else:
        files = sorted(Path(found) for found in glob.glob(str(place)))  # noqa: PTH207  the pattern may be absolute
    if not files:
        raise DataError(f"{key} {path!r}: no such file, no {suffix} file in such a folder, and no match as a glob")
    return files


def read_chunks(
    source: FileSource | SqlSource, path: str | None, columns: list[str] | None, *, key: str = "data.source"
) -> Iterator[tuple[str, int, pd.DataFrame]]:
    """Yield (file name, number of the chunk's first row counted from 1, rows); ``columns`` None reads all of them.

    CSV cells come as text, so that nothing is guessed; Parquet and SQL keep their types.

    Raises
    ------
    DataError
        If a file is missing, empty, not in its encoding, not parseable, or lacks a column.
    ConfigError
        If no source is named, or the database's environment variable is not set.
    """
    if isinstance(source, SqlSource):
        yield from _read_query(source, columns)
        return
    chosen = path or source.path
    if chosen is None:
        raise ConfigError(
            f"{key}: this data set has no path of its own; give one (make run SOURCE=..., or params.yaml)"
        )
    for file in list_files(chosen, f".{source.type}", key=key):
        first = 1
        for chunk in _read_file(file, source):
            _require_columns(file.name, chunk, columns)
            yield file.name, first, chunk.reset_index(drop=True)
            first += len(chunk)


def _read_file(file: Path, source: FileSource) -> Iterator[pd.DataFrame]:
    try:
        if source.type == "parquet":
            import pyarrow.parquet as pq

            for batch in pq.ParquetFile(file).iter_batches(CHUNK_ROWS):
                yield batch.to_pandas(integer_object_nulls=True)  # as floats, long ids would become alike
            return
        with pd.read_csv(
            file,
            dtype=str,
            keep_default_na=False,
            na_values=[""],
            encoding=source.encoding,
            sep=source.delimiter,
            chunksize=CHUNK_ROWS,
            on_bad_lines="error",
        ) as reader:
            yield from reader
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{file}: the file is empty; a header line with column names is required") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: byte {error.start} is not {source.encoding}; re-save the file, or set source.encoding"
        ) from error
    except (OSError, ValueError, LookupError) as error:  # ParserError and ArrowInvalid are ValueErrors
        raise DataError(f"{file}: cannot be read as {source.type}: {' '.join(str(error).split())}") from error


def _unmask(values: pd.Series) -> pd.Series:
    """A column of pandas' nullable types as it comes from a file: whole numbers stay whole beside a NULL."""
    if pd.api.types.is_float_dtype(values):
        return values.astype("float64")
    if isinstance(values.dtype, np.dtype | pd.DatetimeTZDtype):
        return values
    return values.astype(object).where(values.notna(), None)


def _read_query(source: SqlSource, columns: list[str] | None) -> Iterator[tuple[str, int, pd.DataFrame]]:
    import sqlalchemy

    address = os.environ.get(source.url_variable)
    if not address:
        raise ConfigError(f"source.url_variable: the environment variable {source.url_variable} is not set")
    try:
        engine = sqlalchemy.create_engine(address)
        with engine.connect().execution_options(stream_results=True) as connection:
            first = 1
            query = sqlalchemy.text(source.query)
            for chunk in pd.read_sql(query, connection, chunksize=CHUNK_ROWS, dtype_backend="numpy_nullable"):
                _require_columns("the query", chunk, columns)
                yield "query", first, chunk.apply(_unmask)
                first += len(chunk)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"source.url_variable: the address in {source.url_variable} needs the Python package {error.name}, "
            "which is not installed"
        ) from None
    except (sqlalchemy.exc.SQLAlchemyError, ValueError) as error:  # a port that is no number is a bare ValueError
        # the driver's own words, without the address, which holds a password
        cause = getattr(error, "orig", None) or type(error).__name__
        raise DataError(f"source.query ({source.url_variable}): {' '.join(str(cause).split())}") from None
    finally:
        if "engine" in locals():
            engine.dispose()


def _require_columns(place: str, rows: pd.DataFrame, columns: list[str] | None) -> None:
    missing = [column for column in columns or [] if column not in rows.columns]
    if missing:
        raise DataError(
            f"{place}: no column {', '.join(map(repr, missing))}; its columns: {', '.join(map(str, rows.columns))}"
        )
