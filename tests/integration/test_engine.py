from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from closedloop.adapters.duckdb import DuckEngine, DuckSession
from closedloop.errors import ConfigError, DataError
from closedloop.tabular.tables import GROUP_ROWS, write_batches

COLUMNS = {"key": "string", "value": "int64"}
SCHEMA = pa.schema([("key", pa.string()), ("value", pa.int64())])


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    with DuckEngine(memory_limit="200MB", threads=2, temp_directory=tmp_path / "spill") as made:
        yield made


def write_rows(path: Path, rows: int, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    keys = pa.array(np.char.add("key-of-some-length-", generator.integers(0, 10**9, rows).astype(str)))
    pq.write_table(pa.table({"key": keys, "value": generator.integers(0, 100, rows)}), path)
    return path


def read_setting(engine: DuckEngine, name: str) -> Any:
    with engine.open_session() as session:
        batch = next(session.read_batches(f"SELECT current_setting('{name}') AS value"))
        return batch.to_pylist()[0]["value"]


def test_settings_reach_duckdb(engine: DuckEngine, tmp_path: Path) -> None:
    assert read_setting(engine, "memory_limit") == "190.7 MiB"
    assert read_setting(engine, "threads") == 2
    assert read_setting(engine, "temp_directory") == str(tmp_path / "spill")


@pytest.mark.parametrize("settings", [{"memory_limit": "a lot"}, {"threads": 0}])
def test_settings_that_duckdb_refuses_are_config_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="engine"):
        DuckEngine(**settings)


def test_more_than_memory_holds_is_spilled(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.parquet", 1_500_000)
    spilled = []
    with DuckEngine(memory_limit="60MB", threads=1, temp_directory=tmp_path / "spill") as engine:
        table = ibis.table(COLUMNS, name="rows")
        sql = engine.compile(table.order_by("key", "value"))
        with engine.open_session() as session:
            session.bind("rows", [path], COLUMNS)
            batches = session.read_batches(sql)
            previous, rows = "", 0
            for batch in batches:
                spilled.append(any((tmp_path / "spill").iterdir()) if (tmp_path / "spill").exists() else False)
                keys = batch.column("key")
                assert previous <= keys[0].as_py() <= keys[-1].as_py()
                previous, rows = keys[-1].as_py(), rows + len(batch)
    assert rows == 1_500_000
    assert any(spilled)


def test_too_little_memory_names_the_setting(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.parquet", 300_000)
    with DuckEngine(memory_limit="1MB", threads=1, temp_directory=tmp_path / "spill") as engine:
        sql = engine.compile(ibis.table(COLUMNS, name="rows").order_by("key"))
        with engine.open_session() as session:
            session.bind("rows", [path], COLUMNS)
            with pytest.raises(ConfigError, match="memory_limit is too small"):
                list(session.read_batches(sql))


def test_no_files_are_no_rows(engine: DuckEngine) -> None:
    with engine.open_session() as session:
        session.bind("rows", [], COLUMNS)
        frame = session.read_frame(engine.compile(ibis.table(COLUMNS, name="rows")), SCHEMA)
    assert frame.empty
    assert frame.columns.tolist() == ["key", "value"]


def test_times_lose_their_zone_and_keep_their_moment(engine: DuckEngine, tmp_path: Path) -> None:
    zone = pa.timestamp("us", tz="America/New_York")
    pq.write_table(pa.table({"time": pa.array([-1, 1_700_000_000_123_456], zone)}), tmp_path / "times.parquet")
    with engine.open_session() as session:
        session.bind("times", [tmp_path / "times.parquet"], {"time": "timestamp(6)"})
        table = ibis.table({"time": "timestamp(6)"}, name="times")
        rows = next(session.read_batches(engine.compile(table.mutate(day=table.time.date())))).to_pylist()
    assert [str(row["time"]) for row in rows] == ["1969-12-31 23:59:59.999999", "2023-11-14 22:13:20.123456"]
    assert [str(row["day"]) for row in rows] == ["1969-12-31", "2023-11-14"]


def test_names_with_quotes_are_names(engine: DuckEngine, tmp_path: Path) -> None:
    path = tmp_path / "it's.parquet"
    pq.write_table(pa.table({'a "b"': [1, 2]}), path)
    with engine.open_session() as session:
        session.bind("odd; name", [path], {'a "b"': "int64"})
        table = ibis.table({'a "b"': "int64"}, name="odd; name")
        assert next(session.read_batches(engine.compile(table))).to_pydict() == {'a "b"': [1, 2]}


def test_what_cannot_be_read_is_a_data_error(engine: DuckEngine, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.parquet", 10)
    with engine.open_session() as session:
        with pytest.raises(DataError, match="missing_column"):
            session.bind("rows", [path], {"missing_column": "string"})
        with pytest.raises(DataError, match="nowhere"):
            session.bind("rows", [tmp_path / "nowhere.parquet"], COLUMNS)
        session.bind("rows", [path], {"key": "int64"})
        with pytest.raises(DataError, match="key-of-some-length"):
            list(session.read_batches('SELECT "key" FROM "rows"'))


def test_map_runs_side_by_side_in_order_with_views_of_their_own(engine: DuckEngine, tmp_path: Path) -> None:
    paths = [write_rows(tmp_path / f"{number}.parquet", 10 + number, number) for number in range(5)]
    both = threading.Barrier(2, timeout=180)
    sql = engine.compile(ibis.table(COLUMNS, name="rows"))

    def count(session: DuckSession, path: Path) -> int:
        session.bind("rows", [path], COLUMNS)
        if path.stem in ("0", "1"):
            both.wait()  # breaks unless two run at the same time
        return sum(len(batch) for batch in session.read_batches(sql))

    assert engine.map(count, paths) == [10, 11, 12, 13, 14]
    assert engine.map(count, []) == []
    assert read_setting(engine, "threads") == 2


def test_map_stops_at_a_failure(engine: DuckEngine) -> None:
    started = []

    def fail(session: DuckSession, item: int) -> None:
        started.append(item)
        if item == 0:
            raise DataError("item 0")
        time.sleep(0.01)

    with pytest.raises(DataError, match="item 0"):
        engine.map(fail, list(range(1000)))
    assert len(started) < 1000
    assert read_setting(engine, "threads") == 2


def test_a_stored_result_is_seen_by_every_session(engine: DuckEngine) -> None:
    with engine.open_session() as session:
        session.store("answer", "SELECT 42::BIGINT AS value")
    with engine.open_session() as session:
        assert next(session.read_batches('SELECT "value" FROM answer')).to_pydict() == {"value": [42]}


def test_bytes_do_not_depend_on_how_rows_are_batched(tmp_path: Path) -> None:
    table = pq.read_table(write_rows(tmp_path / "rows.parquet", 2 * GROUP_ROWS + 17)).cast(SCHEMA)
    written = []
    for rows in (1000, GROUP_ROWS, GROUP_ROWS + 1, len(table)):
        path = tmp_path / f"{rows}.parquet"
        assert write_batches(path, iter(table.to_batches(rows)), SCHEMA, {b"key": b"value"}) == len(table)
        written.append(path.read_bytes())
    assert len(set(written)) == 1
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    assert groups == [GROUP_ROWS, GROUP_ROWS, 17]
    assert metadata.metadata[b"key"] == b"value"
    assert pq.read_table(path).equals(table)


def test_writing_nothing_writes_an_empty_table(tmp_path: Path) -> None:
    assert write_batches(tmp_path / "empty.parquet", iter([]), SCHEMA) == 0
    assert pq.read_table(tmp_path / "empty.parquet").schema.names == ["key", "value"]
