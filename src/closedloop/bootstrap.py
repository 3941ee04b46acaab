"""The one place that builds adapters from settings."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from closedloop.dataset import DatasetConfig, load_dataset, read_yaml
from closedloop.params import Params, merge_values, parse_params
from closedloop.settings import Settings, load_settings

if TYPE_CHECKING:
    from closedloop.adapters.checks import Checks, Retraining
    from closedloop.adapters.engine import Engine
    from closedloop.adapters.feast import Features
    from closedloop.adapters.kfp import ClusterRunner, LocalRunner
    from closedloop.adapters.mlflow import Tracking
    from closedloop.adapters.prometheus import ErrorCounts
    from closedloop.adapters.samples import Samples
    from closedloop.adapters.store import Store
    from closedloop.core.rollout import RolloutPolicy
    from closedloop.loop.doctor import Probe
    from closedloop.loop.monitor import Rules
    from closedloop.loop.overview import Overview
    from closedloop.loop.release import Evidence
    from closedloop.serving.agent import Agent
    from closedloop.serving.config import WorkerConfig
    from closedloop.serving.slots import Slot
    from closedloop.stages.deploy import Releases


@dataclass(frozen=True)
class RunContext:
    """What a stage works on."""

    params: Params
    dataset: DatasetConfig
    settings: Settings
    params_path: Path


def load_run(params_path: Path, *, root: Path = Path(), overrides: Mapping[str, Any] | None = None) -> RunContext:
    """Read params, the data set's config and the settings; ``overrides`` come from the command line."""
    params = parse_params(merge_values(read_yaml(params_path), dict(overrides or {})), str(params_path))
    dataset = load_dataset(params.dataset, root / "configs/datasets")
    return RunContext(params, dataset, load_settings(folder=root / "configs"), params_path)


def load_newest(params_path: Path, overrides: Mapping[str, Any]) -> RunContext:
    """`load_run`, but in production ``as_of`` is today (UTC) unless the overrides name a day."""
    run = load_run(params_path, overrides=overrides)
    if "as_of" in overrides or run.settings.profile != "production":
        return run
    return load_run(params_path, overrides={**overrides, "as_of": dt.datetime.now(dt.UTC).date().isoformat()})


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


def build_store(run: RunContext) -> Store:
    """The operations store."""
    from closedloop.adapters.store import Store

    return Store(*_locate_operations(run))


def _locate_operations(run: RunContext) -> tuple[str, int]:
    """The operations store's address, and how many connections each client of it may open."""
    return run.settings.locate_url(run.settings.operations.url), run.settings.operations.connections_max


def build_checks(run: RunContext) -> Checks:
    """The monitor's checks and the retrainings, in the operations store."""
    from closedloop.adapters.checks import Checks

    return Checks(*_locate_operations(run))


def build_overview(run: RunContext) -> Callable[[dt.datetime, dt.datetime], Overview]:
    """What reads how the loop stands, by the service's clock and the data's."""
    from closedloop.adapters.figures import Figures
    from closedloop.adapters.journal import Journal
    from closedloop.loop.overview import Sources, gather

    address = _locate_operations(run)
    sources = Sources(build_store(run), Journal(*address), build_checks(run), Figures(*address))
    horizon_days = run.dataset.label.horizon_days if run.dataset.label else None
    name = run.dataset.model_name
    return lambda now, as_of: gather(sources, name, horizon_days=horizon_days, now=now, as_of=as_of)


def build_probes(run: RunContext) -> list[Probe]:
    """What `closedloop doctor` asks of the profile's services."""
    from closedloop.adapters.dvc import find_remote
    from closedloop.adapters.kfp import ClusterRunner
    from closedloop.loop.doctor import Probe, list_probes, probe_prometheus

    settings, name, store, runner = run.settings, run.dataset.model_name, build_store(run), build_runner(run)
    probes = list_probes(name, store, build_tracking(run), build_features(run))
    if remote := settings.data.remote:
        remedy = "correct data.remote, or the bucket and its credentials (AWS_*)"
        probes.append(Probe("DVC's remote", lambda: find_remote(remote), remedy))
    if settings.release.prometheus:
        probes.append(probe_prometheus(name, store, _build_error_counts(run)))
    if isinstance(runner, ClusterRunner):
        remedy = "correct retraining.endpoint, or CLOSEDLOOP_RETRAINING__TOKEN"
        probes.append(Probe("Kubeflow Pipelines", runner.ask_server, remedy))
    return probes


