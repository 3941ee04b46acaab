"""training_set: labels, a point-in-time join through Feast, the split, and the newest rows to the online store."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from closedloop.adapters.feast import TIMESTAMP
from closedloop.adapters.tables import list_event_days, read_table, write_table
from closedloop.core.folds import assign_hash_split, split_snapshots
from closedloop.dataset import DatasetConfig
from closedloop.errors import ConfigError, DataError, GateFailed
from closedloop.files import replace_folder, write_json
from closedloop.params import Params

if TYPE_CHECKING:
    from closedloop.adapters.engine import Engine
    from closedloop.adapters.feast import Features

logger = logging.getLogger(__name__)
PARTS = ("train", "validation", "test")
CUSTOMER, LABEL, GROUP = "customer_id", "churned", "sensitive_group"
SKEW_SAMPLE = 1000


def build_training_set(
    params: Params,
    dataset: DatasetConfig,
    features: Features,
    engine: Engine,
    *,
    raw_dir: Path,
    rollup_dir: Path,
    features_dir: Path,
    training_dir: Path,
    metrics_path: Path,
) -> dict[str, Any]:
    """Write train, validation and test rows to ``training_dir``; publish and materialise the newest snapshot.

    Columns: customer_id, event_timestamp, churned (bool), sensitive_group (str, if the data set has one), features.

    Raises
    ------
    GateFailed
        If online rows differ from offline ones, or the newest features are older than allowed.
    DataError
        If a part holds no rows, or one class only.
    """
    newest = find_newest_snapshot(features_dir)
    age_days = check_freshness(features, newest=newest, events_dir=raw_dir / "events", as_of=params.as_of_at)
    labels = read_labels(params, dataset, engine, raw_dir=raw_dir, rollup_dir=rollup_dir)
    labels["part"] = assign_parts(params, dataset, labels)
    labels = labels.dropna(subset="part").sort_values([TIMESTAMP, CUSTOMER], ignore_index=True)
    _require_classes(labels)
    logger.info("joining %d rows with their features, point in time", len(labels))
    rows = features.read_historical(labels, features_dir)
    rows = _join_groups(rows, dataset, raw_dir)
    with replace_folder(training_dir) as folder:
        for part in PARTS:
            write_table(folder / f"{part}.parquet", rows[rows["part"] == part].drop(columns="part"))
    features.publish(features_dir)
    serving = materialize_newest(features, features_dir, newest=newest, as_of=params.as_of_at, seed=params.seed)
    parts = {part: _describe(rows[rows["part"] == part]) for part in PARTS}
    report = {"parts": parts, "serving": {"age_days": age_days, **serving}}
    write_json(metrics_path, report)
    return report


def read_labels(
    params: Params, dataset: DatasetConfig, engine: Engine, *, raw_dir: Path, rollup_dir: Path
) -> pd.DataFrame:
    """customer_id, event_timestamp and churned of every snapshot whose label is known."""
    if dataset.kind == "table":
        customers = read_table(raw_dir / "customers.parquet", made_by="closedloop ingest")
        if TIMESTAMP not in customers:
            customers[TIMESTAMP] = pd.Timestamp(params.as_of_at).as_unit("us")
        return customers[[CUSTOMER, TIMESTAMP, LABEL]]
    from closedloop.featureset import build_window_spec
    from closedloop.stages.features import build_labels, list_closed_snapshots

    assert dataset.label is not None
    snapshots = select_snapshots(params, list_closed_snapshots(params, dataset, raw_dir / "events"))
    return build_labels(
        rollup_dir,
        spec=build_window_spec(params, dataset),
        snapshots=snapshots,
        horizon_days=dataset.label.horizon_days,
        as_of=params.as_of_at,
        engine=engine,
    )


def select_snapshots(params: Params, snapshots: list[dt.datetime]) -> list[dt.datetime]:
    """Those within ``data.start_date`` and ``data.end_date``, both included.

    Raises
    ------
    ConfigError
        If none is.
    """
    first, last = params.data.start_date or dt.date.min, params.data.end_date or dt.date.max
    chosen = [time for time in snapshots if first <= time.date() <= last]
    if not chosen:
        raise ConfigError(
            f"data.start_date {first} to data.end_date {last}: no snapshot with a closed label lies there; "
            f"there are {len(snapshots)} from {snapshots[0]:%Y-%m-%d} to {snapshots[-1]:%Y-%m-%d}"
        )
    return chosen


def assign_parts(params: Params, dataset: DatasetConfig, labels: pd.DataFrame) -> pd.Series:
    """The part of each row: by time where there is one, else by a stable hash of the id; None: not used."""
    split = params.split
    if dataset.kind == "table" and dataset.columns.time is None:
        fractions = {"validation": split.validation_fraction, "test": split.test_fraction}
        parts = assign_hash_split(labels[CUSTOMER], fractions=fractions, salt=str(params.seed))
        return pd.Series(parts, index=labels.index)
    if dataset.label is None:
        return split_table_by_time(
            labels[TIMESTAMP], validation_fraction=split.validation_fraction, test_fraction=split.test_fraction
        )
    snapshots = [time.to_pydatetime() for time in labels[TIMESTAMP].drop_duplicates()]
    chosen = split_snapshots(
        snapshots,
        horizon_days=dataset.label.horizon_days,
        validation_snapshots=split.validation_snapshots,
        test_snapshots=split.test_snapshots,
        train_snapshots_max=split.train_snapshots_max,
    )
    part_of = {time: part for part in PARTS for time in getattr(chosen, part)}
    return labels[TIMESTAMP].map(part_of)


def split_table_by_time(times: pd.Series, *, validation_fraction: float, test_fraction: float) -> pd.Series:
    """The newest days with about ``test_fraction`` of the rows test, those before validate; a day is never divided."""
    rows_by_day = times.value_counts().sort_index()
    rows_after = len(times) - rows_by_day.cumsum()
    test_rows, validation_rows = round(test_fraction * len(times)), round(validation_fraction * len(times))
    part_of_day = pd.Series("train", index=rows_by_day.index)
    part_of_day[rows_after < test_rows + validation_rows] = "validation"
    part_of_day[rows_after < test_rows] = "test"
    return times.map(part_of_day)


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
            f"feature freshness: {found}, {age_days} days before as_of {as_of:%Y-%m-%d}; "
            f"at most {features.max_age_days} days are allowed (feature_max_age_days)"
        )
    return age_days


def materialize_newest(
    features: Features, features_dir: Path, *, newest: dt.datetime, as_of: dt.datetime, seed: int
) -> dict[str, Any]:
    """Bring the newest published snapshot online, and compare what the online store answers with the file, exactly.

    Raises
    ------
    GateFailed
        If a value differs.
    """
    logger.info("bringing the features of %s online", newest.date())
    report: dict[str, Any] = {"snapshot": f"{newest:%Y-%m-%d}"}
    if not features.materialize(newest):
        logger.warning("the online store already holds newer features than %s; it is left as it is", newest.date())
        return {**report, "materialized": False}
    rows = read_table(features_dir / f"{newest:%Y-%m-%d}.parquet", made_by="closedloop features")
    sample = rows.sample(min(SKEW_SAMPLE, len(rows)), random_state=seed)
    mismatches, first = compare_online(features, sample, as_of=as_of)
    if mismatches:
        raise GateFailed(f"skew gate: {mismatches} of {len(sample)} customers differ online (limit 0); first: {first}")
    return {**report, "materialized": True, "customers": len(rows), "compared": len(sample), "mismatches": 0}


def compare_online(features: Features, rows: pd.DataFrame, *, as_of: dt.datetime) -> tuple[int, str]:
    """How many of these offline rows the online store answers differently, and the first difference in words."""
    online = features.read_online(rows[CUSTOMER].tolist(), as_of=as_of)
    return count_differences(rows, online.features, features.features.names)


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


def _join_groups(rows: pd.DataFrame, dataset: DatasetConfig, raw_dir: Path) -> pd.DataFrame:
    if dataset.columns.sensitive is None:
        return rows
    customers = read_table(raw_dir / "customers.parquet", [CUSTOMER, dataset.columns.sensitive], made_by="ingest")
    groups = customers.drop_duplicates(CUSTOMER).set_index(CUSTOMER)[dataset.columns.sensitive]
    joined = rows.copy()
    joined.insert(3, GROUP, rows[CUSTOMER].map(groups).astype(object))
    return joined


def _require_classes(labels: pd.DataFrame) -> None:
    for part in PARTS:
        churned = labels.loc[labels["part"] == part, LABEL]
        if churned.nunique() < 2:
            found = "no rows" if churned.empty else f"{len(churned)} rows, all of one class"
            raise DataError(f"training set: the {part} part has {found}; both churned and stayed customers are needed")


def _describe(rows: pd.DataFrame) -> dict[str, Any]:
    snapshots = sorted({f"{time:%Y-%m-%d}" for time in rows[TIMESTAMP].drop_duplicates()})
    return {"rows": len(rows), "churn_rate": float(rows[LABEL].mean()), "snapshots": snapshots}
