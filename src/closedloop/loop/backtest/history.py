"""A data set's history as the offline loop replays it: rows by snapshot, computed once, and the ticks."""

from __future__ import annotations

import datetime as dt
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from closedloop.config.dataset import DatasetConfig
from closedloop.config.featureset import FeatureSet, build_window_spec, list_features
from closedloop.config.layout import Layout
from closedloop.config.params import Params
from closedloop.core.actions.untreated import find_untreated
from closedloop.core.features.labels import is_closed
from closedloop.errors import ConfigError, DataError, count_noun
from closedloop.stages.features import compute_features
from closedloop.stages.ingest import ingest
from closedloop.stages.parts.snapshots import build_labels, list_feature_snapshots
from closedloop.stages.refresh import locate_work
from closedloop.stages.training_set import LABEL, assign_parts
from closedloop.tabular.tables import read_table

if TYPE_CHECKING:
    from closedloop.adapters.engines import Engine

DAY = dt.timedelta(days=1)
TABLE_EVERY_DAYS = 30
FIRST_SHARE = 1 / 3  # of the history: what the first model knows, unless a date is given
JUDGED_MIN = 3
KEY = ["customer_id", "event_timestamp"]


@dataclass(frozen=True)
class History:
    """The rows of each snapshot, and the ticks on which the loop looks at them.

    Attributes
    ----------
    rows
        ``customer_id``, ``event_timestamp``, the features and ``churned`` by snapshot; of a table those of the
        ``every_days`` from it on. ``churned`` is missing where its horizon is open at the end.
    ticks
        The snapshots that are served, the oldest first; the first model is trained at the first.
    """

    params: Params
    dataset: DatasetConfig
    features: FeatureSet
    rows: Mapping[dt.datetime, pd.DataFrame]
    ticks: Sequence[dt.datetime]
    every_days: int

    @property
    def horizon(self) -> dt.timedelta:
        """From a snapshot until the outcomes of its rows are known; a table's come with the rows."""
        return (self.dataset.horizon_days or self.every_days) * DAY

    @property
    def requests_a_day(self) -> float:
        """Each customer of a snapshot asks once a day; each row of a table is one request."""
        return len(self.rows[self.ticks[0]]) / (1 if self.dataset.label else self.every_days)

    def list_closed(self, now: dt.datetime) -> list[dt.datetime]:
        """The snapshots whose outcomes are known at ``now``, the oldest first."""
        return sorted(at for at in self.rows if at + self.horizon <= now)


def read_history(
    params: Params,
    dataset: DatasetConfig,
    engine: Engine,
    *,
    work_dir: Path,
    every_days: int | None,
    actions: pd.DataFrame | None = None,
) -> History:
    """Ingest, compute features and labels of every snapshot up to ``as_of``; all snapshots with rows are ticks.

    Rows that ``actions`` touch count as in `closedloop.stages.training_set.build_training_set`.

    Raises
    ------
    ConfigError
        If the data set is a table without a time column.
    DataError
        If the source cannot be read, or there is no snapshot.
    """
    if dataset.kind == "table" and dataset.columns.time is None:
        raise ConfigError(
            f"{dataset.name}: a table without a time column has no history to replay; name it as columns.time"
        )
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        layout = locate_work(Path(folder))
        ingest(params, dataset, layout)
        if dataset.kind == "table":
            every = every_days or TABLE_EVERY_DAYS
            rows = cut_table(read_table(layout.raw / "customers.parquet", made_by="closedloop ingest"), params, every)
        else:
            if every_days is not None:
                dataset = space_snapshots(dataset, every_days)
            assert dataset.label is not None  # noqa: S101 - the config guarantees it
            every = dataset.label.snapshot_every_days
            snapshots = list_feature_snapshots(params, dataset, layout.raw / "events")
            compute_features(params, dataset, engine, layout, snapshots=snapshots)
            rows = read_snapshots(params, dataset, engine, layout, snapshots)
    if actions is not None:
        rows = {at: _keep_untreated(some, actions) for at, some in rows.items()}
    found = {at: some for at, some in sorted(rows.items()) if len(some)}
    return History(params, dataset, list_features(params, dataset), found, list(found), every)


