"""The harm of a replay in customers and days, by hand."""

from __future__ import annotations

import datetime as dt

import pandas as pd

from closedloop.replay.harm import count_found, measure_harm

DAY = dt.date(2024, 6, 1)


def make_pairs() -> pd.DataFrame:
    """Ten customers at two snapshots, of which the first two leave: the closed arm ranks them first in June alone."""
    ids = [f"C{number}" for number in range(10)]
    falling, rising = [1 - number / 10 for number in range(10)], [number / 10 for number in range(10)]
    rows = {"customer_id": ids, "outcome": [1, 1] + [0] * 8, "score_frozen": rising}
    may = pd.DataFrame({**rows, "snapshot_at": pd.Timestamp("2024-05-01", tz="UTC"), "score": rising})
    june = pd.DataFrame({**rows, "snapshot_at": pd.Timestamp(DAY, tz="UTC"), "score": falling})
    return pd.concat([may, june], ignore_index=True)


def test_leavers_are_counted_in_the_list_of_each_snapshot_since_the_change() -> None:
    assert count_found(make_pairs(), None) == {"customers": 20, "leavers": 4, "closed": 2, "frozen": 0}
    assert count_found(make_pairs(), DAY) == {"customers": 10, "leavers": 2, "closed": 2, "frozen": 0}
    assert count_found(make_pairs(), DAY + dt.timedelta(days=1)) == {
        "customers": 0, "leavers": 0, "closed": 0, "frozen": 0,
    }  # fmt: skip


def test_days_are_counted_from_the_change_and_none_before_it() -> None:
    story = [
        {"at": DAY - dt.timedelta(days=9), "kind": "alert"},
        {"at": DAY - dt.timedelta(days=8), "kind": "promoted"},
        {"at": DAY, "kind": "bad offered"},
        {"at": DAY + dt.timedelta(days=2), "kind": "rolled back"},
        {"at": DAY + dt.timedelta(days=30), "kind": "retrain"},
    ]
    found = measure_harm(make_pairs(), story, DAY, served={"1": 10, "2": 3}, bad_version="2")
    assert (found["noticed_days"], found["mended_days"]) == (30, None)
    assert found["bad"] == {"version": "2", "customers": 3, "days": 2}


def test_without_a_known_change_no_days_are_claimed() -> None:
    found = measure_harm(make_pairs(), [], None, served={}, bad_version=None)
    assert {"noticed_days", "mended_days", "bad"}.isdisjoint(found)
