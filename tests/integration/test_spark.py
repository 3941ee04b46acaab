"""Spark instead of DuckDB, by one setting: the same features, labels and training set, to the bit."""

from __future__ import annotations

import dataclasses
import datetime as dt
import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from closedloop.adapters import duckdb, spark
from closedloop.adapters.engines import Engine
from closedloop.adapters.feast import Features
from closedloop.config.featureset import FeatureSet
from closedloop.config.layout import Layout
from closedloop.config.settings import SparkSettings, load_settings
from closedloop.contract import digest_folder
from closedloop.errors import DataError, ServiceUnavailable
from closedloop.scoring.batch import BatchOptions, BatchResult, score_batch
from closedloop.scoring.remote import spread_chunks
from closedloop.serving.slots.slots import Slot
from closedloop.stages.features import write_window_features
from closedloop.stages.parts.snapshots import build_labels
from closedloop.stages.refresh import locate_work
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from closedloop.tabular.tables import write_event_days, write_table
from tests.conftest import SOURCE_ROOT, Project
from tests.integration.test_batch import make_rows
from tests.model_folders import write_model_folder
from tests.spark import LOCAL, SMALL, require_spark
from tests.unit.stages.test_features import AS_OF, SNAPSHOTS, SPEC, make_events

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(1800)]
# what a cluster's own defaults may say: none of it may change a value
FOREIGN = {"spark.sql.session.timeZone": "America/New_York", "spark.sql.ansi.enabled": "false"}


@pytest.fixture
def engine() -> Iterator[spark.SparkEngine]:
    """An application of each test's own: a process has one, and commands end it."""
    require_spark()
    with spark.SparkEngine(SparkSettings(master=LOCAL.master, properties=SMALL | FOREIGN), threads=2) as made:
        yield made


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw"))


def write_raw(folder: Path) -> Path:
    """Events of some months, a few of them just before and just after a midnight in UTC; and their customers."""
    events = make_events(rows=4_000)
    events.loc[::7, "time"] = events.loc[::7, "time"].dt.floor("D") + pd.Timedelta(microseconds=86_399_999_999)
    events.loc[::11, "time"] = events.loc[::11, "time"].dt.floor("D")
    events.loc[::13, "amount"] *= 1e6
    events.loc[::17, "amount"] = -0.1
    (folder / "events").mkdir()
    write_event_days(folder / "events", events)
    since = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(np.arange(39), unit="D") + pd.Timedelta(hours=23)
    known = {"customer_id": [f"c{number}" for number in range(39)], "age": np.arange(39), "plan": ["x", None, "y"] * 13}
    write_table(folder / "customers.parquet", pd.DataFrame(known | {"since": since.astype("datetime64[us, UTC]")}))
    return folder


def compute(engine: Engine, raw: Path, folder: Path, since: str | None) -> tuple[Layout, pd.DataFrame]:
    layout = dataclasses.replace(locate_work(folder), raw=raw)
    attributes: dict[str, Any] = {"age": "numeric", "plan": "categorical"}
    write_window_features(layout, engine, spec=SPEC, snapshots=SNAPSHOTS, attributes=attributes, since_column=since)
    labels = build_labels(layout.daily, spec=SPEC, snapshots=SNAPSHOTS[:1], horizon_days=30, as_of=AS_OF, engine=engine)
    return layout, labels


def require_equal_files(found: Path, expected: Path) -> int:
    """That two folders hold the same files, byte by byte; returns how many."""
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    same, differing, odd = filecmp.cmpfiles(found, expected, names, shallow=False)
    assert (differing, odd) == ([], [])
    return len(same)


def require_equal_features(found: Path, expected: Path) -> int:
    """As `require_equal_files`, but for what a file's footer says of the query, which has the engine's words."""
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    assert [name for name in names if not pq.read_table(found / name).equals(pq.read_table(expected / name))] == []
    return len(names)


COMPARE = {"daily": require_equal_files, "features": require_equal_features, "training": require_equal_files}


