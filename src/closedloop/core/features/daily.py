"""Events rolled up into daily partial aggregates: what every window is computed from.

Amounts are summed exactly, so that a sum is the same whatever the order of rows, threads or engine: the whole part as
a float64 that holds an integer, the fraction as an integer count of 2^-40. The largest error is half such a step
(4.5e-13) for each event. Exact up to 9e15 in whole units and 8 million events in one sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ibis

FRACTION_STEPS = 2.0**40

# Columns and their Ibis types. Times are UTC; the zone is dropped so that no engine consults calendars for each row.
EVENTS_COLUMNS = {
    "customer_id": "string",
    "event_type": "string",
    "time": "timestamp(6)",
    "amount": "float64",
}
# Types one after the other: a reader that wants one type skips the row groups of the others.
DAILY_KEYS = ("event_type", "day", "customer_id")
DAILY_COLUMNS = {
    "event_type": "string",
    "day": "date",
    "customer_id": "string",
    "event_count": "int64",
    "amount_count": "int64",
    "amount_whole": "float64",
    "amount_fraction": "int64",
    "amount_min": "float64",
    "amount_max": "float64",
    "amount_last": "float64",
}


def aggregate_daily(
    events: ibis.Table, event_types: Sequence[str] | None = None, *, has_amounts: bool = True
) -> ibis.Table:
    """Daily partial aggregates of an event log.

    Parameters
    ----------
    events : ibis.Table
        Columns of ``EVENTS_COLUMNS``; ``time`` is UTC, ``amount`` finite or null.
    event_types : sequence of str, optional
        Only these. Rows then follow their order rather than the alphabet, and DuckDB sorts them in half the time: it
        is fast as long as numbers and the beginning of an id decide.
    has_amounts : bool
        False if the amounts of these events are null: what is known of them is then not computed.

    Returns
    -------
    ibis.Table
        One row an (event_type, day, customer_id) with events, in that order, columns of ``DAILY_COLUMNS``.
        ``amount_last`` is the amount at the latest time of the day, the largest one if several share that time.
        Amount columns are null where no event of the group has an amount.
    """
    import ibis

    amount: Any = ibis._.amount
    whole = amount.floor().cast("float64")
    fraction = ((amount - whole) * FRACTION_STEPS).round(0).cast("int64")
    # a pair compares by time first: equal times are told apart by the amount
    latest = ibis.struct({"time": ibis._.time, "amount": amount})
    amounts = {
        "amount_count": amount.count(),
        "amount_whole": whole.sum(),
        "amount_fraction": fraction.sum(),
        "amount_min": amount.min(),
        "amount_max": amount.max(),
        "amount_last": amount.argmax(latest, where=amount.notnull()),
    }
    first_key: Any = ibis._.event_type
    if event_types:
        events = events.filter(events.event_type.isin(event_types))
        first_key = first_key.cases(*((name, code) for code, name in enumerate(event_types)))
    grouped = events.mutate(day=events.time.date()).group_by(*DAILY_KEYS)
    rolled = grouped.aggregate(event_count=ibis._.count(), **(amounts if has_amounts else {}))
    if not has_amounts:
        rolled = rolled.mutate(**{name: 0 if name == "amount_count" else ibis.null() for name in amounts})
    return rolled.order_by(first_key, *DAILY_KEYS[1:]).cast(DAILY_COLUMNS)
