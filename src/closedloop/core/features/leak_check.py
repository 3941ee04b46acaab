"""The feature cutoff checked from outside: recompute features from raw events before the snapshot, and compare.

The feature engine's own code must not be used here: a mistake in it would then vouch for itself.

Events have the columns ``customer_id`` str, ``event_type`` str, ``time`` timestamp[us, UTC], ``amount`` float (nan
where the type has none). Entity rows have ``customer_id`` and ``event_timestamp``, the snapshot, a UTC midnight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from closedloop.errors import count_noun

AMOUNT_AGGREGATIONS = ("sum", "mean", "min", "max", "last")
ZERO_IF_EMPTY = ("count", "days", "sum")
# A leak of one day shows only on rows with an event that soon after the snapshot; two, so that one of two shows too.
SUSPECT_DAYS = 2


def recompute_features(
    events: pd.DataFrame,
    entity_rows: pd.DataFrame,
    *,
    windows: Sequence[int],
    aggregations: Sequence[str],
    event_types: Sequence[str],
    amount_types: Sequence[str],
    recency_cap_days: int,
) -> pd.DataFrame:
    """Window features of each entity row, from events strictly before its snapshot.

    Parameters
    ----------
    events, entity_rows : DataFrame
        See the module's docstring; other columns are ignored.
    windows : sequence of int
        Lengths w in days; a window is [snapshot - w days, snapshot).
    aggregations : sequence of str
        Of ``count``, ``days`` (distinct UTC days with an event), ``sum``, ``mean``, ``min``, ``max``, ``last``.
    event_types, amount_types : sequence of str
        Types to aggregate, and those of them whose amount is aggregated too.
    recency_cap_days : int
        Largest recency, and that of a customer without an event.

    Returns
    -------
    DataFrame
        ``customer_id``, ``event_timestamp``, then float64 ``{type}_{aggregation}_{w}d`` and
        ``{type}_recency_days`` (whole days from the UTC day of the last event to the snapshot's). One row an entity
        row, in its order and with its index. Without events count, days and sum are 0, the others nan.
    """
    keys = _read_keys(entity_rows)
    pairs = _pair_events(events, keys, event_types)
    features: dict[str, pd.Series] = {}
    for event_type in event_types:
        past = pairs[pairs["event_type"] == event_type]
        for days in windows:
            inside = past[past["time"] >= past["event_timestamp"] - pd.Timedelta(days=days)]
            for name in aggregations:
                if name in AMOUNT_AGGREGATIONS and event_type not in amount_types:
                    continue
                column = _aggregate(inside, name).reindex(keys.index)
                features[f"{event_type}_{name}_{days}d"] = column.fillna(0.0) if name in ZERO_IF_EMPTY else column
        last_day = past.groupby("row")["time"].max().dt.floor("D").reindex(keys.index)
        recency = (keys["event_timestamp"] - last_day).dt.days
        features[f"{event_type}_recency_days"] = recency.fillna(recency_cap_days).clip(upper=recency_cap_days)
    table = pd.DataFrame(features, index=keys.index, dtype=np.float64)
    return pd.concat([keys, table], axis=1).set_axis(entity_rows.index)


def count_mismatches(given: pd.DataFrame, recomputed: pd.DataFrame, tolerance: float = 1e-9) -> tuple[int, str]:
    """Compare training features with recomputed ones.

    Parameters
    ----------
    given : DataFrame
        The training set: at least the columns of ``recomputed``, in any order of rows, and any more rows.
    recomputed : DataFrame
        From `recompute_features`.
    tolerance : float
        Largest difference, relative to the recomputed value, plus the same in absolute terms, since sums that cancel
        are not exactly 0. Missing equals missing.

    Returns
    -------
    (int, str)
        Rows with any difference (a row missing from ``given`` or standing there twice is one), and a sentence on
        the first of them, empty if there is none.
    """
    names = [name for name in recomputed.columns if name not in ("customer_id", "event_timestamp")]
    keys = pd.MultiIndex.from_frame(_read_keys(recomputed))
    rows = given[names].astype(np.float64).set_axis(pd.MultiIndex.from_frame(_read_keys(given)))
    rows = rows[rows.index.isin(keys)]
    doubtful = ~keys.isin(rows.index) | keys.isin(rows.index[rows.index.duplicated()])
    found = rows[~rows.index.duplicated()].reindex(keys).to_numpy()
    expected = recomputed[names].to_numpy(dtype=np.float64)
    differs = ~np.isclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    wrong = np.flatnonzero(differs.any(axis=1) | doubtful)
    if not len(wrong):
        return 0, ""
    row = int(wrong[0])
    customer, snapshot = keys[row]
    place = f"customer {customer}, snapshot {snapshot:%Y-%m-%d}"
    if doubtful[row]:
        copies = int((rows.index == keys[row]).sum())
        return len(wrong), f"{place}: found {count_noun(copies, 'training row')}, expected 1"
    column = int(np.flatnonzero(differs[row])[0])
    figures = f"found {found[row, column]:.10g}, expected {expected[row, column]:.10g}"
    return len(wrong), f"{place}, {names[column]}: {figures} from the events before the snapshot"


def choose_suspects(events: pd.DataFrame, entity_rows: pd.DataFrame, *, sample: int, seed: int) -> pd.DataFrame:
    """Pick ``sample`` entity rows for the check: first those that a leak would show on, then any.

    Suspects have an event within two days at or after their snapshot. They are drawn in turn from each event type,
    since a leak in a rare type shows only on the few rows that have one.

    Returns
    -------
    DataFrame
        Rows of ``entity_rows``, in their order; all of them if there are no more than ``sample``.
    """
    keys = _read_keys(entity_rows).assign(row=lambda frame: frame.index).sort_values("event_timestamp")
    times = _read_events(events, set(keys["customer_id"]))
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(keys)) + len(keys)
    for event_type in sorted(times["event_type"].unique()):
        following = pd.merge_asof(
            keys,
            times.loc[times["event_type"] == event_type, ["customer_id", "time"]].sort_values("time"),
            left_on="event_timestamp",
            right_on="time",
            by="customer_id",
            direction="forward",
        )
        soon = following["time"] - following["event_timestamp"] < pd.Timedelta(days=SUSPECT_DAYS)
        suspects = generator.permutation(np.sort(following.loc[soon, "row"].to_numpy()))
        order[suspects] = np.minimum(order[suspects], np.arange(len(suspects)))
    chosen = np.argsort(order, kind="stable")[:sample]
    return entity_rows.iloc[np.sort(chosen)]


def _read_keys(rows: pd.DataFrame) -> pd.DataFrame:
    snapshots = rows["event_timestamp"].dt.as_unit("us")
    keys = pd.DataFrame({"customer_id": rows["customer_id"].astype(str), "event_timestamp": snapshots})
    return keys.reset_index(drop=True)


def _read_events(events: pd.DataFrame, customers: set[str]) -> pd.DataFrame:
    owners = events["customer_id"].astype(str)
    kept = owners.isin(customers)
    return pd.DataFrame(
        {
            "customer_id": owners[kept],
            "event_type": events.loc[kept, "event_type"].astype(str),
            "time": events.loc[kept, "time"].dt.tz_convert("UTC").dt.as_unit("us"),
            "amount": events.loc[kept, "amount"].astype(np.float64),
        }
    )


def _pair_events(events: pd.DataFrame, keys: pd.DataFrame, event_types: Sequence[str]) -> pd.DataFrame:
    known = _read_events(events, set(keys["customer_id"]))
    known = known[known["event_type"].isin(list(event_types))].sort_values("time", kind="stable")
    pairs = keys.assign(row=keys.index).merge(known, on="customer_id", how="inner")
    pairs = pairs[pairs["time"] < pairs["event_timestamp"]]
    return pairs.sort_values(["row", "time"], kind="stable")


def _aggregate(inside: pd.DataFrame, name: str) -> pd.Series:
    if name == "count":
        return pd.Series(inside.groupby("row").size())
    if name == "days":
        return pd.Series(inside["time"].dt.floor("D").groupby(inside["row"]).nunique())
    return pd.Series(inside.groupby("row")["amount"].agg(name))
