from __future__ import annotations

import datetime as dt
import sys
from typing import Any

import ibis
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ibis.backends.sql.compilers import PySparkCompiler
from ibis.config import Config

from closedloop.core.features.daily import DAILY_COLUMNS, EVENTS_COLUMNS, aggregate_daily
from closedloop.core.features.leak_check import recompute_features
from closedloop.core.features.windows import (
    AGGREGATIONS,
    WindowSpec,
    combine_windows,
    date_windows,
    feature_names,
    find_first_days,
    list_snapshots,
    select_past,
)

SNAPSHOT = dt.datetime(2024, 3, 11, tzinfo=dt.UTC)
MICROSECOND = pd.Timedelta(microseconds=1)
SPEC = WindowSpec(
    event_types=("login", "purchase", "ticket"),
    amount_types=("purchase", "ticket"),
    label_event_type="purchase",
    window_days=(7, 30),
    aggregations=AGGREGATIONS,
    active_days=20,
    recency_cap_days=45,
    tenure_cap_days=60,
)


def compute_windows(
    daily: ibis.Table, snapshots: list[dt.datetime], spec: WindowSpec, origins: ibis.Table | None = None
) -> ibis.Table:
    """As the stage puts them together, in one expression."""
    origins = find_first_days(daily, spec) if origins is None else origins
    windows = [(combine_windows(select_past(daily, time, spec), spec), time) for time in snapshots]
    tables = [date_windows(found, origins, time, spec) for found, time in windows]
    return ibis.union(*tables) if len(tables) > 1 else tables[0]


class Log:
    """DuckDB with a table of events and views above it, so that each example costs no compilation."""

    def __init__(self, snapshots: list[dt.datetime], spec: WindowSpec) -> None:
        self.backend = ibis.duckdb.connect()
        self.backend.create_table("events", schema=ibis.schema(EVENTS_COLUMNS))
        daily_sql = self.backend.compile(aggregate_daily(ibis.table(EVENTS_COLUMNS, name="events")))
        self.backend.raw_sql(f"CREATE VIEW daily AS {daily_sql}")
        table = ibis.table(DAILY_COLUMNS, name="daily")
        self.sql = self.backend.compile(compute_windows(table, snapshots, spec))

    def compute(self, events: pd.DataFrame) -> pd.DataFrame:
        naive = events.assign(time=events["time"].dt.tz_convert(None))
        self.backend.raw_sql("DELETE FROM events")
        if len(naive):
            self.backend.insert("events", naive)
        table = self.backend.raw_sql(self.sql).to_arrow_table().to_pandas()
        table["event_timestamp"] = table["event_timestamp"].dt.tz_localize("UTC").astype("datetime64[us, UTC]")
        return table.sort_values(["event_timestamp", "customer_id"], ignore_index=True)


@pytest.fixture(scope="module")
def log() -> Any:
    made = Log([SNAPSHOT], SPEC)
    yield made
    made.backend.disconnect()