def build_releases(run: RunContext) -> Releases:
    """What moves the champion; the store's tables are brought up to date."""
    from closedloop.adapters.journal import Journal
    from closedloop.adapters.kubectl import IstioSplit
    from closedloop.stages.deploy import Releases, ServiceSplit

    store, release = build_store(run), run.settings.release
    store.upgrade()
    journal = Journal(*_locate_operations(run))
    traffic = IstioSplit(release.istio) if release.traffic == "istio" else ServiceSplit()
    return Releases(build_tracking(run), store, journal, traffic)


def build_runner(run: RunContext) -> LocalRunner | ClusterRunner:
    """What runs the retraining pipeline: this machine, or a cluster."""
    from closedloop.adapters.kfp import ClusterRunner, LocalRunner

    settings, pipeline = run.settings.retraining, run.settings.locate("pipelines/retrain.py")
    if settings.runner == "cluster":
        return ClusterRunner(pipeline, settings)
    return LocalRunner(pipeline, locate_retraining_state(run), settings)


def build_retraining(run: RunContext, checks: Checks) -> Callable[[str], tuple[Retraining, bool]]:
    """What runs the retraining of a trigger id; see `closedloop.loop.retrain.run_retraining`."""
    from closedloop.loop.retrain import run_retraining

    days, runner = run.settings.retraining.window_days, build_runner(run)
    return partial(
        run_retraining, run.params, run.dataset, checks, runner, window_days=days, now=lambda: dt.datetime.now(dt.UTC)
    )


def locate_retraining_state(run: RunContext) -> Path:
    """What local retrainings of this data set leave, and keep for the next."""
    return run.settings.locate(run.settings.retraining.state) / run.dataset.model_name


def build_release_evidence(run: RunContext) -> Evidence:
    """What a step of a release is decided on."""
    from closedloop.adapters.arms import Arms
    from closedloop.loop.release import Evidence

    settings, address = run.settings.release, _locate_operations(run)
    horizon_days = run.dataset.label.horizon_days if run.dataset.label else None
    by_row = settings.traffic == "row"  # which the stream's worker follows too; a proxy sees the service's requests
    arms = Arms(*address, sources=("http", "stream") if by_row else ("http",))
    return Evidence(arms, build_store(run), _build_error_counts(run), "customer" if by_row else "request", horizon_days)


def _build_error_counts(run: RunContext) -> ErrorCounts:
    from closedloop.adapters.prometheus import ErrorCounts

    settings, serving = run.settings.release, run.settings.serving
    page = f"http://{serving.host}:{serving.metrics_port}/metrics"
    return ErrorCounts(settings.prometheus, page, settings.prometheus_matchers)


def build_release_policy(run: RunContext) -> RolloutPolicy:
    """What a release has to show."""
    import dataclasses

    from closedloop.core.rollout import STEPS, RolloutPolicy

    settings = run.settings.release
    chosen = [step for step in STEPS if step.name in ("shadow", "champion", *settings.steps)]
    hours = [settings.hours_max] * (len(chosen) - 2) + [settings.last_hours_max, settings.guard_hours_max]
    least = settings.requests_min
    steps = tuple(
        dataclasses.replace(
            step, hours_max=most, requests_min=least if least and step.weight < 1 else step.requests_min
        )
        for step, most in zip(chosen, hours, strict=True)
    )
    names = {field.name for field in dataclasses.fields(RolloutPolicy)} - {"steps"}
    limits = {name: value for name, value in settings.model_dump().items() if name in names}
    return RolloutPolicy(steps=steps, **limits)


def build_monitor_rules(run: RunContext) -> Rules:
    """What the monitor judges by."""
    import dataclasses

    from closedloop.core.monitoring import AlarmLimits, Policy
    from closedloop.loop.monitor import Rules

    values = run.settings.monitoring.model_dump()
    limits = AlarmLimits(**{field.name: values[field.name] for field in dataclasses.fields(AlarmLimits)})
    policy = Policy(**{field.name: values[field.name] for field in dataclasses.fields(Policy)})
    return Rules(limits, policy, values["window_days_max"], values["sample_rows_max"])


def build_samples(run: RunContext) -> Samples:
    """What the monitor reads of the operations store."""
    from closedloop.adapters.samples import Samples

    return Samples(*_locate_operations(run))


