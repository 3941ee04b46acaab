from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from closedloop.adapters.duckdb import DuckEngine
from closedloop.config.layout import Layout
from closedloop.core.features.windows import AGGREGATIONS, WindowSpec, feature_names
from closedloop.errors import ConfigError, DataError
from closedloop.stages.features import write_window_features
from closedloop.stages.parts.daily import update_daily
from closedloop.stages.parts.snapshots import build_labels
from closedloop.tabular.tables import EVENT_SCHEMA, write_event_days, write_table

SPEC = WindowSpec(
    event_types=("purchase", "login"),
    amount_types=("purchase",),
    label_event_type="purchase",
    window_days=(7, 30),
    aggregations=AGGREGATIONS,
    active_days=30,
    recency_cap_days=60,
    tenure_cap_days=90,
)
START = dt.datetime(2024, 1, 10, tzinfo=dt.UTC)
AS_OF = dt.datetime(2024, 4, 10, tzinfo=dt.UTC)
SNAPSHOTS = [AS_OF - dt.timedelta(days=30), AS_OF]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DuckEngine]:
    with DuckEngine(memory_limit="500MB", threads=2, temp_directory=tmp_path_factory.mktemp("spill")) as made:
        yield made


def make_events(seed: int = 1, rows: int = 1500) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    seconds = generator.integers(0, int((AS_OF - START).total_seconds()), rows)
    kinds = generator.choice(["purchase", "login", "unknown"], rows, p=[0.5, 0.4, 0.1])
    return pd.DataFrame(
        {
            "customer_id": [f"c{number}" for number in generator.integers(0, 40, rows)],
            "event_type": kinds,
            "time": pd.Series(pd.Timestamp(START) + pd.to_timedelta(seconds, unit="s")).astype("datetime64[us, UTC]"),
            "amount": np.where(kinds == "purchase", generator.normal(50, 30, rows), np.nan),
        }
    )


def write_events(folder: Path, events: pd.DataFrame) -> Path:
    folder.mkdir(parents=True)
    write_event_days(folder, events)
    return folder


@pytest.fixture
def events_dir(tmp_path: Path) -> Path:
    return write_events(tmp_path / "events", make_events())


@pytest.fixture
def customers_path(tmp_path: Path) -> Path:
    ids = [f"c{number}" for number in range(39)]  # c39 has events, but is not a known customer
    since = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(np.arange(39), unit="D") + pd.Timedelta(hours=23)
    table = {"customer_id": ids, "age": np.arange(39), "plan": ["x", None, "y"] * 13}
    write_table(tmp_path / "customers.parquet", pd.DataFrame({**table, "since": since.astype("datetime64[us, UTC]")}))
    return tmp_path / "customers.parquet"


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def aggregate_anew(events_dir: Path, engine: DuckEngine) -> dict[str, bytes]:
    folder = events_dir.parent / "anew"
    shutil.rmtree(folder, ignore_errors=True)
    update_daily(events_dir, folder, engine=engine)
    return read_bytes(folder)


def build(events_dir: Path, customers_path: Path, engine: DuckEngine, **changes: Any) -> dict[str, int]:
    root = events_dir.parent
    arguments: dict[str, Any] = {
        "spec": SPEC,
        "snapshots": SNAPSHOTS,
        "attributes": {"age": "numeric", "plan": "categorical"},
        "since_column": "since",
        **changes,
    }
    layout = Layout(raw=root, daily=root / "daily", features=root / "features")
    return write_window_features(layout, engine, **arguments)


def test_layout_months_then_days_of_the_newest_month(events_dir: Path, tmp_path: Path, engine: DuckEngine) -> None:
    update_daily(events_dir, tmp_path / "daily", engine=engine)
    names = sorted(path.stem for path in (tmp_path / "daily").iterdir())
    april = [f"2024-04-{day:02d}" for day in range(1, 10)]
    assert names == ["2024-01", "2024-02", "2024-03", *april]
    rows = sum(pq.read_table(path)["event_count"].to_pandas().sum() for path in (tmp_path / "daily").iterdir())
    assert rows == 1500


def _add_day(folder: Path) -> None:
    new = make_events(rows=20).assign(time=pd.Timestamp("2024-04-10T12:00", tz="UTC").as_unit("us"))
    write_event_days(folder, new)


