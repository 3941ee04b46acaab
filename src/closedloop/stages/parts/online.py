"""The newest features online: how old they may be, and that the online store answers what the file holds."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from closedloop.errors import DataError, GateFailed, count_noun
from closedloop.tabular.tables import list_event_days, read_table

if TYPE_CHECKING:
    from closedloop.adapters.feast import Features

logger = logging.getLogger(__name__)
CUSTOMER = "customer_id"
SKEW_SAMPLE = 1000


def find_newest_snapshot(features_dir: Path) -> dt.datetime:
    """The newest snapshot that feature rows were written for.

    Raises
    ------
    DataError
        If there are none.
    """
    days = list_event_days(features_dir)
    if not days:
        raise DataError(f"{features_dir}: there are no feature rows; 'closedloop features' writes them")
    return dt.datetime.combine(days[-1], dt.time(), dt.UTC)


def check_freshness(features: Features, *, newest: dt.datetime, events_dir: Path, as_of: dt.datetime) -> int:
    """Age in days at ``as_of`` of what the newest features know.

    That is the snapshot's age, or that of the end of the newest day with events: a snapshot can be taken on any day,
    whether or not events still arrive. A table has no ``events_dir``.

    Raises
    ------
    GateFailed
        If it is older than the data set allows.
    """
    known_until, found = newest, f"the newest snapshot is {newest:%Y-%m-%d}"
    event_days = list_event_days(events_dir)
    if event_days:
        ended = dt.datetime.combine(event_days[-1], dt.time(), dt.UTC) + dt.timedelta(days=1)
        if ended < newest:
            known_until, found = ended, f"the newest events are of {event_days[-1]}"
    age_days = (as_of - known_until).days
    if age_days > features.max_age_days:
        raise GateFailed(
            f"feature freshness: {found}, {count_noun(age_days, 'day')} before as_of {as_of:%Y-%m-%d}; "
            f"at most {count_noun(features.max_age_days, 'day')} are allowed (feature_max_age_days)"
        )
    return age_days


def materialize_newest(features: Features, features_dir: Path, *, newest: dt.datetime, seed: int) -> dict[str, Any]:
    """Bring the newest published snapshot online, and compare what the online store answers with the file, exactly.

    Raises
    ------
    GateFailed
        If a value differs.
    """
    report: dict[str, Any] = {"snapshot": f"{newest:%Y-%m-%d}"}
    if not features.is_online:
        logger.warning(
            "Feast is not installed (extra 'features'): nothing goes online, predictions need their features"
        )
        return {**report, "materialized": False, "reason": "there is no feature store"}
    logger.info("bringing the features of %s online", newest.date())
    if not features.materialize(newest):
        logger.warning("the online store already holds newer features than %s; it is left as it is", newest.date())
        return {**report, "materialized": False, "reason": "older than the store"}
    rows = read_table(features_dir / f"{newest:%Y-%m-%d}.parquet", made_by="closedloop features")
    sample = rows.sample(min(SKEW_SAMPLE, len(rows)), random_state=seed)
    mismatches, first = compare_online(features, sample)
    if mismatches:
        raise GateFailed(
            f"skew gate: {mismatches} of {count_noun(len(sample), 'customer')} differ online (limit 0); first: {first}"
        )
    return {**report, "materialized": True, "customers": len(rows), "compared": len(sample), "mismatches": 0}


def compare_online(features: Features, rows: pd.DataFrame) -> tuple[int, str]:
    """How many of these offline rows the service would read differently, and the first difference in words."""
    names = list(features.features.names)
    found = [row.values or [None] * len(names) for row in features.read_online(rows[CUSTOMER].tolist())]
    return count_differences(rows, pd.DataFrame(found, columns=names, dtype=object), names)


def count_differences(offline: pd.DataFrame, online: pd.DataFrame, names: Sequence[str]) -> tuple[int, str]:
    """How many rows of two frames in the same order differ in any value, and the first difference in words.

    ``offline`` names the customers; a value that is missing in both is equal.
    """
    wrong, first = np.zeros(len(offline), dtype=bool), ""
    for name in names:
        offline_values, online_values = offline[name].to_numpy(), online[name].to_numpy()
        both_missing = pd.isna(offline_values) & pd.isna(online_values)
        differs = ~both_missing & (offline_values != online_values)
        if differs.any() and not first:
            place = int(np.flatnonzero(differs)[0])
            first = (
                f"customer {offline[CUSTOMER].iloc[place]}, column {name}: "
                f"offline {offline_values[place]}, online {online_values[place]}"
            )
        wrong |= differs
    return int(wrong.sum()), first
