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

from closedloop.core.features.parsing import parse_codes, parse_ids, parse_labels, parse_numbers, parse_times
from closedloop.errors import ConfigError, DataError

# "now" would be this run's clock; the others are cut off, do not exist, or say too little
NO_TIMES = ["now", "today", "2024", "2024-03", "2024-03-1", "2024-03-01 1", "2024-03-01 10:0", "2024-03-01T24:01"]
NO_TIMES += ["2024-02-30", "9999-12-31", "2024-03-01T10:00+15:00", "2024-03-01 10:00:60", "20240301.0", "2024-W01-1"]


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


@pytest.mark.parametrize(
    ("values", "utc"),
    [
        # the basic form with an offset, before and after a plain time of Lisbon's summer
        (["20230102T101500+0900", "2023-07-02 10:15:00", "20230702T101500+0200"], ["01:15", "09:15", "08:15"]),
        (["2023-07-02 10:15:00", "20230102T101500+0900"], ["09:15", "01:15"]),
        (["20230102T101500+0100", "20230702T101500+0200"], ["09:15", "08:15"]),
        (["2023-01-02T10:15Z", "2023-01-02T10:15-03:30", "2023-01-02T10:15+05"], ["10:15", "13:45", "05:15"]),
        (["20230102T1015", "20230702", "2023-07-02t10:15z"], ["10:15", "23:00", "10:15"]),
        (["2023-01-02T10:15:00,5Z", "20230102T101500.25Z"], ["10:15", "10:15"]),
    ],
)
def test_offsets_and_plain_times_in_both_forms_of_iso_8601(values, utc):
    assert [text[11:16] for text in times_of(values, "Europe/Lisbon")] == utc


def test_the_end_of_a_day_is_the_midnight_after_it():
    assert times_of(["2023-12-31T24:00:00Z", "20231231T2400"], "UTC") == ["2024-01-01 00:00:00.000000"] * 2


def test_typed_columns_of_parquet_and_databases_are_times_too():
    assert times_of([dt.date(2024, 1, 15)]) == ["2024-01-15 00:00:00.000000"]
    assert times_of([pd.Timestamp("2024-07-15 12:00")]) == ["2024-07-15 11:00:00.000000"]
    assert times_of([pd.Timestamp("2024-07-15 12:00", tz="Asia/Tokyo")]) == ["2024-07-15 03:00:00.000000"]


def test_nanoseconds_are_cut_to_microseconds():
    assert times_of([pd.Timestamp("2024-01-15 12:00:00.123456789")]) == ["2024-01-15 12:00:00.123456"]


@pytest.mark.parametrize("bad", ["15/07/2024", "yesterday", "", None, "2024-13-01", "1700000000.5", *NO_TIMES])
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
    assert parse_labels(column, churned=["Yes"], stayed=["No"], **where(column)).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("values", "churned", "stayed"),
    [
        (["Yes", "TRUE", "1", "no"], ["Yes", "TRUE", "1"], ["no"]),
        ([1.0, 1, 1.0, 0.0], ["1"], ["0"]),
        (["1.0", "1", " 1 ", "0.0"], ["1"], ["0"]),
        ([1, 1, 1, 0], ["1.0"], ["0.0"]),
        ([True, True, True, False], ["True"], ["False"]),
        ([True, True, True, False], ["true"], ["false"]),
        ([True, True, True, False], ["1"], ["0"]),
        (np.array([1, 1, 1, 0], dtype="int8"), ["1"], ["0"]),
        (pd.Categorical([1, 1, 1, 0]), ["1"], ["0"]),
        ([Decimal("1.00"), Decimal(1), 1, 0], ["1"], ["0"]),
    ],
)
def test_the_type_of_the_column_does_not_change_its_label(values, churned, stayed):
    column = pd.Series(values, name="Churn")
    assert parse_labels(column, churned=churned, stayed=stayed, **where(column)).tolist() == [True, True, True, False]


