"""The training set's join as an Ibis expression: what was known of a customer at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ibis

ROW = "__row"
KEYS = {"customer_id": "string", "event_timestamp": "timestamp(6)"}
ASKED_COLUMNS = {**KEYS, ROW: "int64"}


def join_as_of(asked: ibis.Table, rows: ibis.Table, *, max_age_days: int) -> ibis.Table:
    """The newest row of each customer that is not after the asked time, and at most ``max_age_days`` older.

    Parameters
    ----------
    asked : ibis.Table
        Columns of ``ASKED_COLUMNS``; each has another number ``ROW``.
    rows : ibis.Table
        Columns of ``KEYS``, and features.

    Returns
    -------
    ibis.Table
        ``ROW`` and the features, null where nothing is known; a ``ROW`` stands there twice if a customer has two rows
        of the newest time.
    """
    import ibis

    features = [name for name in rows.columns if name not in KEYS]
    names = {f"feature_{place}": name for place, name in enumerate(features)}
    known = rows.select(known="customer_id", known_at="event_timestamp", **names)
    is_known = known.known_at <= asked.event_timestamp
    is_fresh = known.known_at >= asked.event_timestamp - ibis.interval(days=max_age_days)
    joined = asked.left_join(known, [asked.customer_id == known.known, is_known, is_fresh])
    age_rank = ibis.rank().over(ibis.window(group_by=joined[ROW], order_by=joined.known_at.desc()))
    newest = joined.mutate(age_rank=age_rank)
    newest = newest.filter(newest.age_rank == 0)
    return newest.select(newest[ROW], **{name: newest[place] for place, name in names.items()})
