"""Columns of a source to typed columns; the first value that cannot be read is named with its row."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from closedloop.core.features.cleaning import is_blank
from closedloop.core.features.time_formats import UNIX_UNITS
from closedloop.errors import ConfigError, DataError
from closedloop.rules import ID_LENGTH_MAX, normalise_code

# ISO 8601, extended or basic, with a zone only after a time of day: Z, +01:00, +0100, or the +01 that PostgreSQL writes
TIME = re.compile(
    r"^(?P<date>\d{4}-\d{2}-\d{2}|\d{8})"
    r"(?:[Tt ](?P<clock>\d{2}:\d{2}(?::\d{2}(?:[.,]\d{1,9})?)?|\d{4}(?:\d{2}(?:[.,]\d{1,9})?)?)"
    r"\s?(?P<zone>[Zz]|[+-](?:0\d|1[0-4])(?::?[0-5]\d)?)?)?$"
)
MIDNIGHT_AT_END = re.compile(r"^24:?00(?::?00(?:[.,]0+)?)?$")
TIME_RULE = "must be a date or time such as 2024-05-31 13:45:00, from the year 1678 to 2261"
NO_NUMBERS = [bool, np.bool_, dt.timedelta, pd.Timedelta, np.timedelta64, list, dict, np.ndarray]
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def parse_ids(values: pd.Series, *, place: str, row_numbers: pd.Series) -> pd.Series:
    """Ids as text or None, spelt the same whatever type their column has (`rules.normalise_code`).

    Raises
    ------
    DataError
        Naming the first value that may have lost digits, or that the service would not take as an id (a boolean).
    """

    def read(value: Any) -> str | None:
        if isinstance(value, bool | np.bool_):
            raise ValueError("must be text or a whole number")
        text = normalise_code(value)
        if text and (len(text) > ID_LENGTH_MAX or not text.isprintable()):
            raise ValueError(f"must be a text of 1 to {ID_LENGTH_MAX} printable characters")
        return text

    return _map_values(values, read, place=place, row_numbers=row_numbers)


def parse_codes(values: pd.Series, *, place: str, row_numbers: pd.Series) -> pd.Series:
    """Categories as text or None, spelt the same whatever type their column has (`rules.normalise_code`).

    Raises
    ------
    DataError
        Naming the first value that may have lost digits, or holds a control character such as NUL.
    """

    def read(value: Any) -> str | None:
        text = normalise_code(value)
        if text and CONTROL.search(text):
            raise ValueError("must not hold control characters, such as NUL")
        return text

    return _map_values(values, read, place=place, row_numbers=row_numbers)


def parse_numbers(values: pd.Series, *, place: str, row_numbers: pd.Series, decimal: str = ".") -> pd.Series:
    """Text to float64; blank becomes NaN. ``decimal`` is the mark before the fraction, in text.

    Raises
    ------
    DataError
        Naming the first value that is not a finite number, its row and how many there are; a boolean, a span of time
        and a list are none.
    """
    blank, rule = is_blank(values), "must be a number"
    if values.dtype.kind in "Mm":
        values = values.astype(object)  # pandas would count nanoseconds
    plain = values
    if decimal != "." and not pd.api.types.is_numeric_dtype(values):
        text = values.astype("string")
        plain = text.str.replace(decimal, ".", regex=False).mask(text.str.contains(".", regex=False))
        rule += f" with the decimal mark {decimal!r}, and none between thousands"
    other = _is_no_number(values)
    numbers = pd.to_numeric(plain.mask(other), errors="coerce").astype("float64")
    bad = (numbers.isna() | np.isinf(numbers)) & ~blank
    _refuse_first(values, bad, place=place, row_numbers=row_numbers, rule=rule)
    return numbers


def _is_no_number(values: pd.Series) -> pd.Series:
    """Which values pandas would take for numbers though no later part does, or cannot look at."""
    kinds = values.map(type) if values.dtype == object else pd.Series(values.dtype.type, index=values.index)
    return kinds.isin(NO_NUMBERS)


def parse_times(
    values: pd.Series,
    *,
    timezone: str | None,
    place: str,
    row_numbers: pd.Series,
    time_format: str | None = None,
) -> pd.Series:
    """Text or timestamps to ``datetime64[us, UTC]``; times without a zone are in ``timezone``.

    ``time_format`` is that of text (`strptime`), or a unit of `UNIX_UNITS`; None is ISO 8601.

    A local time that the change of clocks makes ambiguous is taken as standard time, one that it skips as the next
    existing time. 24:00 is the midnight at the end of its day.

    Raises
    ------
    DataError
        Naming the first value that is not a time.
    ConfigError
        If times have no zone and the config names none.
    """
    where: dict[str, Any] = {"place": place, "row_numbers": row_numbers}
    if pd.api.types.is_datetime64_any_dtype(values):
        _refuse_first(values, values.isna(), **where, rule=TIME_RULE)
        zoned = values.dt.tz is not None
        times = values if zoned else _localize(values, timezone, place)
        converted: pd.Series = times.dt.tz_convert("UTC").astype("datetime64[us, UTC]")
        return converted
    text = values.astype("string").str.strip()
    if time_format is not None:
        formatted = read_format(text, time_format)
        _refuse_first(values, formatted.isna(), **where, rule=f"must be a time as source.time_format {time_format!r}")
        local = formatted if formatted.dt.tz is not None else _localize(formatted, timezone, place)
        read: pd.Series = local.dt.tz_convert("UTC").dt.as_unit("us")
        return read
    # Most files, in a quarter of the time; pandas takes "now" and a 60th second for times in any format.
    plain = (text.str.len() == 19) & (text.str[17] != "6")
    local = pd.to_datetime(text.where(plain), format="%Y-%m-%d %H:%M:%S", errors="coerce")
    ahead = pd.Series(np.nan, index=values.index)
    if (other := local.isna()).any():
        local[other], ahead[other] = _split_zone(values[other], text[other], row_numbers[other.to_numpy()], place)
    own = ahead.notna()
    times = pd.Series(index=values.index, dtype="datetime64[us, UTC]", name=values.name)
    times[own] = (local[own] - pd.to_timedelta(ahead[own], unit="min")).dt.tz_localize("UTC").dt.as_unit("us")
    if not own.all():
        times[~own] = _localize(local[~own], timezone, place).dt.tz_convert("UTC").dt.as_unit("us")
    return times


def read_format(text: pd.Series, time_format: str) -> pd.Series:
    """Text as times of a format or unit: UTC where that names a zone, as they stand there elsewhere, NaT if not one.

    >>> read_format(pd.Series(["31.05.2024", "2024-05-31"]), "%d.%m.%Y").tolist()
    [Timestamp('2024-05-31 00:00:00'), NaT]
    """
    if (unit := UNIX_UNITS.get(time_format)) is not None:
        numbers = pd.to_numeric(text, errors="coerce").astype("Float64")
        counted: pd.Series = pd.to_datetime(numbers, unit=unit, errors="coerce", utc=True)  # type: ignore[call-overload]  # pandas-stubs wants a literal unit
        return counted
    wall_clock = text.isin(["now", "today"])  # times of any format, to pandas
    return pd.to_datetime(text.mask(wall_clock), format=time_format, errors="coerce", utc="%z" in time_format)


def _split_zone(values: pd.Series, text: pd.Series, row_numbers: pd.Series, place: str) -> tuple[pd.Series, pd.Series]:
    """Times as they stand there (datetime64), and the minutes that their zones are ahead of UTC: NaN without a zone."""
    where: dict[str, Any] = {"place": place, "row_numbers": row_numbers}
    found = [TIME.match(one) if isinstance(one, str) else None for one in text.tolist()]
    _refuse_first(values, pd.Series([one is None for one in found], index=values.index), **where, rule=TIME_RULE)
    parts = [one.group("date", "clock", "zone") for one in found if one is not None]
    at_end = [clock is not None and MIDNIGHT_AT_END.match(clock) is not None for _, clock, _ in parts]
    written = [
        f"{date}T{'00:00' if clock is None or end else clock.replace(',', '.')}"
        for (date, clock, _), end in zip(parts, at_end, strict=True)
    ]
    local = pd.to_datetime(pd.Series(written, index=values.index), format="ISO8601", errors="coerce")
    _refuse_first(values, local.isna(), **where, rule=TIME_RULE)
    minutes = {zone: _read_zone(zone) for zone in {zone for *_, zone in parts}}
    ahead = pd.Series([minutes[zone] for *_, zone in parts], index=values.index)
    return local + pd.to_timedelta(np.array(at_end, dtype=int), unit="D"), ahead


def _read_zone(zone: str | None) -> float:
    """Minutes ahead of UTC."""
    if zone is None:
        return np.nan
    if zone in "Zz":
        return 0.0
    digits = zone[1:].replace(":", "").ljust(4, "0")
    return float(zone[0] + "1") * (int(digits[:2]) * 60 + int(digits[2:]))


def _localize(times: pd.Series, timezone: str | None, place: str) -> pd.Series:
    if timezone is None:
        raise ConfigError(f"timezone: {place} has times without a zone; name the zone they are in, such as UTC")
    standard = np.zeros(len(times), dtype=bool)
    localized: pd.Series = times.dt.tz_localize(timezone, ambiguous=standard, nonexistent="shift_forward")
    return localized


def parse_labels(
    values: pd.Series, *, churned: Sequence[str], stayed: Sequence[str], place: str, row_numbers: pd.Series
) -> pd.Series:
    """The label column as bool, True for churned.

    Values are spelt as ids and categories are; a boolean is also ``true`` or ``1``, ``false`` or ``0`` in any case.

    Raises
    ------
    DataError
        Naming the first value that is neither.
    """
    names = " or ".join(map(repr, churned)), " or ".join(map(repr, stayed))
    rule = f"must be {names[0]} (churned) or {names[1]} (stayed)"
    known = {normalise_code(name): True for name in churned} | {normalise_code(name): False for name in stayed}

    def read(value: Any) -> bool:
        spellings = [normalise_code(value)]
        if isinstance(value, bool | np.bool_):
            alike = ("true", "1") if value else ("false", "0")
            spellings += [name for name in known if name is not None and name.casefold() in alike]
        found = next((known[name] for name in spellings if name in known), None)
        if found is None:
            raise ValueError(rule)
        return found

    _refuse_first(values, is_blank(values), place=place, row_numbers=row_numbers, rule=rule)
    return _map_values(values, read, place=place, row_numbers=row_numbers).astype(bool)


def _map_values(values: pd.Series, read: Callable[[Any], Any], *, place: str, row_numbers: pd.Series) -> pd.Series:
    """``read`` of each value, asked once of each different one; a missing value stays None."""
    try:
        codes, different = pd.factorize(values)
    except TypeError:  # lists and mappings, which Parquet and databases have
        nested = values.map(lambda value: not isinstance(value, Hashable))
        _refuse_first(values, nested, place=place, row_numbers=row_numbers, rule="must be one value, not several")
        raise
    found: list[Any] = []
    wrong: dict[int, str] = {}
    # NumPy's floats know how many digits they hold; pandas gives Python's
    for position, value in enumerate(different.to_numpy() if different.dtype.kind == "f" else different):
        try:
            found.append(read(value))
        except ValueError as error:
            found.append(None)
            wrong[position] = str(error)
    if wrong:
        bad = pd.Series(np.isin(codes, list(wrong)), index=values.index)
        rule = wrong[int(codes[np.flatnonzero(bad.to_numpy())[0]])]
        _refuse_first(values, bad, place=place, row_numbers=row_numbers, rule=rule)
    table = np.array([*found, None], dtype=object)
    return pd.Series(table[codes], index=values.index, name=values.name, dtype=object)


def _refuse_first(values: pd.Series, bad: pd.Series, *, place: str, row_numbers: pd.Series, rule: str) -> None:
    if bad.any():
        position = int(np.flatnonzero(bad.to_numpy())[0])
        value = values.iloc[position]
        shown = repr(value) if value is None or isinstance(value, str) else str(value)  # not np.float64(1.0)
        raise DataError(
            f"{place}, row {row_numbers.iloc[position]}, column {values.name!r}: {rule}, "
            f"found {shown:.60} ({int(bad.sum())} such in this part)"
        )
