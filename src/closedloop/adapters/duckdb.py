"""DuckDB through Ibis: evaluate expressions over Parquet files within a memory limit, with the same bytes each time."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from closedloop.errors import ConfigError, DataError

if TYPE_CHECKING:
    import ibis
    import pandas as pd

Item = TypeVar("Item")
Result = TypeVar("Result")
BATCH_ROWS = 1 << 17
SQL_TYPES = {
    "string": "VARCHAR",
    "date": "DATE",
    "timestamp(6)": "TIMESTAMP",
    "float64": "DOUBLE",
    "int64": "BIGINT",
    "int32": "INTEGER",
}


class DuckEngine:
    """An in-memory DuckDB that reads Parquet and spills what does not fit.

    Parameters
    ----------
    memory_limit : str
        DuckDB's memory limit, such as ``"2GB"``; it spills the rest to ``temp_directory``.
    threads : int
        At least 1; results do not depend on it.
    temp_directory : Path, optional
        Where to spill; DuckDB's default (``.tmp`` in the working directory) if not given.

    Raises
    ------
    ConfigError
        If DuckDB refuses a setting.
    """

    def __init__(self, *, memory_limit: str = "2GB", threads: int = 2, temp_directory: Path | None = None) -> None:
        import duckdb
        import ibis

        settings: dict[str, Any] = {"memory_limit": memory_limit, "threads": threads}
        if temp_directory is not None:
            settings["temp_directory"] = str(temp_directory)
        try:
            self._backend = ibis.duckdb.connect(":memory:", **settings)
        except duckdb.Error as error:
            raise ConfigError(f"engine: {error}") from error
        self.threads = threads

    def __enter__(self) -> DuckEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory and delete spilled files."""
        self._backend.disconnect()

    def compile(self, expression: ibis.Table) -> str:
        """Return the SQL of an expression; compile an expression once if it runs over many files."""
        return str(self._backend.compile(expression))

    @contextmanager
    def open_session(self) -> Iterator[DuckSession]:
        """A connection of its own to the same database; sessions may run in different threads."""
        cursor = self._backend.con.cursor()
        try:
            yield DuckSession(cursor)
        finally:
            cursor.close()

    def map(self, work: Callable[[DuckSession, Item], Result], items: Sequence[Item]) -> list[Result]:
        """Run ``work`` on each item, as many at a time as there are threads; results in the order of the items.

        Threads are split between the items: whole queries side by side cost less than many threads in one query.
        """
        workers = max(1, min(self.threads, len(items)))
        idle: queue.SimpleQueue[DuckSession] = queue.SimpleQueue()

        def run(item: Item) -> Result:
            session = idle.get()
            try:
                return work(session, item)
            finally:
                idle.put(session)

        with ExitStack() as stack:
            self._set_query_threads(max(1, self.threads // workers))
            stack.callback(self._set_query_threads, self.threads)
            for _ in range(workers):
                idle.put(stack.enter_context(self.open_session()))
            pool = stack.enter_context(ThreadPoolExecutor(workers))
            futures = [pool.submit(run, item) for item in items]
            # after a failure start no new item, and wait for the running ones
            stack.callback(lambda: [future.cancel() for future in futures])
            return [future.result() for future in futures]

    def _set_query_threads(self, threads: int) -> None:
        self._backend.con.execute(f"SET threads = {threads}")


class DuckSession:
    """One connection: binds names to Parquet files, and runs SQL over them."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def close(self) -> None:
        """Close the connection; the database stays."""
        self._connection.close()

    def bind(self, name: str, paths: Sequence[Path], columns: Mapping[str, str]) -> None:
        """Let ``name`` stand for Parquet files, in this session; without files it has no rows.

        ``columns`` are names and Ibis types. A timestamp there has no zone and is the UTC time of the file's.
        """
        if not paths:
            empty = ", ".join(f"NULL::{SQL_TYPES[kind]} AS {_quote(column)}" for column, kind in columns.items())
            self.define(name, f"SELECT {empty} WHERE false")
            return
        casts = ", ".join(_cast_column(column, kind) for column, kind in columns.items())
        files = ", ".join("'" + str(path).replace("'", "''") + "'" for path in paths)
        self.define(name, f"SELECT {casts} FROM read_parquet([{files}])")  # noqa: S608 - all names are quoted

    def define(self, name: str, sql: str) -> None:
        """Let ``name`` stand for a query, in this session."""
        self._run(f"CREATE OR REPLACE TEMP VIEW {_quote(name)} AS {sql}")

    def store(self, name: str, sql: str) -> None:
        """Compute a result once and let ``name`` stand for it, in every session."""
        self._run(f"CREATE OR REPLACE TABLE {_quote(name)} AS {sql}")

    def read_batches(self, sql: str) -> Iterator[pa.RecordBatch]:
        """Rows of a query, batch by batch."""
        import duckdb

        try:
            yield from self._run(sql).to_arrow_reader(BATCH_ROWS)
        except duckdb.Error as error:
            raise _translate(error) from error

    def read_frame(self, sql: str, schema: pa.Schema) -> pd.DataFrame:
        """Rows of a query as a frame, with these types."""
        batches = [batch.cast(schema) for batch in self.read_batches(sql)]
        frame: pd.DataFrame = pa.Table.from_batches(batches, schema).to_pandas()
        return frame

    def _run(self, sql: str) -> Any:
        import duckdb

        try:
            return self._connection.execute(sql)
        except duckdb.Error as error:
            raise _translate(error) from error


def _cast_column(column: str, kind: str) -> str:
    quoted = _quote(column)
    if SQL_TYPES[kind] == "TIMESTAMP":
        # a cast would need DuckDB's time zone extension, which is not installed with it, and calendars for each row
        return f"make_timestamp(epoch_us({quoted})) AS {quoted}"
    return f"CAST({quoted} AS {SQL_TYPES[kind]}) AS {quoted}"


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _translate(error: Exception) -> Exception:
    import duckdb

    message = str(error).strip().splitlines()[0]
    if isinstance(error, duckdb.OutOfMemoryException):
        return ConfigError(f"engine: memory_limit is too small for this step ({message})")
    return DataError(f"engine: {message}")
