"""Rows of the online store, as the service reads them, in frames."""

from __future__ import annotations

import datetime as dt
from typing import NamedTuple

import pandas as pd

from closedloop.adapters.feast import Features
from closedloop.adapters.online_format import OnlineRow
from closedloop.adapters.online_store import is_stale


class OnlineRows(NamedTuple):
    features: pd.DataFrame
    snapshot_at: pd.Series
    state: pd.Series


def read_online(features: Features, customers: list[str], *, as_of: dt.datetime) -> OnlineRows:
    """Rows in the order asked for, with their state at ``as_of``."""
    rows, names = features.read_online(customers), list(features.features.names)
    values = pd.DataFrame([row.values or [None] * len(names) for row in rows], columns=names)
    values = values.astype(dict.fromkeys(features.features.numeric, "float64"))

    def describe(row: OnlineRow) -> str:
        if row.snapshot_at is None:
            return "unknown"
        return "stale" if is_stale(row.snapshot_at, as_of, features.max_age_days) else "fresh"

    states = [describe(row) for row in rows]
    snapshots = pd.Series([row.snapshot_at for row in rows]).astype("datetime64[ns, UTC]")
    return OnlineRows(values, snapshots, pd.Series(states))
