from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from closedloop.core.features.leak_check import choose_suspects, count_mismatches, recompute_features

SNAPSHOT = "2024-03-11"
EVERYTHING: dict[str, Any] = {
    "windows": (7, 30),
    "aggregations": ("count", "days", "sum", "mean", "min", "max", "last"),
    "event_types": ("purchase", "login"),
    "amount_types": ("purchase",),
    "recency_cap_days": 365,
}


def make_events(*rows: tuple[str, str, str, float]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=["customer_id", "event_type", "time", "amount"])
    frame["time"] = pd.to_datetime(frame["time"], utc=True, format="ISO8601").astype("datetime64[us, UTC]")
    return frame.astype({"amount": float})


def make_rows(*rows: tuple[str, str]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=["customer_id", "event_timestamp"])
    frame["event_timestamp"] = pd.to_datetime(frame["event_timestamp"], utc=True).astype("datetime64[us, UTC]")
    return frame


LOG = make_events(
    ("a", "purchase", "2024-02-10T00:00:00", 5.0),  # exactly 30 days before: in the window of 30
    ("a", "purchase", "2024-02-09T23:59:59.999999", 900.0),  # a microsecond too early
    ("a", "purchase", "2024-03-10T23:59:59.999999", 20.0),  # the last microsecond before the snapshot
    ("a", "purchase", "2024-03-10T08:00:00", 11.0),
    ("a", "purchase", "2024-03-11T00:00:00", 7000.0),  # at the snapshot: must not count
    ("a", "purchase", "2024-03-11T09:00:00", 8000.0),
    ("a", "login", "2024-03-03T23:59:00", np.nan),  # a minute before the window of 7
    ("b", "login", "2024-03-11T00:00:00", np.nan),
    ("c", "purchase", "2024-03-10T12:00:00", 1.0),
)


def test_features_by_hand() -> None:
    table = recompute_features(LOG, make_rows(("b", SNAPSHOT), ("a", SNAPSHOT)), **EVERYTHING)
    assert table["customer_id"].tolist() == ["b", "a"]
    found = table.drop(columns=["customer_id", "event_timestamp"]).to_dict("records")
    assert found[1] == {
        "purchase_count_7d": 2,
        "purchase_days_7d": 1,
        "purchase_sum_7d": 31,
        "purchase_mean_7d": 15.5,
        "purchase_min_7d": 11,
        "purchase_max_7d": 20,
        "purchase_last_7d": 20,
        "purchase_count_30d": 3,
        "purchase_days_30d": 2,
        "purchase_sum_30d": 36,
        "purchase_mean_30d": 12,
        "purchase_min_30d": 5,
        "purchase_max_30d": 20,
        "purchase_last_30d": 20,
        "purchase_recency_days": 1,
        "login_count_7d": 0,
        "login_days_7d": 0,
        "login_count_30d": 1,
        "login_days_30d": 1,
        "login_recency_days": 8,
    }
    empty = pd.Series(found[0])
    assert empty[empty.isna()].index.tolist() == [
        f"purchase_{name}_{days}d" for days in (7, 30) for name in ("mean", "min", "max", "last")
    ]
    assert empty[["purchase_recency_days", "login_recency_days"]].tolist() == [365, 365]
    assert empty.dropna().drop(["purchase_recency_days", "login_recency_days"]).eq(0).all()


def test_recency_is_capped() -> None:
    table = recompute_features(LOG, make_rows(("a", SNAPSHOT)), **{**EVERYTHING, "recency_cap_days": 3})
    assert table[["purchase_recency_days", "login_recency_days"]].to_numpy().tolist() == [[1, 3]]


