"""Outcomes: the data set's label rule on predictions whose horizon has closed."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from closedloop.config.dataset import DatasetConfig, LabelRule
from closedloop.config.featureset import build_window_spec
from closedloop.config.layout import Layout
from closedloop.config.params import Params
from closedloop.errors import ConfigError
from closedloop.records import LABEL_RULE, Outcome
from closedloop.stages.parts.daily import update_daily
from closedloop.stages.parts.snapshots import build_labels
from closedloop.stages.refresh import ingest_tables, locate_work
from closedloop.tabular.tables import list_event_days

if TYPE_CHECKING:
    from closedloop.adapters.engines import Engine
    from closedloop.store.predictions import Predictions
    from closedloop.store.samples import Samples

logger = logging.getLogger(__name__)


class LabelReport(NamedTuple):
    """Counts of stored outcomes, and of predictions that the label rule cannot judge.

    ``outside``: the customer was not active at the snapshot; ``irregular``: the features are not of a UTC midnight.
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
    store: Predictions,
    *,
    work_dir: Path,
    read: bool = True,
) -> LabelReport:
    """Store the outcomes of predictions whose horizon has closed at ``params.as_of``.

    The tables are read as of that date and must pass the data gate: customers whose events are missing would all be
    labelled "churned". For the same reason a horizon counts as closed only if the events reach its end. A second run
    stores nothing twice.

    Parameters
    ----------
    read
        False if a refresh of the same date has just filled ``work_dir``.

    Raises
    ------
    ConfigError
        If the data set has no label rule.
    GateFailed
        If the data gate says no.
    """
    rule = _require_label_rule(dataset)
    layout, horizon = locate_work(work_dir), dt.timedelta(days=rule.horizon_days)
    if not samples.list_unlabelled_snapshots(dataset.model_name, until=params.as_of_at - horizon):
        return LabelReport(0, 0, 0, ())
    if read:
        ingest_tables(params, dataset, layout)
    update_daily(layout.raw / "events", layout.daily, engine=engine)
    closed_by = min(params.as_of_at, _find_end(layout))
    report = LabelReport(0, 0, 0, ())
    for snapshot in samples.list_unlabelled_snapshots(dataset.model_name, until=closed_by - horizon):
        chunks = samples.read_unlabelled(dataset.model_name, snapshot)
        if snapshot.time() != dt.time():
            report = report._replace(irregular=report.irregular + sum(map(len, chunks)))
            continue
        labels = build_labels(
            layout.daily,
            spec=build_window_spec(params, dataset),
            snapshots=[snapshot],
            horizon_days=rule.horizon_days,
            as_of=closed_by,
            engine=engine,
        )
        churned = dict(zip(labels["customer_id"], labels["churned"], strict=True))
        # the end of the horizon, not the time of this run, so that two runs write the same record
        stored, outside = _store_outcomes(store, chunks, churned, snapshot + horizon)
        days = (*report.snapshots, snapshot.date())
        report = LabelReport(report.stored + stored, report.outside + outside, report.irregular, days)
        logger.info("snapshot %s, outcomes stored so far: %d", snapshot.date(), report.stored)
    return report


def _require_label_rule(dataset: DatasetConfig) -> LabelRule:
    if dataset.label is None:
        remedy = "give a file of outcomes (--input), or report them to the service (POST /outcomes)"
        raise ConfigError(f"{dataset.name}: a 'table' data set has no label rule; {remedy}")
    return dataset.label


def _find_end(layout: Layout) -> dt.datetime:
    """The end of the newest day with events."""
    newest = list_event_days(layout.raw / "events")[-1]
    return dt.datetime.combine(newest + dt.timedelta(days=1), dt.time(), dt.UTC)


def _store_outcomes(
    store: Predictions, chunks: Iterable[list[tuple[str, str]]], churned: Mapping[str, bool], known_at: dt.datetime
) -> tuple[int, int]:
    """Store the outcomes of (prediction id, customer id); return how many, and for how many no outcome is known."""
    stored = outside = 0
    for chunk in chunks:
        known = [Outcome(one, int(churned[who]), known_at, LABEL_RULE) for one, who in chunk if who in churned]
        stored += store.insert(known).outcomes
        outside += len(chunk) - len(known)
    return stored, outside
