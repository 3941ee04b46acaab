"""Columns of a source to typed, canonical columns; each value that cannot be read is named with its row."""

from __future__ import annotations

import numpy as np
import pandas as pd

from closedloop.core.cleaning import is_blank
from closedloop.errors import ConfigError, DataError

# A zone after a time of day: Z, +01:00, +0100, or the +01 that PostgreSQL writes.
ZONE_PATTERN = r":\d{2}(?:\.\d+)?\s?(?:Z|[+-]\d{2}(?::?\d{2})?)$"


def parse_numbers(values: pd.Series, *, place: str, row_numbers: pd.Series) -> pd.Series:
    """Text to float64; blank becomes NaN.

    Raises
    ------
    DataError
        Naming the first value that is not a finite number, its row and how many there are.
    """
    numbers = pd.to_numeric(values, errors="coerce").astype("float64")
    bad = (numbers.isna() | np.isinf(numbers)) & ~is_blank(values)
    _refuse_first(values, bad, place=place, row_numbers=row_numbers, rule="must be a number")
    return numbers


def parse_times(values: pd.Series, *, timezone: str | None, place: str, row_numbers: pd.Series) -> pd.Series:
    """Text or timestamps to ``datetime64[us, UTC]``; times without a zone are in ``timezone``.

    A local time that the change of clocks makes ambiguous is taken as standard time, one that it skips as the next
    existing time.

    Raises
    ------
    DataError
        Naming the first value that is not a time.
    ConfigError
        If times have no zone and the config names none.
    """
    if values.empty:  # nor has it a zone
        return pd.Series(index=values.index, dtype="datetime64[us, UTC]", name=values.name)
    if pd.api.types.is_datetime64_any_dtype(values):
        times = values
    else:
        text = values.astype("string").str.strip()
        has_zone = text.str.contains(ZONE_PATTERN, regex=True).fillna(False).astype(bool)
        if has_zone.any() and not has_zone.all():
            parts = [values[has_zone], values[~has_zone]]
            numbers = [row_numbers[has_zone.to_numpy()], row_numbers[~has_zone.to_numpy()]]
            read = [
                parse_times(part, timezone=timezone, place=place, row_numbers=rows)
                for part, rows in zip(parts, numbers, strict=True)
            ]
            mixed: pd.Series = pd.concat(read).loc[values.index]
            return mixed
        times = pd.to_datetime(text, errors="coerce", utc=bool(has_zone.any()), format="ISO8601")
    _refuse_first(
        values,
        times.isna(),
        place=place,
        row_numbers=row_numbers,
        rule="must be a date or time such as 2024-05-31 13:45:00",
    )
    if times.dt.tz is None:
        if timezone is None:
            raise ConfigError(f"timezone: {place} has times without a zone; name the zone they are in, such as UTC")
        standard = np.zeros(len(times), dtype=bool)
        times = times.dt.tz_localize(timezone, ambiguous=standard, nonexistent="shift_forward")
    converted: pd.Series = times.dt.tz_convert("UTC").astype("datetime64[us, UTC]")
    return converted


def parse_labels(values: pd.Series, *, churned: str, stayed: str, place: str, row_numbers: pd.Series) -> pd.Series:
    """The label column as bool, True for churned.

    Raises
    ------
    DataError
        Naming the first value that is neither.
    """
    text = values.astype("string").str.strip()
    bad = ~text.isin([churned, stayed]).fillna(False).astype(bool)
    _refuse_first(
        values, bad, place=place, row_numbers=row_numbers, rule=f"must be {churned!r} (churned) or {stayed!r} (stayed)"
    )
    return text.eq(churned).astype(bool)


def _refuse_first(values: pd.Series, bad: pd.Series, *, place: str, row_numbers: pd.Series, rule: str) -> None:
    if bad.any():
        position = int(np.flatnonzero(bad.to_numpy())[0])
        raise DataError(
            f"{place}, row {row_numbers.iloc[position]}, column {values.name!r}: {rule}, "
            f"found {values.iloc[position]!r:.60} ({int(bad.sum())} such in this part)"
        )
