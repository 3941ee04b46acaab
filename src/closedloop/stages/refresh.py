"""refresh: run ingest, validate and features as of a date, and write the rows to the online store; no training."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from closedloop.config.dataset import DatasetConfig
from closedloop.config.layout import Layout
from closedloop.config.params import Params
from closedloop.stages.features import compute_features
from closedloop.stages.ingest import ingest
from closedloop.stages.parts.online import check_freshness, find_newest_snapshot, materialize_newest
from closedloop.stages.validate import validate

if TYPE_CHECKING:
    from closedloop.adapters.engines import Engine
    from closedloop.adapters.feast import Features


def refresh(
    params: Params, dataset: DatasetConfig, features: Features, engine: Engine, *, work_dir: Path
) -> dict[str, Any]:
    """Write the features of ``params.as_of`` to the online store, if the data pass their gate and are fresh enough.

    The skew gate then compares the online rows with the file. If they differ, the store is at fault, and the rows stay
    there to be examined.

    Keep ``work_dir`` between calls, so that only new days are added to the daily aggregates.

    Raises
    ------
    GateFailed
        If the data gate, the freshness gate or the skew gate says no.
    """
    folder, newest = compute_newest(params, dataset, features, engine, work_dir=work_dir)
    features.publish(folder)
    return materialize_newest(features, folder, newest=newest, seed=params.seed)


def compute_newest(
    params: Params, dataset: DatasetConfig, features: Features, engine: Engine, *, work_dir: Path
) -> tuple[Path, dt.datetime]:
    """Compute the features of everybody who is active at ``params.as_of``; a table without days has all its rows.

    Returns
    -------
    folder, newest
        The folder of feature rows, one file a snapshot, and its newest snapshot.

    Raises
    ------
    GateFailed
        If the data gate or the freshness gate says no.
    """
    layout = locate_work(work_dir)
    ingest_tables(params, dataset, layout)
    compute_features(params, dataset, engine, layout, snapshots=None if dataset.kind == "table" else [params.as_of_at])
    newest = find_newest_snapshot(layout.features)
    check_freshness(features, newest=newest, events_dir=layout.raw / "events", as_of=params.as_of_at)
    return layout.features, newest


def locate_work(folder: Path) -> Layout:
    """The working tables of what computes as of a date outside of dvc.yaml's graph."""
    return Layout(
        raw=folder / "raw",
        ingest_metrics=folder / "ingest.json",
        data_docs=folder / "data_docs",
        data_quality_page=folder / "data_quality.html",
        data_quality=folder / "data_quality.json",
        daily=folder / "daily",
        features=folder / "features",
    )


def ingest_tables(params: Params, dataset: DatasetConfig, layout: Layout) -> None:
    """Write ``layout.raw`` as of ``params.as_of``, and run the data gate.

    Raises
    ------
    GateFailed
        If the gate says no.
    """
    ingest(params, dataset, layout)
    validate(params, dataset, layout)