@pytest.mark.parametrize("bad", ["yes", "", None, "Maybe"])
def test_any_other_label_is_named_with_its_row(bad):
    column = pd.Series(["Yes", bad], name="Churn")
    with pytest.raises(DataError) as error:
        parse_labels(column, churned=["Yes"], stayed=["No"], **where(column))
    assert "file.csv, row 2, column 'Churn': must be 'Yes' (churned) or 'No' (stayed)" in str(error.value)
    assert f"found {bad!r}" in str(error.value)


def test_a_refused_label_is_shown_without_its_type():
    column = pd.Series([1.0, 2.0], name="Churn")
    with pytest.raises(DataError, match=r"must be '1' \(churned\) or '0' \(stayed\), found 2\.0 \(1 such"):
        parse_labels(column, churned=["1"], stayed=["0"], **where(column))


@pytest.mark.parametrize("parse", [parse_ids, parse_codes])
@pytest.mark.parametrize(
    ("values", "codes"),
    [
        (["17850.0", "17850", " 17850 "], ["17850", "17850", "17850"]),
        (["007", "A-1.0", "12.5", "01.0"], ["007", "A-1.0", "12.5", "01.0"]),
        (["", " ", None], [None, None, None]),
        ([17850, 2], ["17850", "2"]),
        ([17850.0, np.nan], ["17850", None]),
        (pd.array([2**60 + 1, None], dtype="Int64"), [str(2**60 + 1), None]),
        (pd.Categorical([1.0, None]), ["1", None]),
        ([Decimal("7.00"), Decimal("7.50")], ["7", "7.5"]),
    ],
)
def test_ids_and_codes_are_spelt_the_same_whatever_the_type_of_their_column(parse, values, codes):
    column = pd.Series(values, name="plan")
    assert parse(column, **where(column)).tolist() == codes


@pytest.mark.parametrize("parse", [parse_ids, parse_codes])
@pytest.mark.parametrize("bad", [2e16, float(2**53), "2e+16", "9007199254740993.0", np.float32(2**24)])
def test_a_number_that_has_lost_digits_is_refused(parse, bad):
    column = pd.Series(["1", bad, bad], name="plan", dtype=object)
    with pytest.raises(DataError, match=r"^file\.csv, row 2, column 'plan': .* may have lost digits.* \(2 such"):
        parse(column, **where(column))


@pytest.mark.parametrize(
    ("parse", "bad"),
    [(parse_ids, "a\0b"), (parse_ids, "a\nb"), (parse_ids, "x" * 201), (parse_codes, "a\0b"), (parse_codes, "\x1b[1m")],
)
def test_what_no_later_part_takes_is_refused(parse, bad):
    column = pd.Series(["1", bad], name="plan")
    with pytest.raises(DataError, match=r"^file\.csv, row 2, column 'plan': must "):
        parse(column, **where(column))


@pytest.mark.parametrize("bad", [dt.date(2024, 1, 31), pd.Timestamp("2024-01-31"), np.datetime64("2024-01-31")])
@pytest.mark.parametrize("parse", [parse_ids, parse_codes])
def test_a_date_is_no_category_and_is_shown_without_its_type(parse, bad):
    column = pd.Series([bad], name="since", dtype=object)
    with pytest.raises(
        DataError, match=r"column 'since': 2024-01-31.* is neither text nor .*, found 2024-01-31"
    ) as error:
        parse(column, **where(column))
    assert "(2024" not in str(error.value)


def test_a_decimal_comma():
    column = pd.Series(["1,5", " -2 ", "", "1e3"], name="price")
    assert parse_numbers(column, decimal=",", **where(column)).fillna(-1).tolist() == [1.5, -2.0, -1.0, 1000.0]
    column = pd.Series(["1.234,5"], name="price")
    with pytest.raises(DataError, match="must be a number with the decimal mark ',', and none between thousands"):
        parse_numbers(column, decimal=",", **where(column))
    column = pd.Series([1.5, 2.0], name="price")  # typed columns have no mark
    assert parse_numbers(column, decimal=",", **where(column)).tolist() == [1.5, 2.0]


