"""Text to numbers, times and labels; what cannot be read is named."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from closedloop.core.canonical import parse_labels, parse_numbers, parse_times
from closedloop.errors import ConfigError, DataError


def where(values: pd.Series, first: int = 1) -> dict[str, object]:
    return {"place": "file.csv", "row_numbers": pd.Series(np.arange(first, first + len(values)))}


def times_of(values: list[object], timezone: str | None = "Europe/London") -> list[str]:
    column = pd.Series(values, name="at")
    found = parse_times(column, timezone=timezone, **where(column))
    assert str(found.dtype) == "datetime64[us, UTC]"
    return [f"{time:%Y-%m-%d %H:%M:%S.%f}" for time in found]


def numbers_of(values: list[object]) -> list[float]:
    column = pd.Series(values, name="price")
    found = parse_numbers(column, **where(column))
    assert found.dtype == np.float64
    return found.tolist()


def test_numbers_with_spaces_exponents_and_decimals():
    assert numbers_of(["1", " -2.5 ", "1e3", Decimal("0.25"), 7]) == [1.0, -2.5, 1000.0, 0.25, 7.0]


def test_a_blank_number_is_missing():
    assert np.isnan(numbers_of(["", "  ", None])).all()


@pytest.mark.parametrize("bad", ["1,5", "abc", "nan", "inf", "-inf", "1_000", "£5"])
def test_a_value_that_is_no_number_is_named_with_its_row(bad):
    column = pd.Series(["1", "2", bad, bad], name="price")
    with pytest.raises(DataError) as error:
        parse_numbers(column, **where(column, first=501))
    assert str(error.value) == (
        f"file.csv, row 503, column 'price': must be a number, found {bad!r} (2 such in this part)"
    )


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2024-01-15 12:00:00", "2024-01-15 12:00:00.000000"),  # winter: Greenwich
        ("2024-07-15 12:00:00", "2024-07-15 11:00:00.000000"),  # summer: an hour ahead
        ("2024-07-15", "2024-07-14 23:00:00.000000"),
        ("2024-07-15T12:00:00.123456", "2024-07-15 11:00:00.123456"),
        (" 2024-07-15 12:00 ", "2024-07-15 11:00:00.000000"),
        ("2024-07-15 12:00:00Z", "2024-07-15 12:00:00.000000"),  # its own zone wins over the config's
        ("2024-07-15 12:00:00+05:30", "2024-07-15 06:30:00.000000"),
        ("2024-07-15 12:00:00-0300", "2024-07-15 15:00:00.000000"),
        ("2024-07-15 12:00:00+02", "2024-07-15 10:00:00.000000"),
        ("2024-03-31 01:30:00", "2024-03-31 01:00:00.000000"),  # skipped by the clocks: the next time there is
        ("2024-10-27 01:30:00", "2024-10-27 01:30:00.000000"),  # happens twice: standard time
        ("2024-10-27 00:59:59", "2024-10-26 23:59:59.000000"),
    ],
)
def test_times_become_utc(text, utc):
    assert times_of([text]) == [utc]


def test_rows_with_and_without_a_zone_may_be_mixed():
    values = ["2024-07-15 12:00:00", "2024-07-15 12:00:00Z", "2024-07-15 12:00", "2024-12-15 12:00:00+01"]
    assert [text[11:16] for text in times_of(values)] == ["11:00", "12:00", "11:00", "11:00"]


@given(
    st.integers(0, 47 * 365 * 86_400).map(lambda s: dt.datetime.fromisoformat("1990-01-01") + dt.timedelta(seconds=s)),
    st.sampled_from(["Europe/London", "America/New_York", "Asia/Kolkata", "UTC"]),
)
def test_local_times_agree_with_the_standard_library(local, zone):
    # fold=1 is the later of two equal local times: standard time
    expected = local.replace(tzinfo=ZoneInfo(zone), fold=1).astimezone(dt.UTC)
    if expected.astimezone(ZoneInfo(zone)).replace(tzinfo=None) != local:
        return  # skipped by the clocks: covered by hand above
    assert times_of([local.isoformat(sep=" ")], zone) == [f"{expected:%Y-%m-%d %H:%M:%S.%f}"]


def test_typed_columns_of_parquet_and_databases_are_times_too():
    assert times_of([dt.date(2024, 1, 15)]) == ["2024-01-15 00:00:00.000000"]
    assert times_of([pd.Timestamp("2024-07-15 12:00")]) == ["2024-07-15 11:00:00.000000"]
    assert times_of([pd.Timestamp("2024-07-15 12:00", tz="Asia/Tokyo")]) == ["2024-07-15 03:00:00.000000"]


def test_nanoseconds_are_cut_to_microseconds():
    assert times_of([pd.Timestamp("2024-01-15 12:00:00.123456789")]) == ["2024-01-15 12:00:00.123456"]


@pytest.mark.parametrize("bad", ["15/07/2024", "yesterday", "", None, "2024-13-01", "1700000000.5"])
def test_a_value_that_is_no_time_is_named_with_its_row(bad):
    column = pd.Series(["2024-01-01 10:00:00", "2024-01-01 10:00:00Z", bad], name="at")
    with pytest.raises(DataError, match=r"^file\.csv, row 43, column 'at': must be a date or time such as") as error:
        parse_times(column, timezone="UTC", **where(column, first=41))
    assert f"found {bad!r} (1 such in this part)" in str(error.value)


def test_without_a_zone_anywhere_the_config_must_name_one():
    for values in (["2024-01-01 10:00:00"], ["2024-01-01 10:00:00Z", "2024-01-01 10:00:00"]):
        with pytest.raises(ConfigError, match=r"timezone: file\.csv has times without a zone"):
            times_of(values, None)
    assert times_of(["2024-01-01 10:00:00Z"], None) == ["2024-01-01 10:00:00.000000"]


def test_where_there_are_no_times_no_zone_is_asked_for():
    """A day's file may hold nothing but its header, or nothing that is kept."""
    assert times_of([], None) == []


def test_labels_are_one_of_two_values():
    column = pd.Series(["Yes", " No ", "Yes"], name="Churn")
    assert parse_labels(column, churned="Yes", stayed="No", **where(column)).tolist() == [True, False, True]


@pytest.mark.parametrize("bad", ["yes", "", None, "Maybe"])
def test_any_other_label_is_named_with_its_row(bad):
    column = pd.Series(["Yes", bad], name="Churn")
    with pytest.raises(DataError) as error:
        parse_labels(column, churned="Yes", stayed="No", **where(column))
    assert "file.csv, row 2, column 'Churn': must be 'Yes' (churned) or 'No' (stayed)" in str(error.value)
    assert f"found {bad!r}" in str(error.value)


def test_parsing_changes_none_of_its_arguments():
    column = pd.Series([" 2024-01-01 ", "2024-01-01 10:00Z"], name="at")
    parse_times(column, timezone="UTC", **where(column))
    assert column.tolist() == [" 2024-01-01 ", "2024-01-01 10:00Z"]
