"""Worlds for the monitor: a data set's rows by snapshot, a model of the early ones, and what the monitor says then."""

from __future__ import annotations

import datetime as dt
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

DAY = dt.timedelta(days=1)


class World(NamedTuple):
    """A data set, and the rows of each snapshot: features, ``customer_id``, and ``churned`` where it is known."""

    params: Any
    dataset: Any
    rows: dict[dt.datetime, pd.DataFrame]
    truth: list[dict[str, Any]]


class Step(NamedTuple):
    """One check: its evidence and verdict, and the scored rows that it looked at."""

    at: dt.datetime
    evidence: dict[str, Any]
    decision: Any
    window: pd.DataFrame


def list_every(first: dt.datetime, last: dt.datetime, days: int) -> list[dt.datetime]:
    return [first + days * DAY * k for k in range((last - first).days // days + 1)]


def make_world(name: str, overrides: dict[str, Any], snapshots: Sequence[dt.datetime], *, root: Path = Path()) -> World:
    """Ingest and compute features as the workflow does, in a temporary folder."""
    import json

    from closedloop.adapters.duckdb import DuckEngine
    from closedloop.config.dataset import load_dataset
    from closedloop.config.featureset import build_window_spec
    from closedloop.config.layout import Layout
    from closedloop.config.params import merge_values, parse_params
    from closedloop.config.yaml import read_yaml
    from closedloop.loop.backtest.history import read_snapshots
    from closedloop.stages.features import write_window_features
    from closedloop.stages.ingest import ingest

    dataset = load_dataset(name, root / "configs/datasets")
    values = merge_values(read_yaml(root / "params.yaml"), dataset.params, {"dataset": name}, overrides)
    params = parse_params(values, "benchmark")
    spec, columns = build_window_spec(params, dataset), dataset.columns
    with tempfile.TemporaryDirectory() as made, DuckEngine(memory_limit="2GB", threads=1) as engine:
        raw, daily, features = (Path(made) / part for part in ("raw", "daily", "features"))
        layout = Layout(raw=raw, ingest_metrics=Path(made) / "ingest.json", daily=daily, features=features)
        ingest(params, dataset, layout)
        truth = raw / "truth.json"
        kinds = dict.fromkeys(columns.numeric, "numeric") | dict.fromkeys(columns.categorical, "categorical")
        write_window_features(
            layout, engine, spec=spec, snapshots=snapshots, attributes=kinds, since_column=columns.since
        )
        rows = read_snapshots(params, dataset, engine, layout, snapshots)
        return World(params, dataset, rows, json.loads(truth.read_text())["regime_changes"] if truth.exists() else [])


def train_model(world: World, parts: dict[str, pd.DataFrame]) -> tuple[Any, Any]:
    """Fit as the workflow does; returns what it fitted, and the monitor's baseline of the test rows."""
    from closedloop.config.featureset import list_features
    from closedloop.core.monitoring.evidence import build_baseline
    from closedloop.core.training.estimators import score
    from closedloop.stages.parts.fitting import fit

    given = {part: rows.astype({"churned": bool}) for part, rows in parts.items()}
    fitted = fit(world.params, list_features(world.params, world.dataset), dict(world.params.model.params), given)
    categories = {one.name: getattr(one, "categories", None) for one in fitted.features}
    reference = given["test"].assign(score=score(fitted.pipeline, given["test"]))
    return fitted, build_baseline(reference, categories, fitted.threshold)


def split_rows(world: World, as_of: dt.datetime) -> dict[str, pd.DataFrame]:
    """Train, validation and test rows of a training at this moment."""
    from closedloop.core.training.splits import split_snapshots

    horizon_days, split = world.dataset.label.horizon_days, world.params.split
    closed = [at for at in world.rows if at + horizon_days * DAY <= as_of]
    chosen = split_snapshots(
        closed,
        horizon_days=horizon_days,
        validation_snapshots=split.validation_snapshots,
        test_snapshots=split.test_snapshots,
        train_snapshots_max=split.train_snapshots_max,
    )
    parts = ("train", "validation", "test")
    return {part: pd.concat([world.rows[at] for at in getattr(chosen, part)], ignore_index=True) for part in parts}


def replay(
    world: World, fitted: Any, baseline: Any, checks: Sequence[dt.datetime], *, model_as_of: dt.datetime
) -> list[Step]:
    """What the monitor says of each snapshot's rows, with the outcomes that closed at the same moment.

    No retraining is ever recorded, so that nothing holds a verdict back.
    """
    from closedloop.core.monitoring.evidence import measure_outcomes, measure_window
    from closedloop.core.monitoring.policy import MonitoringPolicy
    from closedloop.core.monitoring.verdict import PastCheck, decide
    from closedloop.core.training.estimators import score

    policy, steps, past = MonitoringPolicy(), [], []
    scored = {at: rows.assign(score=score(fitted.pipeline, rows)) for at, rows in world.rows.items() if at >= checks[0]}
    since = checks[0] - (checks[1] - checks[0])
    for at in checks:
        evidence = measure_window(baseline, scored[at], policy)
        closed = at - world.dataset.label.horizon_days * DAY
        if closed in scored:
            known = scored[closed].rename(columns={"churned": "outcome"}).astype({"outcome": float})
            evidence |= measure_outcomes(baseline, known, policy) | {"outcomes_until": closed.isoformat()}
        decision = decide(evidence, past, [], policy, as_of=at, since=since, model_as_of=model_as_of)
        past = [PastCheck(since, evidence), *past]
        steps.append(Step(at, evidence, decision, scored[at]))
        since = at
    return steps