def _keep_untreated(rows: pd.DataFrame, actions: pd.DataFrame) -> pd.DataFrame:
    untreated = find_untreated(rows, actions, time="event_timestamp", blind=False)
    return untreated.take(rows).drop(columns=["repeats", "is_repeat"]) if untreated.tell() else rows


def space_snapshots(dataset: DatasetConfig, every_days: int) -> DatasetConfig:
    """The data set with snapshots so many days apart."""
    assert dataset.label is not None  # noqa: S101 - the config guarantees it
    return dataset.model_copy(update={"label": dataset.label.model_copy(update={"snapshot_every_days": every_days})})


def read_snapshots(
    params: Params, dataset: DatasetConfig, engine: Engine, layout: Layout, snapshots: Sequence[dt.datetime]
) -> dict[dt.datetime, pd.DataFrame]:
    """The feature rows that ``layout.features`` holds, with labels where the horizon has closed by ``as_of``."""
    assert dataset.label is not None  # noqa: S101 - the config guarantees it
    horizon_days, as_of = dataset.label.horizon_days, params.as_of_at
    labels = build_labels(
        layout.daily,
        spec=build_window_spec(params, dataset),
        snapshots=[at for at in snapshots if is_closed(at, horizon_days=horizon_days, as_of=as_of)],
        horizon_days=horizon_days,
        as_of=as_of,
        engine=engine,
    )
    rows = {
        at: read_table(layout.features / f"{at:%Y-%m-%d}.parquet", made_by="closedloop features") for at in snapshots
    }
    return {at: some.merge(labels, on=KEY, how="left") for at, some in rows.items()}


def cut_table(rows: pd.DataFrame, params: Params, every_days: int) -> dict[dt.datetime, pd.DataFrame]:
    """A table's rows by the start of the ``every_days`` that they lie in, counted back from ``as_of``."""
    ages_days = (pd.Timestamp(params.as_of_at) - rows["event_timestamp"]).dt.total_seconds() / 86_400
    parts = rows.groupby(np.ceil(ages_days / every_days).astype(int))  # a row at the very start belongs to the stretch
    return {params.as_of_at - back * every_days * DAY: some.reset_index(drop=True) for back, some in parts}


def choose_ticks(history: History, first: dt.date | None) -> History:
    """The history with the ticks from ``first`` on (default: when a third of it has passed).

    Raises
    ------
    DataError
        If no first model can be trained by then, or too few snapshots close after it.
    """
    known, end = list(history.ticks), history.params.as_of_at
    begin = dt.datetime.combine(first, dt.time(), dt.UTC) if first else known[0] + (end - known[0]) * FIRST_SHARE
    ticks = [at for at in known if begin <= at <= end]
    while ticks and not _can_train(history, ticks[0]):
        if first is not None:
            raise DataError(
                f"--from {first}: too few snapshots have closed by then to train a model; give a later date"
            )
        ticks = ticks[1:]
    closed = [at for at in ticks if at + history.horizon <= end]
    if len(closed) < JUDGED_MIN:
        rule = history.dataset.label
        horizon = f", a horizon of {count_noun(rule.horizon_days, 'day')}" if rule else ""
        raise DataError(
            f"{history.dataset.name}: the history is too short to compare policies: "
            f"{count_noun(len(known), 'snapshot')} from {known[0]:%Y-%m-%d} to {known[-1]:%Y-%m-%d}{horizon}, of which "
            f"{len(closed)} can be judged after a first model, at least {JUDGED_MIN} are needed; take a longer "
            f"history, snapshots that are closer together (--every) or a shorter horizon (--horizon-days)"
        )
    return replace(history, ticks=ticks)


def _can_train(history: History, at: dt.datetime) -> bool:
    """Whether a split at this moment has both classes in each part."""
    closed = history.list_closed(at)
    if not closed:
        return False
    rows = pd.concat([history.rows[one][[*KEY, LABEL]] for one in closed], ignore_index=True)
    try:
        part = assign_parts(history.params, history.dataset, rows)
    except ConfigError:
        return False
    classes = rows.groupby(part.to_numpy())[LABEL].nunique()
    return len(classes) == 3 and bool((classes == 2).all())
