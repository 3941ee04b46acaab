"""A Spark worker that is killed in the middle costs time, and no result."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from closedloop.adapters import duckdb, spark
from closedloop.contract import digest_folder
from closedloop.scoring.remote import spread_chunks
from closedloop.serving.slots.slots import Slot
from tests.integration.test_spark import (
    compute,
    open_store,
    read_predictions,
    require_equal_features,
    require_equal_files,
    score,
    write_raw,
    write_rows,
)
from tests.model_folders import write_model_folder
from tests.spark import Cluster, run_cluster

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(1800)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "cluster").mkdir()
    with run_cluster(tmp_path / "cluster") as made:
        yield made


def kill_when(happened: Callable[[], bool], cluster: Cluster) -> Callable[[], int]:
    """Kill a worker with its executor as soon as something has happened; returns how many processes died."""
    killed: list[int] = []

    def watch() -> None:
        while not happened():
            time.sleep(0.01)
        killed.append(cluster.kill("worker1"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def join() -> int:
        thread.join(300)
        return killed[0]

    return join


def test_features_are_the_same_although_a_worker_is_killed(cluster, tmp_path):
    (tmp_path / "raw").mkdir()
    raw = write_raw(tmp_path / "raw")
    with duckdb.DuckEngine(temp_directory=tmp_path / "spill") as other:
        expected, expected_labels = compute(other, raw, tmp_path / "duckdb", None)
    daily = tmp_path / "spark" / "daily"
    join = kill_when(lambda: daily.is_dir() and len(list(daily.glob("[0-9]*.parquet"))) >= 3, cluster)
    with spark.SparkEngine(cluster.settings, threads=2) as engine:
        found, labels = compute(engine, raw, tmp_path / "spark", None)
    assert join() >= 1, "the worker ran no executor"
    pd.testing.assert_frame_equal(labels, expected_labels, check_exact=True)
    assert require_equal_files(found.daily, expected.daily) == 12
    assert require_equal_features(found.features, expected.features) == 2


def test_a_batch_is_the_same_although_a_worker_is_killed(cluster, tmp_path):
    folder = write_model_folder(tmp_path / "model", bias=-0.5)
    slot = Slot("7", str(folder), digest_folder(folder))
    source = write_rows(tmp_path, 3_000)
    score(source, tmp_path / "here.parquet", slot)
    work_dir = tmp_path / ".there.parquet.batch"
    join = kill_when(lambda: work_dir.is_dir() and len(list(work_dir.glob("*.part"))) >= 5, cluster)
    store = open_store(tmp_path)
    with spark.SparkEngine(cluster.settings, threads=2) as engine:
        score(source, tmp_path / "there.parquet", slot, store, spread=partial(spread_chunks, engine), threads=2)
        left = engine.spark.sparkContext._jsc.sc().getExecutorMemoryStatus().size() - 1
    assert join() >= 1, "the worker ran no executor"
    assert left == 1, "nobody was missed"
    assert (tmp_path / "there.parquet").read_bytes() == (tmp_path / "here.parquet").read_bytes()
    assert (tmp_path / "there.rejects.jsonl").read_bytes() == (tmp_path / "here.rejects.jsonl").read_bytes()
    assert len(read_predictions(store)) == 2_985
