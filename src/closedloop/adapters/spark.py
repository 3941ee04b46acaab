"""Spark through Ibis: evaluate the same expressions as DuckDB on the machines of a cluster, with the same values."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from closedloop.core.features.as_of import ASKED_COLUMNS, KEYS, join_as_of
from closedloop.errors import ClosedloopError, ConfigError, DataError, ServiceUnavailable

if TYPE_CHECKING:
    import ibis
    import pandas as pd
    import pyarrow as pa

    from closedloop.config.settings import SparkSettings

Item = TypeVar("Item")
Result = TypeVar("Result")
Shared = TypeVar("Shared")
SQL_TYPES = {
    "string": "STRING",
    "date": "DATE",
    "timestamp(6)": "TIMESTAMP_NTZ",
    "float64": "DOUBLE",
    "int64": "BIGINT",
    "int32": "INT",
}
# What results depend on: a cluster's own defaults must not change them.
FIXED = {
    "spark.sql.session.timeZone": "UTC",  # days begin at midnight UTC
    "spark.sql.ansi.enabled": "true",  # an overflow is an error, and no other number
    "spark.sql.caseSensitive": "true",
}
DEFAULTS = {
    "spark.log.level": "ERROR",
    "spark.sql.execution.arrow.pyspark.enabled": "true",  # frames go over in columns, not row by row
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}


def list_properties(settings: SparkSettings) -> dict[str, str]:
    """All that an application is started with."""
    return {**DEFAULTS, "spark.master": settings.master, **settings.properties, **FIXED}


class SparkEngine:
    """A Spark application on a cluster; its machines read the same paths as this one.

    Parameters
    ----------
    settings : SparkSettings
        The cluster, and properties of the application.
    threads : int
        How many queries run side by side.

    Raises
    ------
    ConfigError
        If Java is not installed, or the address is none.
    ServiceUnavailable
        If the cluster gives no application.
    """

    def __init__(self, settings: SparkSettings, *, threads: int = 2) -> None:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # the cluster's machines have the same environment
        import ibis
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession

        try:
            self.spark = SparkSession.builder.appName("closedloop").config(map=list_properties(settings)).getOrCreate()
            self._backend = ibis.pyspark.connect(self.spark)
        except Exception as error:  # PySpark's, py4j's, and Python's own where the driver's connection breaks
            if isinstance(error, PySparkException) or "Could not parse Master URL" in str(error):
                raise ConfigError(
                    f"engine: Spark at {settings.master} does not start ({_shorten(error)}); it needs Java 17 or 21, "
                    "and spark.master as Spark has it: local[2], spark://HOST:PORT, yarn"
                ) from error
            raise ServiceUnavailable(f"engine: Spark at {settings.master}: {_shorten(error)}") from error
        self.threads = threads
        self._stored: list[str] = []

    def __enter__(self) -> SparkEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the application: the cluster's machines are free again."""
        self.spark.stop()

    def compile(self, expression: ibis.Table) -> str:
        """Return the SQL of an expression."""
        return str(self._backend.compile(expression))

    @contextmanager
    def open_session(self) -> Iterator[SparkQueries]:
        """A session with names of its own; sessions may run in different threads."""
        yield SparkQueries(self.spark.newSession(), self._stored)

    def map(self, work: Callable[[SparkQueries, Item], Result], items: Sequence[Item]) -> list[Result]:
        """Run ``work`` on each item, ``threads`` at a time; results in the order of the items."""

        def run(item: Item) -> Result:
            with self.open_session() as session:
                return work(session, item)

        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(run, items))

    @property
    def cores(self) -> int:
        """How many tasks the cluster runs at once, as far as its executors have reported."""
        return int(self.spark.sparkContext.defaultParallelism)

    def spread(self, work: Callable[[Shared, int], bytes], shared: Shared) -> Callable[[int], bytes]:
        """Return a function that runs ``work(shared, item)`` on a machine of the cluster; for any number of threads.

        Each machine gets ``shared`` once, and a process there keeps the same object for all its items. An error of
        ours that ``work`` raises is raised here again, as a `DataError`; after any other the item is tried elsewhere.
        """
        sent = self.spark.sparkContext.broadcast(shared)

        def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            import pyarrow as pa

            for item in (item for batch in batches for item in batch.column(0).to_pylist()):
                found, error = b"", ""
                try:
                    found = work(sent.value, item)
                except ClosedloopError as ours:
                    error = str(ours)
                yield pa.RecordBatch.from_pydict({"found": [found], "error": [error]})

        def call(item: int) -> bytes:
            with explain_errors():
                one = self.spark.range(item, item + 1, numPartitions=1)
                [answer] = one.mapInArrow(run, "found binary, error string").collect()
            if answer.error:
                raise DataError(answer.error)
            return bytes(answer.found)

        return call

    def join_as_of(
        self, asked: pd.DataFrame, files: Sequence[Path], features: Mapping[str, str], *, max_age_days: int
    ) -> pd.DataFrame:
        """As `closedloop.core.features.as_of.join_as_of`, with the feature rows of Parquet files."""
        import ibis

        tables = {"asked": ASKED_COLUMNS, "rows": {**KEYS, **features}}
        unbound = {name: ibis.table(columns, name=name) for name, columns in tables.items()}
        with self.open_session() as session:
            session.bind_frame("asked", asked, tables["asked"])
            session.bind("rows", files, tables["rows"])
            joined = join_as_of(**unbound, max_age_days=max_age_days)
            frame: pd.DataFrame = session.read_table(self.compile(joined)).to_pandas()
        return frame


