"""Window features before a snapshot, as Ibis expressions over the daily aggregates: one definition for every engine."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from closedloop.core.features.daily import DAILY_COLUMNS, FRACTION_STEPS

if TYPE_CHECKING:
    import ibis

AGGREGATIONS = ("count", "days", "sum", "mean", "min", "max", "last")
AMOUNT_AGGREGATIONS = ("sum", "mean", "min", "max", "last")
ZERO_IF_EMPTY = ("count", "days", "sum")
# Columns and their Ibis types.
PAST_COLUMNS = {**DAILY_COLUMNS, "age_days": "int32"}
ORIGINS_COLUMNS = {"customer_id": "string", "origin_day": "date"}


@dataclass(frozen=True)
class WindowSpec:
    """The features that are computed before a snapshot s.

    Parameters
    ----------
    event_types
        Types that have features; others in the log are ignored.
    amount_types
        Those of them whose events carry an amount.
    label_event_type
        The type that makes a customer active, and whose absence after s is churn.
    window_days
        Windows are [s - days, s).
    aggregations
        Of ``AGGREGATIONS``; all but count and days are of amounts.
    active_days
        The population at s are the customers with an event of ``label_event_type`` in [s - active_days, s).
    recency_cap_days, tenure_cap_days
        Upper bounds of recency and tenure: without them these columns would drift merely because time passes.
    """

    event_types: tuple[str, ...]
    amount_types: tuple[str, ...]
    label_event_type: str
    window_days: tuple[int, ...]
    aggregations: tuple[str, ...]
    active_days: int
    recency_cap_days: int
    tenure_cap_days: int

    @property
    def lookback_days(self) -> int:
        """Days before a snapshot that its features depend on, apart from tenure."""
        return max(*self.window_days, self.active_days, self.recency_cap_days)


def feature_names(spec: WindowSpec) -> tuple[str, ...]:
    """Names of the features in column order; all are float64.

    >>> spec = WindowSpec(("visit",), (), "visit", (7,), ("count", "sum"), 30, 90, 365)
    >>> feature_names(spec)
    ('visit_count_7d', 'visit_recency_days', 'tenure_days')
    """
    windows = [name for name, *_ in _list_window_columns(spec)]
    return (*windows, *(f"{event_type}_recency_days" for event_type in spec.event_types), "tenure_days")


def list_snapshots(first: dt.datetime, as_of: dt.datetime, every_days: int) -> list[dt.datetime]:
    """UTC midnights ``as_of - k * every_days`` that are not before ``first``, ascending.

    Examples
    --------
    >>> first, as_of = dt.datetime(2025, 1, 1, tzinfo=dt.UTC), dt.datetime(2025, 1, 16, tzinfo=dt.UTC)
    >>> [time.day for time in list_snapshots(first, as_of, 7)]
    [2, 9, 16]
    """
    count = (as_of - first).days // every_days + 1
    return [as_of - dt.timedelta(days=every_days * k) for k in reversed(range(count))]


def find_first_days(daily: ibis.Table, spec: WindowSpec) -> ibis.Table:
    """The day of each customer's first event: ``customer_id``, ``origin_day``.

    It serves every snapshot, since a customer of the population has an event before the snapshot.
    """
    known = daily.filter(daily.event_type.isin(spec.event_types))
    return known.group_by("customer_id").aggregate(origin_day=known.day.min())


def select_past(daily: ibis.Table, snapshot: dt.datetime, spec: WindowSpec) -> ibis.Table:
    """The daily aggregates that a snapshot depends on, with ``age_days``: 1 for the day before the snapshot."""
    import ibis

    day = snapshot.date()
    known = daily.filter(daily.day >= day - dt.timedelta(days=spec.lookback_days), daily.day < day)
    return known.mutate(age_days=ibis.literal(day).delta(known.day, unit="day").cast("int32"))


def combine_windows(past: ibis.Table, spec: WindowSpec) -> ibis.Table:
    """``customer_id`` of the population and its features, tenure apart.

    It holds no date, so that it is compiled once and runs for every snapshot.

    Parameters
    ----------
    past : ibis.Table
        From `select_past`; columns of ``PAST_COLUMNS``.
    """
    import ibis

    active = _aggregate_type(past, spec.label_event_type, spec)
    wide = active.filter(active[_name_age(spec.label_event_type)] <= spec.active_days)
    for event_type in spec.event_types:
        if event_type != spec.label_event_type:
            wide = wide.left_join(_aggregate_type(past, event_type, spec), "customer_id").drop("customer_id_right")
    features = {name: _finish(wide[name], kind).cast("float64") for name, kind, *_ in _list_window_columns(spec)}
    for event_type in spec.event_types:
        age_days = wide[_name_age(event_type)].fill_null(spec.recency_cap_days)
        features[f"{event_type}_recency_days"] = ibis.least(age_days, spec.recency_cap_days).cast("float64")
    return wide.select(wide.customer_id, **features)


def date_windows(windows: ibis.Table, origins: ibis.Table, snapshot: dt.datetime, spec: WindowSpec) -> ibis.Table:
    """Add ``event_timestamp`` (UTC, the zone dropped) and ``tenure_days`` to the windows of a snapshot."""
    import ibis

    wide = windows.left_join(origins, "customer_id").drop("customer_id_right")
    tenure_days = ibis.literal(snapshot.date()).delta(wide.origin_day, unit="day")
    return wide.select(
        wide.customer_id,
        ibis.literal(snapshot.replace(tzinfo=None)).cast("timestamp(6)").name("event_timestamp"),
        *feature_names(spec)[:-1],
        tenure_days=tenure_days.clip(0, spec.tenure_cap_days).cast("float64"),
    )


def _aggregate_type(past: ibis.Table, event_type: str, spec: WindowSpec) -> ibis.Table:
    """One row a customer with an event of this type in reach: its windows and the age of its newest day.

    Conditions stand inside the aggregates, not in FILTER clauses: DuckDB copies every input for each of those.
    """
    rows = past.filter(past.event_type == event_type)
    columns: dict[str, Any] = {_name_age(event_type): rows.age_days.min()}
    for name, aggregation, days, owner in _list_window_columns(spec):
        if owner == event_type:
            inside = rows.age_days <= days if days < spec.lookback_days else None
            columns[name] = _aggregate(rows, aggregation, inside, days)
    return rows.group_by("customer_id").aggregate(**columns)


def _aggregate(rows: ibis.Table, aggregation: str, inside: ibis.Value | None, days: int) -> Any:
    import ibis

    def keep(column: Any) -> Any:
        return column if inside is None else ibis.ifelse(inside, column, None)

    def total(column: Any) -> Any:
        # counts as floats: DuckDB adds those at twice the speed of integers, and they stay exact
        return keep(column.cast("float64")).sum()

    if aggregation == "count":
        return total(rows.event_count)
    if aggregation == "days":
        return keep(rows.age_days).count()
    if aggregation == "min":
        return keep(rows.amount_min).min()
    if aggregation == "max":
        return keep(rows.amount_max).max()
    if aggregation == "last":
        has_amount = rows.amount_count > 0
        latest = rows.amount_last.argmin(rows.age_days, where=has_amount)
        return ibis.ifelse(ibis.ifelse(has_amount, rows.age_days, None).min() <= days, latest, None)
    amount = total(rows.amount_whole) + keep(rows.amount_fraction).sum().cast("float64") / FRACTION_STEPS
    return amount if aggregation == "sum" else amount / total(rows.amount_count).nullif(0)


def _finish(column: Any, aggregation: str) -> Any:
    return column.fill_null(0) if aggregation in ZERO_IF_EMPTY else column


def _name_age(event_type: str) -> str:
    return f"{event_type}_age_days"


def _list_window_columns(spec: WindowSpec) -> Iterator[tuple[str, str, int, str]]:
    for event_type in spec.event_types:
        for days in spec.window_days:
            for aggregation in spec.aggregations:
                if aggregation not in AMOUNT_AGGREGATIONS or event_type in spec.amount_types:
                    yield f"{event_type}_{aggregation}_{days}d", aggregation, days, event_type
