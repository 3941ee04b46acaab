"""refresh: ingest, validate and features as of a date, then online - without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from closedloop.dataset import DatasetConfig
from closedloop.params import Params
from closedloop.stages.feature_rows import compute_features
from closedloop.stages.ingest import ingest
from closedloop.stages.training_set import check_freshness, find_newest_snapshot, materialize_newest
from closedloop.stages.validate import validate

if TYPE_CHECKING:
    from closedloop.adapters.engine import Engine
    from closedloop.adapters.feast import Features


def refresh(
    params: Params, dataset: DatasetConfig, features: Features, engine: Engine, *, work_dir: Path
) -> dict[str, Any]:
    """Bring the features of ``params.as_of`` online; data that fail their gate, or are too old, are not.

    The skew gate compares what is online by then with the file: a difference is the store's, and stays to be looked at.

    ``work_dir`` is kept between calls, so that the roll-up grows by the new days only.

    Raises
    ------
    GateFailed
        If the data gate, the freshness gate or the skew gate says no.
    """
    raw_dir, features_dir = work_dir / "raw", work_dir / "features"
    ingest_tables(params, dataset, work_dir=work_dir)
    compute_features(
        params,
        dataset,
        engine,
        raw_dir=raw_dir,
        rollup_dir=work_dir / "rollup",
        features_dir=features_dir,
        snapshots=None if dataset.kind == "table" else [params.as_of_at],
    )
    newest = find_newest_snapshot(features_dir)
    check_freshness(features, newest=newest, events_dir=raw_dir / "events", as_of=params.as_of_at)
    features.publish(features_dir)
    return materialize_newest(features, features_dir, newest=newest, as_of=params.as_of_at, seed=params.seed)


def ingest_tables(params: Params, dataset: DatasetConfig, *, work_dir: Path) -> None:
    """Write ``work_dir/raw`` as of ``params.as_of``, through the data gate.

    Raises
    ------
    GateFailed
        If the gate says no.
    """
    raw_dir = work_dir / "raw"
    ingest(params, dataset, raw_dir=raw_dir, metrics_path=work_dir / "ingest.json")
    validate(
        params,
        dataset,
        raw_dir=raw_dir,
        docs_dir=work_dir / "data_docs",
        page_path=work_dir / "data_quality.html",
        metrics_path=work_dir / "data_quality.json",
    )
