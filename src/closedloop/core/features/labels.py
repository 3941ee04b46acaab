"""Churn labels from the daily aggregates: known only once the horizon after the snapshot has closed."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import TYPE_CHECKING

from closedloop.core.features.windows import WindowSpec
from closedloop.errors import ConfigError, count_noun

if TYPE_CHECKING:
    import ibis


def is_closed(snapshot: dt.datetime, *, horizon_days: int, as_of: dt.datetime) -> bool:
    """Whether all of [snapshot, snapshot + horizon) lies before ``as_of``.

    >>> start = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
    >>> is_closed(start, horizon_days=30, as_of=dt.datetime(2025, 1, 31, tzinfo=dt.UTC))
    True
    >>> is_closed(start, horizon_days=30, as_of=dt.datetime(2025, 1, 30, tzinfo=dt.UTC))
    False
    """
    return snapshot + dt.timedelta(days=horizon_days) <= as_of


def compute_labels(
    daily: ibis.Table,
    snapshots: Sequence[dt.datetime],
    spec: WindowSpec,
    *,
    horizon_days: int,
    as_of: dt.datetime,
) -> ibis.Table:
    """Whether each customer of the population at a snapshot churned.

    Churned: no event of ``spec.label_event_type`` in [s, s + horizon_days).

    Parameters
    ----------
    daily : ibis.Table
        Columns of ``DAILY_COLUMNS``, complete from the first s - ``spec.active_days`` to the last
        s + ``horizon_days``.
    snapshots : sequence of datetime
        UTC midnights, at least one, each with a closed horizon at ``as_of``.

    Returns
    -------
    ibis.Table
        ``customer_id``, ``event_timestamp``, ``churned`` bool; one row a customer and snapshot, unordered.

    Raises
    ------
    ConfigError
        If the horizon of a snapshot is still open: a label that is not known must not pass for "did not churn".
    """
    import ibis

    for snapshot in snapshots:
        if not is_closed(snapshot, horizon_days=horizon_days, as_of=as_of):
            raise ConfigError(
                f"snapshot {snapshot:%Y-%m-%d}: its horizon of {count_noun(horizon_days, 'day')} is open at as_of "
                f"{as_of:%Y-%m-%d}; labels are known up to {as_of - dt.timedelta(days=horizon_days):%Y-%m-%d}"
            )
    tables = [_label_snapshot(daily, snapshot, spec, horizon_days) for snapshot in snapshots]
    return ibis.union(*tables) if len(tables) > 1 else tables[0]


def _label_snapshot(daily: ibis.Table, snapshot: dt.datetime, spec: WindowSpec, horizon_days: int) -> ibis.Table:
    import ibis

    day = snapshot.date()
    rows = daily.filter(
        daily.event_type == spec.label_event_type,
        daily.day >= day - dt.timedelta(days=spec.active_days),
        daily.day < day + dt.timedelta(days=horizon_days),
    )
    seen = rows.group_by("customer_id").aggregate(first_day=rows.day.min(), last_day=rows.day.max())
    seen = seen.filter(seen.first_day < day)
    stamp = ibis.literal(snapshot.replace(tzinfo=None)).cast("timestamp(6)")
    return seen.select(seen.customer_id, event_timestamp=stamp, churned=seen.last_day < day)
