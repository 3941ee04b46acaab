"""Canonical Parquet tables: what goes in comes out, and equal content is equal bytes."""

from __future__ import annotations

import datetime as dt

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from closedloop.errors import DataError
from closedloop.tabular.tables import (
    CONTENT_KEY,
    EVENT_SCHEMA,
    list_event_days,
    read_table,
    write_event_days,
    write_table,
)


def event_log(*rows: tuple[str, str, str, float | None]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=EVENT_SCHEMA.names)
    frame["time"] = pd.to_datetime(frame["time"], utc=True, format="ISO8601").astype("datetime64[us, UTC]")
    return frame


LOG = event_log(
    ("b", "purchase", "2024-01-02 00:00:00", 2.0),
    ("a", "purchase", "2024-01-01 23:59:59.999999", 1.5),
    ("a", "login", "2024-01-02 10:00:00", None),
    ("a", "login", "2024-01-01 23:59:59.999999", None),
    ("a", "purchase", "2024-01-04 00:00:00", -1.0),
)


def digest_of(path) -> bytes:
    return pq.read_metadata(path).metadata[CONTENT_KEY]


def test_a_table_comes_back_as_it_was(tmp_path):
    frame = pd.DataFrame(
        {
            "customer_id": ["a", "b", None],
            "at": pd.to_datetime(["2024-01-01", None, "2024-01-03"], utc=True).astype("datetime64[us, UTC]"),
            "n": [1.5, None, -0.0],
            "yes": [True, False, True],
        }
    )
    write_table(tmp_path / "t.parquet", frame)
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.parquet", made_by="x"), frame)
    assert read_table(tmp_path / "t.parquet", ["n"], made_by="x").columns.tolist() == ["n"]


def test_equal_content_is_equal_bytes_and_one_digest(tmp_path):
    frame = pd.DataFrame({"n": [1.0, 2.0], "s": ["x", "y"]})
    write_table(tmp_path / "a.parquet", frame)
    write_table(tmp_path / "b.parquet", frame.copy().set_axis([7, 9]))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


@pytest.mark.parametrize(
    "other",
    [
        {"n": [1.0, 3.0], "s": ["x", "y"]},
        {"n": [1.0, 2.0], "s": ["x", "z"]},
        {"n": [1.0, None], "s": ["x", "y"]},
        {"n": [2.0, 1.0], "s": ["y", "x"]},
        {"n": [1.0, 2.0], "t": ["x", "y"]},
        {"n": [1, 2], "s": ["x", "y"]},
        {"n": [1.0], "s": ["x"]},
    ],
)
def test_any_change_of_content_changes_the_digest(tmp_path, other):
    write_table(tmp_path / "a.parquet", pd.DataFrame({"n": [1.0, 2.0], "s": ["x", "y"]}))
    write_table(tmp_path / "b.parquet", pd.DataFrame(other))
    assert digest_of(tmp_path / "a.parquet") != digest_of(tmp_path / "b.parquet")


def test_events_are_split_by_utc_day_and_sorted(tmp_path):
    assert write_event_days(tmp_path, LOG) == 3
    assert list_event_days(tmp_path) == [dt.date(2024, 1, 1), dt.date(2024, 1, 2), dt.date(2024, 1, 4)]
    first = read_table(tmp_path / "2024-01-01.parquet", made_by="x")
    assert first[["customer_id", "event_type"]].to_numpy().tolist() == [["a", "login"], ["a", "purchase"]]
    second = read_table(tmp_path / "2024-01-02.parquet", made_by="x")
    assert second["customer_id"].tolist() == ["a", "b"]  # midnight belongs to the day that it begins
    assert pq.read_schema(tmp_path / "2024-01-04.parquet").remove_metadata() == EVENT_SCHEMA
    whole = read_table(tmp_path, made_by="x")
    assert whole["amount"].fillna(0).tolist() == [0, 1.5, 0, 2.0, -1.0]


def test_the_order_of_rows_in_the_source_changes_no_byte(tmp_path):
    for name, log in (("a", LOG), ("b", LOG.iloc[::-1])):
        (tmp_path / name).mkdir()
        write_event_days(tmp_path / name, log)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_days_digest_is_of_that_day_alone(tmp_path):
    for name, log in (("a", LOG), ("b", LOG.iloc[:4])):
        (tmp_path / name).mkdir()
        write_event_days(tmp_path / name, log)
    for day in ("2024-01-01", "2024-01-02"):
        assert digest_of(tmp_path / f"a/{day}.parquet") == digest_of(tmp_path / f"b/{day}.parquet")


def test_no_events_are_no_files(tmp_path):
    assert write_event_days(tmp_path, LOG.iloc[:0]) == 0
    assert list_event_days(tmp_path) == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(path, pd.DataFrame({"n": [1.0]}))
    with pytest.raises(pa.ArrowInvalid):
        write_table(path, pd.DataFrame({"n": ["x"]}), pa.schema([("n", pa.float64())]))
    assert read_table(path, made_by="x")["n"].tolist() == [1.0]
    assert [found.name for found in tmp_path.iterdir()] == ["t.parquet"]


def test_a_missing_or_damaged_table_says_which_stage_writes_it(tmp_path):
    (tmp_path / "bad.parquet").write_text("no parquet", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for name in ("none.parquet", "bad.parquet", "empty"):
        with pytest.raises(DataError, match=rf"{name}: .*'closedloop ingest' writes"):
            read_table(tmp_path / name, made_by="closedloop ingest")
