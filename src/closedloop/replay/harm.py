"""The cost of changes and of a bad version in a replay, in customers and days."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

LIST_SHARE = 0.2  # of the customers of a snapshot: how long a list of calls is
NOTICED = ("alert", "retrain")


def count_found(pairs: pd.DataFrame, since: dt.date | None) -> dict[str, int]:
    """How many of those who left stood in the list of each arm: the fifth of each snapshot with the highest scores.

    Parameters
    ----------
    pairs : DataFrame
        As `closedloop.replay.results.pair_arms` returns them; snapshots before ``since`` do not count.
    """
    if since is not None:
        pairs = pairs[pairs["snapshot_at"] >= pd.Timestamp(since, tz="UTC")]
    found = {"customers": len(pairs), "leavers": int(pairs["outcome"].sum()), "closed": 0, "frozen": 0}
    for _, rows in pairs.groupby("snapshot_at"):
        size = round(LIST_SHARE * len(rows))
        for arm, column in (("closed", "score"), ("frozen", "score_frozen")):
            listed = rows.sort_values([column, "customer_id"], ascending=[False, True]).head(size)
            found[arm] += int(listed["outcome"].sum())
    return found


def measure_harm(
    pairs: pd.DataFrame,
    events: Sequence[Mapping[str, Any]],
    since: dt.date | None,
    *,
    served: Mapping[str, int],
    bad_version: str | None,
) -> dict[str, Any]:
    """The harm as JSON can hold it; days are None where the event did not come.

    Parameters
    ----------
    since
        The day on which what customers do changed; None: there is no such day on record.
    served
        How many customers each version answered.
    """
    harm: dict[str, Any] = {"list_share": LIST_SHARE, "since": str(since) if since else None}
    harm["found"] = count_found(pairs, since)
    if since is not None:
        harm["noticed_days"] = _count_days(events, NOTICED, since)
        harm["mended_days"] = _count_days(events, ("promoted",), since)
    offered = next((event["at"] for event in events if event["kind"] == "bad offered"), None)
    if bad_version is not None and offered is not None:
        days = _count_days(events, ("rolled back", "refused"), offered)
        harm["bad"] = {"version": bad_version, "customers": served.get(bad_version, 0), "days": days}
    return harm


def _count_days(events: Sequence[Mapping[str, Any]], kinds: Sequence[str], since: dt.date) -> int | None:
    return next(
        ((event["at"] - since).days for event in events if event["kind"] in kinds and event["at"] >= since), None
    )