def build_agent(run: RunContext, *, parent: int | None = None) -> tuple[Agent, Path]:
    """The process beside the service's workers, and the state folder that they share."""
    from closedloop.adapters.database import load_alembic
    from closedloop.serving.agent import Agent

    load_alembic()
    state_dir, slot = locate_serving_state(run), run.settings.serving.slot
    name, registry = run.dataset.model_name, build_tracking(run)
    return Agent(state_dir, name, build_store(run), registry, parent=parent, slot=slot), state_dir


@contextmanager
def open_slot(run: RunContext, model_dir: Path | None) -> Iterator[Slot]:
    """The model to score with outside the service: this folder, else the released version's."""
    from closedloop.serving.champion import open_champion
    from closedloop.serving.slots import read_bundled

    if model_dir is not None:
        yield read_bundled(model_dir.resolve())
        return
    store, registry = build_store(run), build_tracking(run)
    with open_champion(locate_serving_state(run), run.dataset.model_name, store, registry) as slot:
        store.close()
        yield slot


@contextmanager
def hold_working_files(run: RunContext) -> Iterator[None]:
    """One process at a time fills, reads or erases what `refresh` and `outcomes` read from the source."""
    from closedloop.files import wait_for_lock

    with wait_for_lock(run.settings.locate("state/working.lock")):
        yield


def locate_serving_state(run: RunContext) -> Path:
    """Where workers and agent meet."""
    return run.settings.locate(run.settings.serving.state) / run.dataset.model_name


def build_worker_config(
    run: RunContext, *, as_of: dt.date | None, bundled_dir: Path | None, clock: Path | None = None
) -> WorkerConfig:
    """What a process that answers needs to know; the one secret in it may be the online store's password."""
    import msgspec

    from closedloop.adapters.feast import read_store_config
    from closedloop.adapters.online import pick_online
    from closedloop.serving.config import WorkerConfig

    names = {field.name for field in msgspec.structs.fields(WorkerConfig)}
    values = {name: value for name, value in run.settings.serving.model_dump().items() if name in names}
    return WorkerConfig(
        **values,
        model_name=run.dataset.model_name,
        state_dir=str(locate_serving_state(run)),
        bundled_dir=str(bundled_dir.resolve()) if bundled_dir else None,
        online=pick_online(read_store_config(run.settings, run.dataset.model_name)),
        feature_max_age_days=run.dataset.feature_max_age_days,
        as_of=as_of,
        clock=str(clock.resolve()) if clock else None,
    )


def write_stream_config(run: RunContext, *, as_of: dt.date | None, bundled_dir: Path | None, agent: bool) -> Path:
    """Write what the stream worker reads, and set what it reads of the environment."""
    from closedloop.serving.stream import StreamConfig

    topics = run.settings.stream.model_dump(exclude={"properties"})
    name = run.dataset.model_name
    topics |= {key: value.format(model_name=name) for key, value in topics.items() if isinstance(value, str)}
    worker = build_worker_config(run, as_of=as_of, bundled_dir=bundled_dir)
    return _hand_over(run, "stream.json", StreamConfig(**topics, worker=worker, params=_name_params(run), agent=agent))


def write_serving_config(
    run: RunContext, *, as_of: dt.date | None, bundled_dir: Path | None, clock: Path | None = None
) -> Path:
    """Write what the service's processes read, and set what they read of the environment."""
    import msgspec

    from closedloop.serving.config import CONFIG_FILE

    settings = run.settings.serving
    config = build_worker_config(run, as_of=as_of, bundled_dir=bundled_dir, clock=clock)
    server = {"host": settings.host, "port": settings.port, "workers": settings.workers, "params": _name_params(run)}
    return _hand_over(run, CONFIG_FILE, {**msgspec.to_builtins(config), **server})


def _name_params(run: RunContext) -> str:
    """The file by which the agent is started as well: it says whose model is served."""
    return str(run.params_path.resolve())


def _hand_over(run: RunContext, name: str, config: Any) -> Path:
    import msgspec

    from closedloop.environment import export_secrets
    from closedloop.files import write_text

    export_secrets(run.settings.serving, run.settings.stream)
    path = locate_serving_state(run) / name
    write_text(path, msgspec.json.format(msgspec.json.encode(config)).decode() + "\n", private=True)
    return path


def with_accuracy_min(dataset: DatasetConfig, accuracy_min: float) -> DatasetConfig:
    """The config with another least accuracy."""
    return dataset.model_copy(update={"gates": dataset.gates.model_copy(update={"accuracy_min": accuracy_min})})