def make_events(rows: list[tuple[str, str, Any, float | None]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["customer_id", "event_type", "time", "amount"])
    frame["time"] = pd.to_datetime(frame["time"], utc=True, format="ISO8601").astype("datetime64[us, UTC]")
    return frame.astype({"amount": float})


def test_hand_computed_windows(log: Log) -> None:
    events = make_events(
        [
            ("a", "purchase", "2024-03-10T23:59:59.999999", 20.0),  # the last moment before the snapshot
            ("a", "purchase", "2024-03-10T08:00:00", 11.0),
            ("a", "purchase", "2024-03-04T00:00:00", 3.5),  # exactly 7 days before: in
            ("a", "purchase", "2024-03-03T23:59:59.999999", 100.0),  # a microsecond earlier: only in 30
            ("a", "purchase", "2024-02-10T00:00:00", 1.0),  # exactly 30 days before: in
            ("a", "purchase", "2024-02-09T23:59:59.999999", 900.0),  # in no window
            ("a", "purchase", "2024-03-11T00:00:00", 700.0),  # at the snapshot: the future
            ("a", "login", "2024-02-01T10:00:00", None),
            ("a", "return", "2024-03-10T10:00:00", 5.0),  # not of the spec
            ("b", "purchase", "2024-02-20T00:00:00", 2.0),  # exactly 20 days before: active
            ("c", "purchase", "2024-02-19T23:59:59.999999", 2.0),  # no longer active
            ("d", "login", "2024-03-10T00:00:00", None),  # never purchased
        ]
    )
    table = log.compute(events).set_index("customer_id")
    assert list(table.index) == ["a", "b"]
    assert (table["event_timestamp"] == SNAPSHOT).all()
    expected = {
        "purchase_count_7d": 3.0, "purchase_days_7d": 2.0, "purchase_sum_7d": 34.5, "purchase_mean_7d": 11.5,
        "purchase_min_7d": 3.5, "purchase_max_7d": 20.0, "purchase_last_7d": 20.0,
        "purchase_count_30d": 5.0, "purchase_days_30d": 4.0, "purchase_sum_30d": 135.5, "purchase_mean_30d": 27.1,
        "purchase_min_30d": 1.0, "purchase_max_30d": 100.0, "purchase_last_30d": 20.0,
        "login_count_7d": 0.0, "login_days_7d": 0.0, "login_count_30d": 0.0, "login_days_30d": 0.0,
        "login_recency_days": 39.0, "purchase_recency_days": 1.0, "ticket_recency_days": 45.0,
        "ticket_count_7d": 0.0, "ticket_sum_30d": 0.0, "tenure_days": 39.0,
    }  # fmt: skip
    assert table.loc["a", list(expected)].to_dict() == expected
    empty = [f"ticket_{name}_{days}d" for name in ("mean", "min", "max", "last") for days in (7, 30)]
    assert table.loc["a", empty].isna().all()
    assert table.loc["b", ["purchase_count_7d", "purchase_sum_7d", "purchase_recency_days"]].tolist() == [0, 0, 20]
    assert np.isnan(table.loc["b", "purchase_last_7d"])


def test_columns_are_the_feature_names_as_floats(log: Log) -> None:
    table = log.compute(make_events([("a", "purchase", "2024-03-10", 1.0)]))
    assert tuple(table.columns) == ("customer_id", "event_timestamp", *feature_names(SPEC))
    assert {str(table[name].dtype) for name in feature_names(SPEC)} == {"float64"}
    assert "login_sum_7d" not in feature_names(SPEC)


def test_caps_hold_recency_and_tenure(log: Log) -> None:
    events = [("a", "purchase", "2024-03-10", 1.0), ("a", "login", "2023-01-01", None)]
    row = log.compute(make_events(events)).iloc[0]
    assert (row["login_recency_days"], row["tenure_days"]) == (45.0, 60.0)
    row = log.compute(make_events([("a", "purchase", "2024-03-10", 1.0), ("a", "login", "2024-01-26", None)])).iloc[0]
    assert (row["login_recency_days"], row["tenure_days"]) == (45.0, 45.0)


def test_tenure_counts_from_the_given_origin() -> None:
    daily = aggregate_daily(
        ibis.memtable(
            make_events([(name, "purchase", "2024-03-10", 1.0) for name in "abc"]).assign(
                time=pd.Timestamp("2024-03-10").as_unit("us")
            ),
            schema=EVENTS_COLUMNS,
        )
    )
    origins = ibis.memtable(
        pd.DataFrame({"customer_id": ["a", "b"], "origin_day": [dt.date(2024, 3, 1), dt.date(2024, 3, 12)]}),
        schema={"customer_id": "string", "origin_day": "date"},
    )
    table = compute_windows(daily, [SNAPSHOT], SPEC, origins=origins).to_pandas().sort_values("customer_id")
    # b signed up after the snapshot, c is not in the list
    assert table["tenure_days"].fillna(-1).tolist() == [10.0, 0.0, -1.0]


EVENT = st.tuples(
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["login", "purchase", "ticket", "unknown"]),
    # days around the window edges, and moments around midnight
    st.builds(
        lambda days, offset: pd.Timestamp(SNAPSHOT) - pd.Timedelta(days=days) + pd.Timedelta(offset, unit="us"),
        st.sampled_from([-1, 0, 1, 2, 6, 7, 8, 19, 20, 21, 30, 31, 44, 45, 46, 70]),
        st.sampled_from([-1, 0, 1, 43_200_000_000]),
    ),
    st.one_of(st.none(), st.integers(-2000, 200_000).map(lambda cents: cents / 100)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(EVENT, max_size=25))
def test_equals_an_independent_computation(log: Log, rows: list[Any]) -> None:
    events = make_events(rows).sort_values(["time", "amount"], na_position="first", ignore_index=True)
    found = log.compute(events)
    start = pd.Timestamp(SNAPSHOT) - pd.Timedelta(days=SPEC.active_days)
    before = events[events["time"] < SNAPSHOT]
    active = before.loc[(before["event_type"] == "purchase") & (before["time"] >= start), "customer_id"]
    keys = pd.DataFrame({"customer_id": sorted(set(active))})
    keys["event_timestamp"] = pd.Series(SNAPSHOT, index=keys.index, dtype="datetime64[us, UTC]")
    if keys.empty:
        assert found.empty
        return
    expected = recompute_features(
        events,
        keys,
        windows=SPEC.window_days,
        aggregations=SPEC.aggregations,
        event_types=SPEC.event_types,
        amount_types=SPEC.amount_types,
        recency_cap_days=SPEC.recency_cap_days,
    )
    known = before[before["event_type"].isin(SPEC.event_types)]
    first = known.groupby("customer_id")["time"].min().dt.floor("D").reindex(keys["customer_id"])
    expected["tenure_days"] = (SNAPSHOT - first).dt.days.clip(upper=SPEC.tenure_cap_days).to_numpy(float)
    assert found["customer_id"].tolist() == keys["customer_id"].tolist()
    pd.testing.assert_frame_equal(found[expected.columns.tolist()], expected, rtol=1e-12, atol=1e-9)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(EVENT, max_size=15), st.lists(EVENT, min_size=1, max_size=10), st.data())