@pytest.mark.parametrize("since", [None, "since"])
def test_features_and_labels_are_those_of_duckdb_to_the_bit(since, engine, raw, tmp_path):
    with duckdb.DuckEngine(temp_directory=tmp_path / "spill") as other:
        expected, expected_labels = compute(other, raw, tmp_path / "duckdb", since)
    found, labels = compute(engine, raw, tmp_path / "spark", since)
    pd.testing.assert_frame_equal(labels, expected_labels, check_exact=True)
    assert require_equal_files(found.daily, expected.daily) == 12
    assert require_equal_features(found.features, expected.features) == 2
    assert len(labels) == 40


def test_a_sum_that_is_too_large_is_an_error_and_no_other_number(engine, tmp_path):
    steps = pd.DataFrame({"key": ["a", "a"], "steps": [2**62, 2**62]})
    steps.to_parquet(tmp_path / "steps.parquet")
    with engine.open_session() as session:
        session.bind("steps", [tmp_path / "steps.parquet"], {"key": "string", "steps": "int64"})
        with pytest.raises(DataError, match=r"engine: Spark: .*overflow"):
            list(session.read_batches("SELECT key, sum(steps) AS steps FROM steps GROUP BY key"))


def test_names_of_one_session_are_not_those_of_another(engine, tmp_path):
    with engine.open_session() as one, engine.open_session() as other:
        one.bind("nothing", [], {"key": "string", "day": "date"})
        assert sum(batch.num_rows for batch in one.read_batches("SELECT * FROM nothing")) == 0
        with pytest.raises(DataError, match="nothing"):
            list(other.read_batches("SELECT * FROM nothing"))


def test_a_damaged_file_is_a_data_error(engine, tmp_path):
    (tmp_path / "events.parquet").write_bytes(b"PAR1 and no more")
    with engine.open_session() as session, pytest.raises(DataError, match="engine: Spark: "):
        session.bind("events", [tmp_path / "events.parquet"], {"key": "string"})


DAYS = pd.to_datetime(["2024-01-01", "2024-02-01"], utc=True).as_unit("us")
FEE = "Fee (€) `x`"


@pytest.fixture
def stores(engine, make_project, tmp_path, monkeypatch) -> dict[str, Features]:
    """The same project, joined in either engine."""
    project, found = make_project(tmp_path / "project"), {}
    for kind in ("duckdb", "spark"):
        monkeypatch.setenv("CLOSEDLOOP_ENGINE__KIND", kind)
        settings = load_settings(folder=project.root / "configs")
        found[kind] = Features(
            settings, project="members", features=FeatureSet((FEE,), ("plan",), "members_1"), max_age_days=31
        )
    return found


@pytest.fixture
def features_dir(tmp_path) -> Path:
    folder = tmp_path / "features"
    folder.mkdir()
    for day, fees in zip(DAYS, ([1.5, None, 3.0], [2.5, 4.0, None]), strict=True):
        rows = {"customer_id": ["a", "b", "ü 1"], "event_timestamp": day, FEE: fees, "plan": ["x", None, "y"]}
        pd.DataFrame(rows).to_parquet(folder / f"{day:%Y-%m-%d}.parquet", index=False)
    return folder


def test_the_join_on_spark_has_the_values_of_feasts(stores, features_dir):
    """The newest row not after the asked time and within the age limit, whatever its values, names and ids."""
    limit, instant = dt.timedelta(days=31), dt.timedelta(microseconds=1)
    at = [DAYS[1], DAYS[0], DAYS[0], DAYS[1], DAYS[1] + limit, DAYS[1] + limit + instant, DAYS[1] - instant]
    asked = pd.DataFrame({"customer_id": ["ü 1", "a", "b", "a", "a", "a", "a"], "event_timestamp": at, "churned": True})
    expected, found = (stores[kind].read_historical(asked, features_dir) for kind in ("duckdb", "spark"))
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    assert found[FEE].fillna(-1).tolist() == [-1, 1.5, -1, 2.5, 2.5, -1, 1.5]


