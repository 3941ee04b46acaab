"""Snapshots of the data, and their labels, from the daily aggregates."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from closedloop.core.features.daily import DAILY_COLUMNS
from closedloop.core.features.labels import compute_labels, is_closed
from closedloop.core.features.windows import WindowSpec, list_snapshots
from closedloop.errors import DataError, count_noun
from closedloop.stages.parts.daily import list_daily
from closedloop.tabular.tables import build_schema, list_event_days

if TYPE_CHECKING:
    import pandas as pd

    from closedloop.adapters.engines import Engine
    from closedloop.config.dataset import DatasetConfig
    from closedloop.config.params import Params

ROW_KEY = {"customer_id": "string", "event_timestamp": "timestamp(6)"}
LABELS_SCHEMA = build_schema({**ROW_KEY, "churned": "bool"})


def list_feature_snapshots(params: Params, dataset: DatasetConfig, events_dir: Path) -> list[dt.datetime]:
    """Every snapshot up to ``as_of`` with ``warmup_days`` of history.

    Raises
    ------
    DataError
        If there are no events, or too few days of them.
    """
    assert dataset.label is not None
    days = list_event_days(events_dir)
    if not days:
        raise DataError(f"{events_dir}: holds no events; 'closedloop ingest' writes them")
    first = dt.datetime.combine(days[0], dt.time(), dt.UTC) + dt.timedelta(days=dataset.label.warmup_days)
    snapshots = list_snapshots(first, params.as_of_at, dataset.label.snapshot_every_days)
    if not snapshots:
        raise DataError(
            f"{events_dir}: events begin on {days[0]}, and before as_of {params.as_of} a snapshot needs "
            f"{count_noun(dataset.label.warmup_days, 'day')} of history (label.warmup_days): there is none"
        )
    return snapshots


def list_closed_snapshots(params: Params, dataset: DatasetConfig, events_dir: Path) -> list[dt.datetime]:
    """Those of `list_feature_snapshots` whose label is known at ``as_of``.

    Raises
    ------
    DataError
        If there is none.
    """
    assert dataset.label is not None
    horizon_days, as_of = dataset.label.horizon_days, params.as_of_at
    snapshots = list_feature_snapshots(params, dataset, events_dir)
    closed = [time for time in snapshots if is_closed(time, horizon_days=horizon_days, as_of=as_of)]
    if not closed:
        raise DataError(
            f"{events_dir}: no snapshot has a closed horizon of {count_noun(horizon_days, 'day')} at as_of "
            f"{params.as_of}; the first is {snapshots[0]:%Y-%m-%d}"
        )
    return closed


def build_labels(
    daily_dir: Path,
    *,
    spec: WindowSpec,
    snapshots: Sequence[dt.datetime],
    horizon_days: int,
    as_of: dt.datetime,
    engine: Engine,
) -> pd.DataFrame:
    """customer_id (str), event_timestamp (datetime64[us, UTC]), churned (bool), sorted by snapshot and customer.

    Raises
    ------
    ConfigError
        If the horizon of a snapshot is open at ``as_of``.
    DataError
        If there are no daily aggregates.
    """
    import ibis

    files = list_daily(daily_dir)
    if not files:
        raise DataError(f"{daily_dir}: holds no daily aggregates; 'closedloop features' writes them")
    daily = ibis.table(DAILY_COLUMNS, name="daily")
    labels = compute_labels(daily, snapshots, spec, horizon_days=horizon_days, as_of=as_of)
    with engine.open_session() as session:
        session.bind("daily", files, DAILY_COLUMNS)
        sql = engine.compile(labels.order_by("event_timestamp", "customer_id"))
        return session.read_frame(sql, LABELS_SCHEMA)
