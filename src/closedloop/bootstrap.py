"""The one place that builds adapters from settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from closedloop.dataset import DatasetConfig, load_dataset, read_yaml
from closedloop.params import Params, merge_values, parse_params
from closedloop.settings import Settings, load_settings

if TYPE_CHECKING:
    from closedloop.adapters.engine import Engine
    from closedloop.adapters.feast import Features
    from closedloop.adapters.mlflow import Tracking


@dataclass(frozen=True)
class RunContext:
    """What a stage works on."""

    params: Params
    dataset: DatasetConfig
    settings: Settings


def load_run(params_path: Path, *, root: Path = Path(), overrides: Mapping[str, Any] | None = None) -> RunContext:
    """Read params, the data set's config and the settings; ``overrides`` come from the command line."""
    params = parse_params(merge_values(read_yaml(params_path), dict(overrides or {})), str(params_path))
    dataset = load_dataset(params.dataset, root / "configs/datasets")
    return RunContext(params, dataset, load_settings(folder=root / "configs"))


def build_tracking(run: RunContext) -> Tracking:
    """MLflow, for the data set's experiment and registered model."""
    from closedloop.adapters.mlflow import Tracking

    return Tracking(run.settings, run.dataset.model_name)


def build_features(run: RunContext) -> Features:
    """Feast, for the data set's project and this definition of its features."""
    from closedloop.adapters.feast import Features
    from closedloop.featureset import list_features

    return Features(
        run.settings,
        project=run.dataset.model_name,
        features=list_features(run.params, run.dataset),
        max_age_days=run.dataset.feature_max_age_days,
    )


def build_engine(run: RunContext) -> Engine:
    """DuckDB, within the limits of the settings."""
    from closedloop.adapters.engine import Engine

    engine = run.settings.engine
    return Engine(
        memory_limit=engine.memory_limit,
        threads=engine.threads,
        temp_directory=run.settings.locate(engine.temp_directory),
    )


def with_accuracy_min(dataset: DatasetConfig, accuracy_min: float) -> DatasetConfig:
    """The config with another least accuracy."""
    return dataset.model_copy(update={"gates": dataset.gates.model_copy(update={"accuracy_min": accuracy_min})})