def test_a_customer_with_two_rows_of_a_time_is_refused_on_spark(stores, features_dir):
    pd.read_parquet(features_dir / "2024-01-01.parquet").to_parquet(features_dir / "2024-01-01-again.parquet")
    asked = pd.DataFrame({"customer_id": ["a"], "event_timestamp": [DAYS[0]]})
    with pytest.raises(DataError, match="returned 2 rows for 1 asked for"):
        stores["spark"].read_historical(asked, features_dir)


# --- through the commands ---------------------------------------------------------------------------------------------


def use_spark(monkeypatch: pytest.MonkeyPatch, settings: SparkSettings = LOCAL) -> None:
    """The one setting that is switched, and the cluster's address."""
    monkeypatch.setenv("CLOSEDLOOP_ENGINE__KIND", "spark")
    monkeypatch.setenv("CLOSEDLOOP_SPARK__MASTER", settings.master)
    monkeypatch.setenv("CLOSEDLOOP_SPARK__PROPERTIES", json.dumps(settings.properties))


def run_again(project: Project, stages: Callable[[str], Any]) -> None:
    """Delete what DuckDB made, and make it again."""
    for name in COMPARE:
        for path in (project.root / "data" / name).glob("*.parquet"):
            path.unlink()
    stages("features")
    stages("training-set")


def compare_tables(found: Project, expected: Project) -> dict[str, int]:
    """How many files of each kind were compared; all of them are equal."""
    return {
        name: compare(found.root / "data" / name, expected.root / "data" / name) for name, compare in COMPARE.items()
    }


def test_the_simulators_training_set_is_the_same(small_shop, shop_copy, monkeypatch):
    require_spark()
    use_spark(monkeypatch)
    run_again(shop_copy, shop_copy.run)
    counts = compare_tables(shop_copy, small_shop)
    assert counts["training"] == 3
    assert shop_copy.read_json("metrics/training_set.json") == small_shop.read_json("metrics/training_set.json")


@pytest.mark.real_data
def test_online_retails_training_set_is_the_same(real_data, make_project, tmp_path, monkeypatch):
    require_spark()
    made = make_project(tmp_path / "project")
    made.add_sources(".dvc")
    (made.root / "src").symlink_to(SOURCE_ROOT / "src")
    source = ["--dataset", "online_retail", "--source", str(real_data / "online-retail"), "--until", "training_set"]
    made.run("run", *source)
    expected = Project(made.root / "workspaces/online_retail").copy(tmp_path / "expected")
    use_spark(monkeypatch)
    found = Project(made.root / "workspaces/online_retail")
    run_again(found, found.run)
    assert compare_tables(found, expected)["training"] == 3
    assert found.read_json("metrics/training_set.json") == expected.read_json("metrics/training_set.json")


# --- batch scoring ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slot(tmp_path_factory: pytest.TempPathFactory) -> Slot:
    folder = write_model_folder(tmp_path_factory.mktemp("model") / "folder", bias=-0.5)
    return Slot("7", str(folder), digest_folder(folder))


def write_rows(folder: Path, count: int, ending: str = ".parquet") -> Path:
    """Rows in row groups that no chunk ends with; every 200th breaks the contract."""
    rows = make_rows(count)
    rows.loc[::200, "age"] = 1e9
    path = folder / f"in{ending}"
    if ending == ".csv":
        rows.to_csv(path, index=False)
    else:
        rows.to_parquet(path, row_group_size=130)
    return path


def score(source: Path, target: Path, slot: Slot, store: Predictions | None = None, **options: Any) -> BatchResult:
    noon = partial(dt.datetime, 2024, 3, 1, 12, tzinfo=dt.UTC)
    chosen = BatchOptions(
        **{"range_margin": 0.5, "id_key": b"a secret", "chunk_rows": 100, "clock": noon, "store": store} | options
    )
    return score_batch(str(source), str(target), slot, chosen, state_dir=target.parent / "state")


def read_predictions(store: Predictions) -> list[Any]:
    found = [one for some in store.read_predictions("test_churn") for one in some]
    return sorted((one.prediction_id, one.score, one.customer_id, one.predicted_at, one.features) for one in found)