def _roll_over(folder: Path) -> None:
    new = make_events(rows=20).assign(time=pd.Timestamp("2024-05-02T12:00", tz="UTC").as_unit("us"))
    write_event_days(folder, new)


def _change_old_day(folder: Path) -> None:
    path = folder / "2024-02-05.parquet"
    table = pq.read_table(path).to_pandas()
    # the statistics in the footer stay as they were: only the content's digest tells
    middle = table["amount"].dropna().sort_values().index[3]
    table.loc[middle, "amount"] += 0.5
    write_table(path, table, EVENT_SCHEMA)


def _delete_old_day(folder: Path) -> None:
    (folder / "2024-02-05.parquet").unlink()


def _delete_newest_month(folder: Path) -> None:
    for path in folder.glob("2024-04-*.parquet"):
        path.unlink()


def _keep(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "computed"),
    [
        (_keep, []),
        (_add_day, ["2024-04-10"]),
        (_roll_over, ["2024-04", "2024-05-02"]),
        (_change_old_day, ["2024-02"]),
        (_delete_old_day, ["2024-02"]),
        (_delete_newest_month, [f"2024-03-{day:02d}" for day in range(1, 32)]),
    ],
)
def test_an_update_equals_aggregates_from_scratch(
    change: Any, computed: list[str], events_dir: Path, tmp_path: Path, engine: DuckEngine
) -> None:
    daily = tmp_path / "daily"
    update_daily(events_dir, daily, engine=engine)
    before = {path.stem: path.stat().st_ino for path in daily.iterdir()}
    change(events_dir)
    assert update_daily(events_dir, daily, engine=engine) == len(computed)
    written = [path.stem for path in daily.iterdir() if before.get(path.stem) != path.stat().st_ino]
    assert sorted(written) == computed
    assert read_bytes(daily) == aggregate_anew(events_dir, engine)


def test_a_file_that_ingest_did_not_write_is_compared_by_content(
    events_dir: Path, tmp_path: Path, engine: DuckEngine
) -> None:
    path = events_dir / "2024-02-05.parquet"
    table = pq.read_table(path).replace_schema_metadata(None).to_pandas()
    plain: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.Table.from_pandas(table, schema=EVENT_SCHEMA, preserve_index=False), path, **plain)
    footer = path.read_bytes()[-300:]
    update_daily(events_dir, tmp_path / "daily", engine=engine)
    table.loc[table["amount"].notna().idxmax(), "amount"] = 1234.5
    pq.write_table(pa.Table.from_pandas(table, schema=EVENT_SCHEMA, preserve_index=False), path, **plain)
    assert path.read_bytes()[-300:] == footer
    assert update_daily(events_dir, tmp_path / "daily", engine=engine) == 1
    assert read_bytes(tmp_path / "daily") == aggregate_anew(events_dir, engine)


