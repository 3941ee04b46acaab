from __future__ import annotations

import datetime as dt
import sys
from fractions import Fraction
from typing import Any

import ibis
import numpy as np
import pandas as pd
import pytest
from ibis.backends.sql.compilers import PySparkCompiler
from ibis.config import Config

from closedloop.core.features.daily import DAILY_COLUMNS, DAILY_KEYS, EVENTS_COLUMNS, FRACTION_STEPS, aggregate_daily


@pytest.fixture(scope="module")
def database() -> Any:
    backend = ibis.duckdb.connect()
    yield backend
    backend.disconnect()


def aggregate(database: Any, rows: list[tuple[str, str, str, float | None]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=list(EVENTS_COLUMNS))
    frame["time"] = pd.to_datetime(frame["time"], format="ISO8601").astype("datetime64[us]")
    frame["amount"] = frame["amount"].astype(float)
    return database.to_pandas(aggregate_daily(ibis.memtable(frame, schema=EVENTS_COLUMNS)))


def sum_amounts(row: Any) -> Fraction:
    return Fraction(row.amount_whole) + Fraction(int(row.amount_fraction), int(FRACTION_STEPS))


def test_hand_computed_day(database: Any) -> None:
    table = aggregate(
        database,
        [
            ("b", "purchase", "2024-03-01T00:00:00", 4.0),
            ("a", "purchase", "2024-03-01T23:59:59.999999", 2.5),
            ("a", "purchase", "2024-03-02T00:00:00", 7.0),  # a microsecond later: the next day
            ("a", "purchase", "2024-03-01T08:00:00", -1.25),
            ("a", "purchase", "2024-03-01T09:00:00", None),  # counts as an event, not as an amount
            ("a", "login", "2024-03-01T09:00:00", None),
            ("a", "login", "2024-03-01T10:00:00", None),
        ],
    )
    day, next_day = dt.date(2024, 3, 1), dt.date(2024, 3, 2)
    keys = list(zip(table["event_type"], pd.to_datetime(table["day"]).dt.date, table["customer_id"], strict=True))
    assert list(table.columns) == list(DAILY_COLUMNS)
    assert keys == [
        ("login", day, "a"), ("purchase", day, "a"), ("purchase", day, "b"), ("purchase", next_day, "a"),
    ]  # fmt: skip
    assert table["event_count"].tolist() == [2, 3, 1, 1]
    assert table["amount_count"].tolist() == [0, 2, 1, 1]
    assert [float(sum_amounts(row)) for row in table[1:].itertuples()] == [1.25, 4.0, 7.0]
    assert table["amount_min"].tolist()[1:] == [-1.25, 4.0, 7.0]
    assert table["amount_max"].tolist()[1:] == [2.5, 4.0, 7.0]
    assert table["amount_last"].tolist()[1:] == [2.5, 4.0, 7.0]
    amounts = ["amount_whole", "amount_fraction", "amount_min", "amount_max", "amount_last"]
    assert table.loc[0, amounts].isna().all()


def test_events_at_the_same_latest_time_the_largest_amount_is_last(database: Any) -> None:
    time = "2024-03-01T12:00:00.000001"
    rows = [("a", "purchase", time, amount) for amount in (3.0, 9.0, 5.0)]
    rows += [("a", "purchase", "2024-03-01T12:00:00", 50.0), ("a", "purchase", "2024-03-01T13:00:00", None)]
    for turned in (rows, rows[::-1]):
        assert aggregate(database, turned)["amount_last"].tolist() == [9.0]


def test_sums_do_not_depend_on_the_order_of_rows(database: Any) -> None:
    # added as floats, these give different sums in different orders
    amounts = [0.1, 0.2, 0.3, 1e9 + 0.7, -1e9, 1e-7, 123_456.789, -0.1]
    assert sum(amounts) != sum(sorted(amounts))
    generator = np.random.default_rng(5)
    found = set()
    for _ in range(5):
        order = generator.permutation(len(amounts))
        table = aggregate(database, [("a", "purchase", "2024-03-01", amounts[place]) for place in order])
        found.add(sum_amounts(table.iloc[0]))
    assert len(found) == 1
    exact = sum(map(Fraction, amounts))
    assert abs(found.pop() - exact) <= len(amounts) / (2 * Fraction(FRACTION_STEPS))


def test_given_types_set_the_order_and_nothing_else(database: Any) -> None:
    frame = pd.DataFrame(
        [(name, kind, pd.Timestamp(f"2024-03-0{day}"), 1.5) for name in "ba" for kind in ("x", "y") for day in (2, 1)],
        columns=list(EVENTS_COLUMNS),
    ).astype({"time": "datetime64[us]"})
    events = ibis.memtable(frame, schema=EVENTS_COLUMNS)
    found = database.to_pandas(aggregate_daily(events, ["y", "x"]))
    assert found["event_type"].tolist() == ["y"] * 4 + ["x"] * 4
    assert found["customer_id"].tolist() == ["a", "b"] * 4
    plain = database.to_pandas(aggregate_daily(events))
    pd.testing.assert_frame_equal(found.sort_values(list(DAILY_KEYS), ignore_index=True), plain)
    assert set(database.to_pandas(aggregate_daily(events, ["y"]))["event_type"]) == {"y"}


def test_without_amounts_nothing_but_the_work_is_less(database: Any) -> None:
    rows = [(name, "login", pd.Timestamp(f"2024-03-0{day}"), None) for name in "bab" for day in (2, 1)]
    frame = pd.DataFrame(rows, columns=list(EVENTS_COLUMNS)).astype({"time": "datetime64[us]", "amount": float})
    events = ibis.memtable(frame, schema=EVENTS_COLUMNS)
    plain, found = aggregate_daily(events, ["login"]), aggregate_daily(events, ["login"], has_amounts=False)
    assert found.schema() == plain.schema()
    pd.testing.assert_frame_equal(database.to_pandas(found), database.to_pandas(plain))
    assert "arg_max" not in str(database.compile(found)).lower()


def test_no_events_no_rows(database: Any) -> None:
    assert aggregate(database, []).empty


def test_compiles_for_spark_without_spark(monkeypatch: pytest.MonkeyPatch) -> None:
    class SparkOptions(Config):
        treat_nan_as_null: bool = False

    monkeypatch.setitem(sys.modules, "pyspark", None)  # importing it fails from here on
    # Ibis sets its Spark options only when the Spark backend, and with it pyspark, is imported
    monkeypatch.setattr(ibis.options, "pyspark", SparkOptions())
    compiler = PySparkCompiler()
    query = compiler.to_sqlglot(aggregate_daily(ibis.table(EVENTS_COLUMNS, name="events")))
    sql = query.sql(dialect=compiler.dialect)
    assert "MAX_BY" in sql
    assert all(f"`{name}`" in sql for name in DAILY_KEYS)