def open_store(folder: Path) -> Predictions:
    database = Database(f"sqlite:///{folder / 'operations.db'}")
    database.upgrade()
    return Predictions(database)


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_a_batch_on_spark_is_that_of_this_machine_to_the_byte(ending, engine, slot, tmp_path):
    """Scores, ids, rejects and what is logged; the chunks are the same, whoever scores them."""
    results, stores = {}, {}
    for name, spread in (("here", None), ("there", partial(spread_chunks, engine))):
        folder = tmp_path / name
        folder.mkdir()
        stores[name] = open_store(folder)
        source = write_rows(tmp_path, 1_234, ending)
        results[name] = score(source, folder / "out.parquet", slot, stores[name], spread=spread, threads=3)
    here, there = results["here"], results["there"]
    assert (there.rows, there.scored, there.rejected) == (here.rows, here.scored, here.rejected) == (1_234, 1_227, 7)
    for name in ("out.parquet", "out.rejects.jsonl"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert read_predictions(stores["there"]) == read_predictions(stores["here"])
    assert len(read_predictions(stores["there"])) == 1_227


def test_a_batch_that_was_begun_here_is_finished_on_spark(engine, slot, tmp_path):
    """Each chunk is logged once, by whichever engine scored it."""
    source, store = write_rows(tmp_path, 1_000), open_store(tmp_path)
    broken = store.insert
    calls = []

    def fail_later(predictions: Any) -> Any:
        calls.append(len(predictions))
        if len(calls) > 4:
            raise ServiceUnavailable("the store is away")
        return broken(predictions)

    store.insert = fail_later  # type: ignore[method-assign]
    with pytest.raises(ServiceUnavailable):
        score(source, tmp_path / "out.parquet", slot, store)
    store.insert = broken  # type: ignore[method-assign]
    spread = partial(spread_chunks, engine)
    result = score(source, tmp_path / "out.parquet", slot, store, spread=spread, resume=True)
    assert (result.rows, result.rejected, result.resumed) == (1_000, 5, 400)
    assert len(read_predictions(store)) == 995


def test_a_model_that_is_another_on_the_cluster_is_refused(engine, slot, tmp_path):
    """Its digest and golden rows are checked there too, and the error comes here in words."""
    job = []

    def spread(path: Path, model: Any, options: Any, input_sha256: str) -> Any:
        job.append(dataclasses.replace(model, folder_sha256="0" * 64))
        return spread_chunks(engine, path, job[0], options, input_sha256)

    with pytest.raises(DataError, match=r"digest: .* the registry says 000000000000"):
        score(write_rows(tmp_path, 300), tmp_path / "out.parquet", slot, spread=spread)
    assert not (tmp_path / "out.parquet").exists()


# --- what is missing --------------------------------------------------------------------------------------------------


def start_engine(master: str, **environment: str) -> str:
    """What a process says that starts an engine."""
    require_spark()
    script = (
        "import sys\n"
        "from closedloop.adapters.spark import SparkEngine\n"
        "from closedloop.config.settings import SparkSettings\n"
        "from closedloop.errors import ClosedloopError\n"
        "try: SparkEngine(SparkSettings(master=sys.argv[1]), threads=1)\n"
        "except ClosedloopError as error: print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", script, master]
    kept = os.environ | environment
    return subprocess.run(command, env=kept, capture_output=True, text=True, check=True).stdout


def test_without_java_it_is_said_which_one_is_needed(tmp_path):
    for program in ("bash", "dirname", "ps"):
        (tmp_path / program).symlink_to(shutil.which(program) or "/")
    said = start_engine("local[1]", PATH=str(tmp_path), JAVA_HOME="")
    assert said.startswith("ConfigError engine: Spark at local[1] does not start")
    assert "it needs Java 17 or 21" in said


@pytest.mark.parametrize("master", ["sparc://here", "local[no]"])
def test_an_address_that_is_none_is_refused(master):
    said = start_engine(master)
    assert said.startswith(f"ConfigError engine: Spark at {master} does not start")
    assert "spark.master as Spark has it" in said