def test_whatever_a_kill_leaves_is_made_good(events_dir: Path, tmp_path: Path, engine: DuckEngine) -> None:
    daily = tmp_path / "daily"
    update_daily(events_dir, daily, engine=engine)
    whole = (daily / "2024-01.parquet").read_bytes()
    (daily / ".2024-01.parquet.4711").write_bytes(whole[:100])  # half written beside
    (daily / "2024-02.parquet").write_bytes(whole[: len(whole) // 2])  # torn
    (daily / "2024-03.parquet").write_bytes(b"")
    (daily / "2024-04-01.parquet").unlink()
    (daily / "2024-03-07.parquet").write_bytes(whole)  # from when March was the newest month
    assert update_daily(events_dir, daily, engine=engine) == 3
    assert read_bytes(daily) == aggregate_anew(events_dir, engine)


def test_the_events_own_folder_is_refused(events_dir: Path, engine: DuckEngine) -> None:
    before = read_bytes(events_dir)
    with pytest.raises(ConfigError, match="need one of their own"):
        update_daily(events_dir, events_dir, engine=engine)
    assert read_bytes(events_dir) == before


def test_foreign_files_are_left_alone(events_dir: Path, tmp_path: Path, engine: DuckEngine) -> None:
    daily = tmp_path / "daily"
    daily.mkdir()
    (daily / "notes.parquet").write_bytes(b"not ours")
    update_daily(events_dir, daily, engine=engine)
    assert (daily / "notes.parquet").read_bytes() == b"not ours"
    labels = build_labels(daily, spec=SPEC, snapshots=SNAPSHOTS[:1], horizon_days=3, as_of=AS_OF, engine=engine)
    assert len(labels)


def test_no_events_are_refused(tmp_path: Path, engine: DuckEngine) -> None:
    (tmp_path / "events").mkdir()
    with pytest.raises(DataError, match="holds no events"):
        update_daily(tmp_path / "events", tmp_path / "daily", engine=engine)


def test_a_damaged_day_is_named_and_leaves_nothing(events_dir: Path, tmp_path: Path, engine: DuckEngine) -> None:
    (events_dir / "2024-02-05.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match="2024-02-05"):
        update_daily(events_dir, tmp_path / "daily", engine=engine)
    assert not (tmp_path / "daily" / "2024-02.parquet").exists()
    assert not list((tmp_path / "daily").glob(".*"))


def test_an_infinite_amount_is_refused(tmp_path: Path, engine: DuckEngine) -> None:
    events = make_events(rows=50)
    events.loc[events["event_type"] == "purchase", "amount"] = np.inf
    with pytest.raises(DataError, match="engine"):
        update_daily(write_events(tmp_path / "events", events), tmp_path / "daily", engine=engine)


def test_feature_files(events_dir: Path, customers_path: Path, tmp_path: Path, engine: DuckEngine) -> None:
    report = build(events_dir, customers_path, engine)
    files = sorted((tmp_path / "features").iterdir())
    assert [path.name for path in files] == ["2024-03-11.parquet", "2024-04-10.parquet"]
    tables = [pq.read_table(path) for path in files]
    counts = {"daily_files": 12, "daily_files_written": 12, "snapshots": 2, "snapshots_written": 2}
    assert report == {**counts, "rows": sum(map(len, tables))}
    schema = tables[1].schema
    assert schema.names == ["customer_id", "event_timestamp", *feature_names(SPEC), "age", "plan"]
    assert schema.field("event_timestamp").type == pa.timestamp("us", tz="UTC")
    assert {schema.field(name).type for name in (*feature_names(SPEC), "age")} == {pa.float64()}
    assert schema.field("plan").type == pa.string()
    frame = tables[1].to_pandas().set_index("customer_id")
    assert frame.index.tolist() == sorted(set(frame.index))
    assert (frame["event_timestamp"] == AS_OF).all()
    assert frame.loc["c5", ["age", "plan", "tenure_days"]].tolist() == [5.0, "y", 90.0]
    assert frame.loc["c38", "tenure_days"] == 62.0  # since 8 February, late in the evening
    assert frame.loc["c39", ["age", "plan", "tenure_days"]].isna().all()
    events = make_events()
    mine = events[(events["customer_id"] == "c5") & (events["event_type"] == "purchase")]
    inside = mine.loc[mine["time"] >= AS_OF - dt.timedelta(days=30), "amount"]
    assert frame.loc["c5", "purchase_count_30d"] == len(inside) > 0
    assert frame.loc["c5", "purchase_mean_30d"] == pytest.approx(inside.mean())


def test_without_a_since_column_tenure_counts_from_the_first_event(
    events_dir: Path, customers_path: Path, tmp_path: Path, engine: DuckEngine
) -> None:
    build(events_dir, customers_path, engine, since_column=None, attributes={}, snapshots=SNAPSHOTS[:1])
    frame = pq.read_table(tmp_path / "features" / "2024-03-11.parquet").to_pandas().set_index("customer_id")
    events = make_events()
    known = events[events["event_type"].isin(SPEC.event_types)]
    first = known.groupby("customer_id")["time"].min().dt.floor("D").reindex(frame.index)
    assert frame["tenure_days"].tolist() == (SNAPSHOTS[0] - first).dt.days.tolist()


def test_same_bytes_whatever_the_threads_and_whatever_was_there(
    events_dir: Path, customers_path: Path, tmp_path: Path, engine: DuckEngine
) -> None:
    build(events_dir, customers_path, engine)
    first = read_bytes(tmp_path / "features"), read_bytes(tmp_path / "daily")
    (tmp_path / "features" / "2023-01-01.parquet").write_bytes(b"of an earlier run")
    build(events_dir, customers_path, engine)
    assert (read_bytes(tmp_path / "features"), read_bytes(tmp_path / "daily")) == first
    shutil.rmtree(tmp_path / "daily")
    shutil.rmtree(tmp_path / "features")  # else its files would be kept
    with DuckEngine(memory_limit="300MB", threads=1, temp_directory=tmp_path / "spill") as other:
        build(events_dir, customers_path, other)
    assert (read_bytes(tmp_path / "features"), read_bytes(tmp_path / "daily")) == first


def test_a_failure_leaves_the_features_as_they_were(
    events_dir: Path, customers_path: Path, tmp_path: Path, engine: DuckEngine
) -> None:
    build(events_dir, customers_path, engine)
    before = read_bytes(tmp_path / "features")
    with pytest.raises(DataError, match="wrong_name"):
        build(events_dir, customers_path, engine, attributes={"wrong_name": "numeric"})
    with pytest.raises(DataError, match="no customer has an event of type 'purchase'"):
        build(events_dir, customers_path, engine, snapshots=[START - dt.timedelta(days=9)])
    with pytest.raises(ConfigError, match="'Tenure_days' is called like a computed column"):
        build(events_dir, customers_path, engine, attributes={"Tenure_days": "numeric"})
    assert read_bytes(tmp_path / "features") == before
    assert {path.name for path in tmp_path.iterdir()} <= {
        "events", "customers.parquet", "daily", "features", "spill"
    }  # fmt: skip


def test_a_customer_that_stands_twice_is_refused(events_dir: Path, customers_path: Path, engine: DuckEngine) -> None:
    customers = pq.read_table(customers_path).to_pandas()
    write_table(customers_path, pd.concat([customers, customers[:1]]))
    with pytest.raises(DataError, match="found 39 ids in 40 rows"):
        build(events_dir, customers_path, engine)


def test_labels_of_the_population(events_dir: Path, customers_path: Path, tmp_path: Path, engine: DuckEngine) -> None:
    build(events_dir, customers_path, engine)
    arguments: dict[str, Any] = {"spec": SPEC, "horizon_days": 3, "as_of": AS_OF, "engine": engine}
    labels = build_labels(tmp_path / "daily", snapshots=SNAPSHOTS[:1], **arguments)
    features = pq.read_table(tmp_path / "features" / "2024-03-11.parquet").to_pandas()
    assert labels["customer_id"].tolist() == features["customer_id"].tolist()
    assert str(labels["event_timestamp"].dtype) == "datetime64[us, UTC]"
    assert labels["churned"].dtype == bool
    events = make_events()
    end = SNAPSHOTS[0] + dt.timedelta(days=3)
    after = events[(events["time"] >= SNAPSHOTS[0]) & (events["time"] < end) & (events["event_type"] == "purchase")]
    assert labels["churned"].tolist() == (~labels["customer_id"].isin(after["customer_id"])).tolist()
    assert 0 < labels["churned"].sum() < len(labels)
    with pytest.raises(ConfigError, match="is open at as_of"):
        build_labels(tmp_path / "daily", snapshots=SNAPSHOTS, **arguments)
    with pytest.raises(DataError, match="holds no daily aggregates"):
        build_labels(tmp_path / "nowhere", snapshots=SNAPSHOTS[:1], **arguments)


def test_a_customer_who_becomes_known_later_is_computed_again(
    events_dir: Path, customers_path: Path, tmp_path: Path, engine: DuckEngine
) -> None:
    customers = pd.read_parquet(customers_path)[["customer_id", "since"]]
    customers.loc[0, "since"] = pd.Timestamp(AS_OF)  # after events of this customer, and after both snapshots
    write_table(customers_path, customers.drop(index=0))
    build(events_dir, customers_path, engine, attributes={})
    write_table(customers_path, customers)
    build(events_dir, customers_path, engine, attributes={})
    continued = read_bytes(tmp_path / "features")
    shutil.rmtree(tmp_path / "features")
    build(events_dir, customers_path, engine, attributes={})
    assert continued == read_bytes(tmp_path / "features")


def test_another_form_of_the_daily_aggregates_computes_every_snapshot_again(
    events_dir: Path, customers_path: Path, engine: DuckEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(events_dir, customers_path, engine)
    monkeypatch.setattr("closedloop.stages.features.DAILY_FORMAT", b"another")
    assert build(events_dir, customers_path, engine)["snapshots_written"] == len(SNAPSHOTS)