def test_source_zone_and_index_do_not_matter_and_nothing_is_changed() -> None:
    rows = make_rows(("a", SNAPSHOT), ("c", SNAPSHOT), ("a", "2024-02-15")).set_index(pd.Index([7, 3, 5]))
    elsewhere = LOG.assign(time=LOG["time"].dt.tz_convert("Asia/Kolkata").astype("datetime64[ns, Asia/Kolkata]"))
    before = elsewhere.copy(deep=True), rows.copy(deep=True)
    table = recompute_features(elsewhere.iloc[::-1], rows, **EVERYTHING)
    assert table.index.tolist() == [7, 3, 5]
    pd.testing.assert_frame_equal(table, recompute_features(LOG, rows, **EVERYTHING))
    pd.testing.assert_frame_equal(elsewhere, before[0])
    pd.testing.assert_frame_equal(rows, before[1])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(-40 * 24, 5 * 24), st.integers(-50, 50)),
        max_size=25,
        unique_by=lambda event: event[:2],
    )
)
def test_features_equal_a_plain_loop(log: list[tuple[str, int, int]]) -> None:
    snapshot = pd.Timestamp(SNAPSHOT, tz="UTC")
    events = make_events(
        *((owner, "purchase", str(snapshot + pd.Timedelta(hours=hour)), float(amount)) for owner, hour, amount in log)
    )
    table = recompute_features(events, make_rows(("a", SNAPSHOT), ("b", SNAPSHOT)), **EVERYTHING)
    for position, customer in enumerate("ab"):
        past = sorted((hour, amount) for owner, hour, amount in log if owner == customer and hour < 0)
        for days in (7, 30):
            inside = [(hour, amount) for hour, amount in past if hour >= -24 * days]
            amounts = [amount for _, amount in inside]
            row = table.loc[position, [name for name in table if str(name).endswith(f"_{days}d")]]
            assert row[f"purchase_count_{days}d"] == len(inside)
            assert row[f"purchase_days_{days}d"] == len({hour // 24 for hour, _ in inside})
            assert row[f"purchase_sum_{days}d"] == sum(amounts)
            if amounts:
                expected = [sum(amounts) / len(amounts), min(amounts), max(amounts), amounts[-1]]
                found = row[[f"purchase_{name}_{days}d" for name in ("mean", "min", "max", "last")]]
                assert found.tolist() == pytest.approx(expected)
        recency = -(past[-1][0] // 24) if past else 365
        assert table.loc[position, "purchase_recency_days"] == recency


def test_no_events_at_all() -> None:
    table = recompute_features(LOG[:0], make_rows(("a", SNAPSHOT)), **EVERYTHING)
    assert table.loc[0, ["purchase_count_7d", "purchase_sum_30d", "login_recency_days"]].tolist() == [0, 0, 365]
    assert count_mismatches(table, table) == (0, "")


def test_a_leak_of_one_day_is_found_and_named() -> None:
    rows = make_rows(("c", SNAPSHOT), ("a", SNAPSHOT))
    honest = recompute_features(LOG, rows, **EVERYTHING)
    # What an engine would build that lets the snapshot's own day in: all events seem a day older.
    leaking = recompute_features(LOG.assign(time=LOG["time"] - pd.Timedelta(days=1)), rows, **EVERYTHING)
    mismatches, first = count_mismatches(leaking[::-1], honest)
    assert mismatches == 2
    assert first == (
        "customer c, snapshot 2024-03-11, purchase_recency_days: "
        "found 2, expected 1 from the events before the snapshot"
    )


def test_a_cutoff_that_includes_the_snapshot_itself_is_found() -> None:
    rows = make_rows(("c", SNAPSHOT), ("b", SNAPSHOT))
    honest = recompute_features(LOG, rows, **EVERYTHING)
    # "At or before" instead of "before": an event at midnight is let in.
    inclusive = recompute_features(LOG.assign(time=LOG["time"] - pd.Timedelta(microseconds=1)), rows, **EVERYTHING)
    mismatches, first = count_mismatches(inclusive, honest)
    assert mismatches == 1
    assert first.startswith("customer b, snapshot 2024-03-11, login_count_7d: found 1, expected 0")


def test_equal_features_match_whatever_their_order_and_company() -> None:
    rows = make_rows(("a", SNAPSHOT), ("b", SNAPSHOT), ("a", "2024-02-15"))
    honest = recompute_features(LOG, rows, **EVERYTHING)
    others = honest.assign(customer_id="z")
    given_rows = pd.concat([others, honest[::-1]]).assign(churned=True, purchase_count_7d=lambda f: f.iloc[:, 2])
    assert count_mismatches(given_rows, honest) == (0, "")


def test_tolerance_is_relative() -> None:
    honest = recompute_features(LOG, make_rows(("a", SNAPSHOT)), **EVERYTHING)
    large = honest.assign(purchase_sum_30d=1e6)
    assert count_mismatches(large.assign(purchase_sum_30d=1e6 + 5e-4), large) == (0, "")
    assert count_mismatches(large.assign(purchase_sum_30d=1e6 + 5e-3), large)[0] == 1
    assert count_mismatches(large.assign(purchase_sum_30d=1e6 + 5e-3), large, tolerance=1e-6) == (0, "")


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_value_where_another_is_expected_is_a_mismatch(value: float) -> None:
    honest = recompute_features(LOG, make_rows(("a", SNAPSHOT)), **EVERYTHING)
    changed = honest.assign(purchase_mean_7d=value)
    assert count_mismatches(changed, honest)[0] == 1
    assert count_mismatches(honest, changed)[0] == 1
    assert count_mismatches(changed, changed)[0] == 0


def test_missing_and_repeated_training_rows_are_mismatches() -> None:
    honest = recompute_features(LOG, make_rows(("a", SNAPSHOT), ("b", SNAPSHOT)), **EVERYTHING)
    assert count_mismatches(honest[1:], honest) == (
        1,
        "customer a, snapshot 2024-03-11: found 0 training rows, expected 1",
    )
    assert count_mismatches(pd.concat([honest, honest[1:]]), honest) == (
        1,
        "customer b, snapshot 2024-03-11: found 2 training rows, expected 1",
    )


def make_crowd() -> tuple[pd.DataFrame, pd.DataFrame]:
    """300 customers: 0-19 log in on the snapshot's day, 20-22 buy two days less a microsecond after it."""
    rows = make_rows(*((str(number), SNAPSHOT) for number in range(300)))
    after = [(str(number), "login", "2024-03-11T00:00:00", np.nan) for number in range(20)]
    after += [(str(number), "purchase", "2024-03-12T23:59:59.999999", 9.0) for number in (20, 21, 22)]
    harmless = [(str(number), "login", "2024-03-10T23:59:59", np.nan) for number in range(23, 300)]
    harmless += [(str(number), "login", "2024-03-13T00:00:00", np.nan) for number in range(23, 300)]
    return make_events(*after, *harmless), rows.sample(frac=1, random_state=1)


def test_suspects_come_first_and_the_rest_fills_up() -> None:
    events, rows = make_crowd()
    chosen = choose_suspects(events, rows, sample=40, seed=1)
    assert len(chosen) == 40
    assert set(map(str, range(23))) <= set(chosen["customer_id"])
    pd.testing.assert_frame_equal(chosen, rows[rows["customer_id"].isin(chosen["customer_id"])])


def test_a_rare_event_type_has_its_suspects_among_few() -> None:
    events, rows = make_crowd()
    for seed in range(5):
        chosen = set(choose_suspects(events, rows, sample=6, seed=seed)["customer_id"])
        assert {"20", "21", "22"} <= chosen
        assert chosen <= set(map(str, range(23)))


def test_suspects_depend_on_the_seed_alone() -> None:
    events, rows = make_crowd()
    first = choose_suspects(events, rows, sample=30, seed=1)
    pd.testing.assert_frame_equal(first, choose_suspects(events.iloc[::-1], rows, sample=30, seed=1))
    assert set(first["customer_id"]) != set(choose_suspects(events, rows, sample=30, seed=2)["customer_id"])


def test_a_large_sample_takes_every_row() -> None:
    events, rows = make_crowd()
    pd.testing.assert_frame_equal(choose_suspects(events, rows, sample=1000, seed=1), rows)
    assert len(choose_suspects(events[:0], rows, sample=10, seed=1)) == 10