class SparkQueries:
    """As `closedloop.adapters.duckdb.DuckSession`; ``stored`` are the names that all sessions share."""

    def __init__(self, spark: Any, stored: list[str]) -> None:
        self._spark, self._stored = spark, stored
        for name in stored:
            spark.table(f"global_temp.{name}").createOrReplaceTempView(name)

    def bind(self, name: str, paths: Sequence[Path], columns: Mapping[str, str]) -> None:
        """Let ``name`` stand for Parquet files, in this session; without files it has no rows."""
        with explain_errors():
            if paths:
                frame = self._spark.read.parquet(*(path.resolve().as_uri() for path in paths))
            else:
                frame = self._spark.createDataFrame([], ", ".join(f"{_quote(column)} STRING" for column in columns))
            self._name(name, frame, columns)

    def bind_frame(self, name: str, rows: pd.DataFrame, columns: Mapping[str, str]) -> None:
        """Let ``name`` stand for the rows of a frame, in this session."""
        with explain_errors():
            self._name(name, self._spark.createDataFrame(rows), columns)

    def _name(self, name: str, frame: Any, columns: Mapping[str, str]) -> None:
        casts = [frame[_quote(column)].cast(SQL_TYPES[kind]).alias(column) for column, kind in columns.items()]
        frame.select(*casts).createOrReplaceTempView(name)

    def define(self, name: str, sql: str) -> None:
        """Let ``name`` stand for a query, in this session."""
        with explain_errors():
            self._spark.sql(sql).createOrReplaceTempView(name)

    def store(self, name: str, sql: str) -> None:
        """Compute a result once and let ``name`` stand for it, in this session and all that are opened later."""
        with explain_errors():
            frame = self._spark.sql(sql).cache()
            frame.createOrReplaceGlobalTempView(name)
            frame.createOrReplaceTempView(name)
        self._stored[:] = {*self._stored, name}

    def read_batches(self, sql: str) -> Iterator[pa.RecordBatch]:
        """Rows of a query; all of them come to this machine before the first is given."""
        yield from self.read_table(sql).to_batches()

    def read_frame(self, sql: str, schema: pa.Schema) -> pd.DataFrame:
        """Rows of a query as a frame, with these types."""
        frame: pd.DataFrame = self.read_table(sql).cast(schema).to_pandas()
        return frame

    def read_table(self, sql: str) -> pa.Table:
        """Rows of a query."""
        with explain_errors():
            return self._spark.sql(sql).toArrow()


@contextmanager
def explain_errors() -> Iterator[None]:
    """Say what Spark says in a line: its errors are PySpark's and py4j's, of hundreds of lines.

    Raises
    ------
    DataError
        If a query fails, on every machine that it was tried on.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("py4j", "pyspark"):  # compare names: neither may be installed
            raise
        raise DataError(f"engine: Spark: {_shorten(error)}") from error


def _quote(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _shorten(error: Exception) -> str:
    """Its message, without the places in Java."""
    return " ".join(str(error).split("\n\tat ")[0].split())[:500]