def test_a_time_is_no_number():
    column = pd.Series([pd.Timestamp("2024-01-01")], name="price")
    with pytest.raises(DataError, match="must be a number, found 2024-01-01"):
        parse_numbers(column, **where(column))


@pytest.mark.parametrize("dtype", ["timedelta64[s]", "timedelta64[ns]", "object"])
def test_a_span_of_time_is_no_number(dtype):
    """pandas would count nanoseconds: an INTERVAL of PostgreSQL, a duration of Parquet."""
    column = pd.Series([dt.timedelta(days=1), None], name="tenure").astype(dtype)
    with pytest.raises(DataError, match=r"row 1, column 'tenure': must be a number, found 1 day.* \(1 such"):
        parse_numbers(column, **where(column))


@pytest.mark.parametrize("bad", [["a", "b"], {"a": 1}, np.array([1.0, 2.0]), []])
@pytest.mark.parametrize("parse", [parse_numbers, parse_ids, parse_codes])
def test_a_list_or_a_mapping_is_refused_with_its_row(parse, bad):
    """Parquet and databases (JSON, arrays) have them."""
    column = pd.Series(["1", None, bad], name="plan", dtype=object)
    with pytest.raises(DataError, match=r"^file\.csv, row 3, column 'plan': must be .* \(1 such"):
        parse(column, **where(column))


@pytest.mark.parametrize("dtype", ["bool", "boolean", "object"])
def test_a_boolean_is_no_number(dtype):
    """The service refuses JSON's true for a number, and a batch a column of booleans."""
    column = pd.Series([True, False], name="price", dtype=dtype)
    with pytest.raises(DataError, match=r"row 1, column 'price': must be a number, found True \(2 such"):
        parse_numbers(column, **where(column))


def test_a_boolean_is_no_id():
    column = pd.Series(["a", True], name="member", dtype=object)
    with pytest.raises(DataError, match=r"row 2, column 'member': must be text or a whole number, found True"):
        parse_ids(column, **where(column))


def test_a_boolean_is_the_category_that_its_text_is():
    for values in ([True, False, None], ["True", "False", ""], ["True ", "False", None]):
        column = pd.Series(values, name="paid", dtype=object)
        assert parse_codes(column, **where(column)).tolist() == ["True", "False", None]


def test_parsing_changes_none_of_its_arguments():
    column = pd.Series([" 2024-01-01 ", "2024-01-01 10:00Z"], name="at")
    parse_times(column, timezone="UTC", **where(column))
    assert column.tolist() == [" 2024-01-01 ", "2024-01-01 10:00Z"]


@pytest.mark.parametrize(
    ("values", "time_format", "expected"),
    [
        (["31.05.2024 13:45", " 1.6.2024 0:00 "], "%d.%m.%Y %H:%M", ["2024-05-31 12:45", "2024-05-31 23:00"]),
        (["2024-05-31 13:45 +0300"], "%Y-%m-%d %H:%M %z", ["2024-05-31 10:45"]),
        (["1717163100"], "unix_seconds", ["2024-05-31 13:45"]),
        ([1717163100000], "unix_milliseconds", ["2024-05-31 13:45"]),
    ],
)
def test_times_of_another_form(values, time_format, expected):
    column = pd.Series(values, name="at")
    found = parse_times(column, timezone="Europe/London", time_format=time_format, **where(column))
    assert str(found.dtype) == "datetime64[us, UTC]"
    assert [f"{time:%Y-%m-%d %H:%M}" for time in found] == expected


@pytest.mark.parametrize(
    ("wrong", "time_format"),
    [("2024-05-31", "%d.%m.%Y"), ("x", "unix_seconds"), ("", "%d.%m.%Y"), ("now", "%d.%m.%Y"), ("today", "%d.%m.%Y")],
)
def test_a_time_of_another_form_than_said_is_refused_with_its_row(wrong, time_format):
    column = pd.Series(["31.05.2024" if "%" in time_format else "1717163100", wrong], name="at")
    with pytest.raises(DataError, match=f"row 2, column 'at': must be a time as source.time_format '{time_format}'"):
        parse_times(column, timezone="UTC", time_format=time_format, **where(column))
