"""Outcomes: the data set's label rule on predictions whose horizon has closed."""

from __future__ import annotations

import datetime as dt
import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from closedloop.adapters.tables import list_event_days
from closedloop.dataset import DatasetConfig
from closedloop.errors import ConfigError
from closedloop.featureset import build_window_spec
from closedloop.params import Params
from closedloop.records import Outcome
from closedloop.stages.features import build_labels
from closedloop.stages.refresh import ingest_tables
from closedloop.stages.rollup import update_rollup

if TYPE_CHECKING:
    from closedloop.adapters.engine import Engine
    from closedloop.adapters.samples import Samples
    from closedloop.adapters.store import Store

logger = logging.getLogger(__name__)


class LabelReport(NamedTuple):
    """How many outcomes were stored, and predictions that the rule says nothing about.

    ``outside``: customers that were not active at the snapshot; ``irregular``: features not of a UTC midnight.
    """

    stored: int
    outside: int
    irregular: int
    snapshots: tuple[dt.date, ...]


def label_predictions(
    params: Params,
    dataset: DatasetConfig,
    engine: Engine,
    samples: Samples,
    store: Store,
    *,
    work_dir: Path,
    read: bool = True,
) -> LabelReport:
    """Store what really happened to the customers of predictions whose horizon has closed at ``params.as_of``.

    The tables are read as of that date and pass the data gate, since labels of missing events are all "churned".
    For the same reason a horizon counts as closed only where the events reach its end. Running it again stores
    nothing twice.

    Parameters
    ----------
    read
        False where a refresh of the same date has just filled ``work_dir``.

    Raises
    ------
    ConfigError
        If the data set has no label rule.
    GateFailed
        If the data gate says no.
    """
    if dataset.label is None:
        raise ConfigError(
            f"{dataset.name}: a 'table' data set has no label rule; report outcomes to the service (POST /outcomes)"
        )
    horizon = dt.timedelta(days=dataset.label.horizon_days)
    if not samples.list_unlabelled_snapshots(dataset.model_name, until=params.as_of_at - horizon):
        return LabelReport(0, 0, 0, ())
    if read:
        ingest_tables(params, dataset, work_dir=work_dir)
    update_rollup(work_dir / "raw/events", work_dir / "rollup", engine=engine)
    newest = list_event_days(work_dir / "raw/events")[-1]
    reached = dt.datetime.combine(newest + dt.timedelta(days=1), dt.time(), dt.UTC)
    closed_by = min(params.as_of_at, reached)
    stored = outside = irregular = 0
    regular = []
    for snapshot in samples.list_unlabelled_snapshots(dataset.model_name, until=closed_by - horizon):
        if snapshot.time() != dt.time():
            irregular += sum(map(len, samples.read_unlabelled(dataset.model_name, snapshot)))
            continue
        regular.append(snapshot.date())
        labels = build_labels(
            work_dir / "rollup",
            spec=build_window_spec(params, dataset),
            snapshots=[snapshot],
            horizon_days=dataset.label.horizon_days,
            as_of=closed_by,
            engine=engine,
        )
        churned = dict(zip(labels["customer_id"], labels["churned"], strict=True))
        for chunk in samples.read_unlabelled(dataset.model_name, snapshot):
            # the moment from which it can be known, whenever it is found out: two runs write the same record
            known = [Outcome(one, int(churned[who]), snapshot + horizon) for one, who in chunk if who in churned]
            stored += store.insert(known).outcomes
            outside += len(chunk) - len(known)
        logger.info("snapshot %s: %d outcomes stored so far", snapshot.date(), stored)
    return LabelReport(stored, outside, irregular, tuple(regular))