def test_nothing_at_or_after_the_snapshot_matters(
    log: Log, rows: list[Any], later: list[Any], data: st.DataObject
) -> None:
    past = [row for row in rows if row[2] < SNAPSHOT] + [("a", "purchase", SNAPSHOT - MICROSECOND, 7.0)]
    offsets = st.integers(0, 40 * 86_400_000_000).map(lambda us: pd.Timestamp(SNAPSHOT) + us * MICROSECOND)
    future = [(customer, kind, data.draw(offsets), amount) for customer, kind, _, amount in later]
    alone = log.compute(make_events(past))
    pd.testing.assert_frame_equal(log.compute(make_events(past + future)), alone)
    # the same event a microsecond before the snapshot does matter
    moved = log.compute(make_events([*past, ("a", "purchase", SNAPSHOT - MICROSECOND, 9.0)]))
    difference = moved.set_index("customer_id").loc["a"] != alone.set_index("customer_id").loc["a"]
    assert {"purchase_count_7d", "purchase_sum_30d"} <= set(difference.index[difference])


def test_snapshots_do_not_mix() -> None:
    earlier = SNAPSHOT - dt.timedelta(days=14)
    events = make_events(
        [
            ("a", "purchase", "2024-02-20", 1.0),
            ("a", "purchase", "2024-03-05", 2.0),
            ("b", "purchase", "2024-03-10", 4.0),
        ]
    )
    both = Log([earlier, SNAPSHOT], SPEC)
    try:
        table = both.compute(events)
    finally:
        both.backend.disconnect()
    rows = table[["event_timestamp", "customer_id", "purchase_sum_7d"]].to_numpy().tolist()
    assert rows == [[pd.Timestamp(earlier), "a", 1.0], [pd.Timestamp(SNAPSHOT), "a", 2.0], [SNAPSHOT, "b", 4.0]]


def test_compiles_for_spark_without_spark(monkeypatch: pytest.MonkeyPatch) -> None:
    class SparkOptions(Config):
        treat_nan_as_null: bool = False

    monkeypatch.setitem(sys.modules, "pyspark", None)  # importing it fails from here on
    # Ibis sets its Spark options only when the Spark backend, and with it pyspark, is imported
    monkeypatch.setattr(ibis.options, "pyspark", SparkOptions())
    compiler = PySparkCompiler()
    windows = compute_windows(ibis.table(DAILY_COLUMNS, name="daily"), [SNAPSHOT], SPEC)
    sql = compiler.to_sqlglot(windows).sql(dialect=compiler.dialect)
    assert all(f"`{name}`" in sql for name in feature_names(SPEC))


def test_snapshots_end_at_as_of_and_begin_at_the_first() -> None:
    as_of = dt.datetime(2024, 3, 1, tzinfo=dt.UTC)
    first = as_of - dt.timedelta(days=60)
    assert list_snapshots(first, as_of, 30) == [first, as_of - dt.timedelta(days=30), as_of]
    assert list_snapshots(first + dt.timedelta(microseconds=1), as_of, 30) == [as_of - dt.timedelta(days=30), as_of]
    assert list_snapshots(as_of, as_of, 30) == [as_of]
    assert list_snapshots(as_of + dt.timedelta(days=1), as_of, 30) == []
