"""The one place that builds adapters from settings."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from closedloop.config.dataset import DatasetConfig, load_dataset
from closedloop.config.params import Params, merge_values, parse_params
from closedloop.config.settings import Settings, load_settings
from closedloop.config.yaml import read_yaml
from closedloop.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from closedloop.adapters.engines import Engine
    from closedloop.adapters.feast import Features
    from closedloop.adapters.kfp import ClusterRunner, LocalRunner
    from closedloop.adapters.mlflow import Tracking
    from closedloop.adapters.prometheus import ErrorCounts
    from closedloop.adapters.webhook import Webhook
    from closedloop.contract import ModelContract
    from closedloop.loop.monitor.monitor import ValueSource
    from closedloop.loop.status.doctor import Probe
    from closedloop.loop.status.overview import Overview
    from closedloop.records import Source
    from closedloop.release.evidence import Evidence
    from closedloop.release.moves import Releases
    from closedloop.scoring.batch import BatchOptions
    from closedloop.serving.config import WorkerConfig
    from closedloop.serving.process.agent import Agent
    from closedloop.serving.slots.downloads import ReleasedVersions
    from closedloop.serving.slots.slots import Slot
    from closedloop.store.actions import Actions, Campaign
    from closedloop.store.checks import Checks, Retraining
    from closedloop.store.database import Database
    from closedloop.store.journal import Journal
    from closedloop.store.predictions import Predictions
    from closedloop.store.samples import Samples


@dataclass(frozen=True)
class RunContext:
    """The parameters, data set config and settings that a command works with."""

    params: Params
    dataset: DatasetConfig
    settings: Settings
    params_path: Path

    @cached_property
    def database(self) -> Database:
        """The operations store's database: one in each process; it opens its first connection when it is first used."""
        from closedloop.store.database import Database

        operations = self.settings.operations
        return Database(self.settings.locate_url(operations.url), operations.connections_max)


def load_run(params_path: Path, *, root: Path = Path(), overrides: Mapping[str, Any] | None = None) -> RunContext:
    """Read params, the data set's config and the settings; ``overrides`` come from the command line."""
    params = parse_params(merge_values(read_yaml(params_path), dict(overrides or {})), str(params_path))
    dataset = load_dataset(params.dataset, root / "configs/datasets")
    if dataset.value is not None or params.model.threshold == "profit":
        from closedloop.config.featureset import list_value_columns

        list_value_columns(params, dataset)  # refuses a value that no feature of these params gives
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
    """Feast, for the data set's project and this definition of its features; a table does without it."""
    from closedloop.adapters.feast import Features
    from closedloop.adapters.feature_files import FeatureFiles
    from closedloop.config.featureset import list_features
    from closedloop.extras import has_module

    kind = FeatureFiles if run.dataset.kind == "table" and not has_module("feast") else Features
    return kind(
        run.settings,
        project=run.dataset.model_name,
        features=list_features(run.params, run.dataset),
        max_age_days=run.dataset.feature_max_age_days,
    )


def build_engine(run: RunContext) -> Engine:
    """DuckDB within the limits of the settings, or Spark where they say so."""
    engine = run.settings.engine
    if engine.kind == "spark":
        from closedloop.adapters import spark

        return spark.SparkEngine(run.settings.spark, threads=engine.threads)
    from closedloop.adapters import duckdb

    return duckdb.DuckEngine(
        memory_limit=engine.memory_limit,
        threads=engine.threads,
        temp_directory=run.settings.locate(engine.temp_directory),
    )


@contextmanager
def spread_batch(run: RunContext, options: BatchOptions) -> Iterator[BatchOptions]:
    """The options of a batch that is scored where the settings say: here, or with all the cores of a cluster."""
    if run.settings.engine.kind != "spark":
        yield options
        return
    from closedloop.adapters.spark import SparkEngine
    from closedloop.scoring.remote import spread_chunks

    with SparkEngine(run.settings.spark) as engine:
        yield replace(options, spread=partial(spread_chunks, engine), threads=engine.cores)


def build_predictions(run: RunContext) -> Predictions:
    """Predictions and outcomes, in the operations store."""
    from closedloop.store.predictions import Predictions

    return Predictions(run.database)


def build_actions(run: RunContext) -> Actions:
    """Campaigns and their actions, in the operations store."""
    from closedloop.store.actions import Actions

    return Actions(run.database)


def build_campaign_start(run: RunContext, slot: Slot, *, segment: str | None, reasons: int) -> Callable[..., Campaign]:
    """Start a campaign among those who are active at ``as_of``, by the model of ``slot``; takes its rules and now."""
    from closedloop.contract import read_contract
    from closedloop.loop.campaigns.start import score_customers, start_campaign
    from closedloop.serving.slots.downloads import fetch_contract

    options = build_batch_options(run, clock=lambda: run.params.as_of_at, reasons=reasons)

    def score() -> pd.DataFrame:
        given = run.params, run.dataset
        with build_engine(run) as engine:
            features, work_dir = build_features(run), locate_active(run)
            return score_customers(*given, engine, features, slot, options, segment=segment, work_dir=work_dir)

    @cache
    def read(version: str) -> ModelContract:
        """The contract of a version: the slot's from its folder, others from the registry."""
        if version == slot.version:
            return read_contract(Path(slot.folder))
        return fetch_contract(build_released(run), version)

    begin = partial(start_campaign, build_actions(run), run.params, run.dataset)
    return partial(begin, version=slot.version, score=score, read_contract=read)


def read_actions(run: RunContext) -> pd.DataFrame | None:
    """The actions of campaigns by ``as_of``, for rows to train on; None where the store has no tables yet.

    A stage may read it though DVC does not know it: an action touches no label that is known by its own date, and
    another ``as_of`` runs the stage again.
    """
    from closedloop.store.database import NothingDeployed

    store, until = build_actions(run), run.params.as_of_at
    try:
        try:
            return store.read_touching(run.dataset.model_name, until=until)
        except NothingDeployed:
            raise
        except ConfigError:  # tables of an earlier release
            run.database.upgrade()
            return store.read_touching(run.dataset.model_name, until=until)
    except NothingDeployed:
        return None


def build_journal(run: RunContext) -> Journal:
    """The journal of releases with the deployment row, in the operations store."""
    from closedloop.store.journal import Journal

    return Journal(run.database, run.settings.release.list_journal_keys())


def build_released(run: RunContext) -> ReleasedVersions:
    """The registry's model folders, each held to the digest that the journal released it with."""
    from closedloop.serving.slots.downloads import ReleasedVersions

    return ReleasedVersions(build_tracking(run), build_journal(run).read_digests(run.dataset.model_name))


def build_checks(run: RunContext) -> Checks:
    """The monitor's checks and the retrainings, in the operations store."""
    from closedloop.store.checks import Checks

    return Checks(run.database)


def build_overview(run: RunContext) -> Callable[[dt.datetime, dt.datetime], Overview]:
    """Return a function that reads the loop's state at a time of the service's clock and one of the data's clock."""
    from closedloop.loop.status.overview import Sources, gather
    from closedloop.store.status_queries import StatusQueries

    queries = StatusQueries(run.database, sent_features=run.settings.serving.count_sent_features)
    sources = Sources(build_journal(run), build_checks(run), queries)
    name, horizon_days = run.dataset.model_name, run.dataset.horizon_days
    return lambda now, as_of: gather(sources, name, horizon_days=horizon_days, now=now, as_of=as_of)


def read_overview(run: RunContext, now: dt.datetime, clock: dt.datetime) -> Overview:
    """The state of the loop, which may have no store yet."""
    from closedloop.loop.status.overview import describe_nothing
    from closedloop.store.database import NothingDeployed

    try:
        return build_overview(run)(now, clock)
    except NothingDeployed:
        return describe_nothing(run.dataset.model_name, horizon_days=run.dataset.horizon_days, now=now, as_of=clock)


def write_start_page(run: RunContext, now: dt.datetime) -> Path:
    """Write reports/index.html of the project in the working directory, which holds what its runs left."""
    from closedloop.files import find_sqlite_file
    from closedloop.loop.start_page import write_start_page as write

    settings, name = run.settings, run.dataset.model_name
    tracking = settings.locate_url(settings.tracking.uri)
    return write(
        read_overview(run, now, dt.datetime.combine(run.params.as_of, dt.time(), dt.UTC)),
        root=settings.root,
        monitoring=settings.locate(settings.monitoring.reports) / name,
        replay=settings.locate("workspaces/loop") / run.dataset.name / "loop.html",
        tracking=find_sqlite_file(tracking),
    )


def build_probes(run: RunContext) -> list[Probe]:
    """The checks that `closedloop doctor` makes of the profile's services."""
    from closedloop.adapters.dvc import find_remote
    from closedloop.adapters.kfp import ClusterRunner
    from closedloop.loop.status.doctor import Probe, list_probes, probe_prometheus

    settings, name, journal, runner = run.settings, run.dataset.model_name, build_journal(run), build_runner(run)
    probes = list_probes(name, journal, build_tracking(run), build_features(run))
    if remote := settings.data.remote:
        remedy = "correct data.remote, or the bucket and its credentials (AWS_*)"
        probes.append(Probe("DVC's remote", lambda: find_remote(remote), remedy))
    if settings.release.prometheus:
        probes.append(probe_prometheus(name, journal, _build_error_counts(run)))
    if isinstance(runner, ClusterRunner):
        remedy = "correct retraining.endpoint, or CLOSEDLOOP_RETRAINING__TOKEN"
        probes.append(Probe("Kubeflow Pipelines", runner.ask_server, remedy))
    return probes


def build_releases(run: RunContext) -> Releases:
    """The releases, which move the champion; this also upgrades the store's tables."""
    from closedloop.adapters.kubectl import GatewaySplit, IstioSplit, TrafficSplit
    from closedloop.release.moves import Releases

    release = run.settings.release
    run.database.upgrade()
    traffic: TrafficSplit | None = None
    if release.traffic == "istio":
        traffic = IstioSplit(release.istio)
    elif release.traffic == "gateway":
        traffic = GatewaySplit(release.gateway)
    return Releases(build_tracking(run), build_journal(run), traffic, tell=build_webhook(run).tell)


def build_webhook(run: RunContext) -> Webhook:
    """The webhook for verdicts, gates and releases; without an address it sends nothing."""
    from closedloop.adapters.webhook import Webhook

    return Webhook(**run.settings.webhook.model_dump())


def build_runner(run: RunContext) -> LocalRunner | ClusterRunner:
    """The runner of the retraining pipeline: local processes or a cluster, as the settings say."""
    from closedloop.adapters.kfp import ClusterRunner, LocalRunner

    settings, pipeline = run.settings.retraining, run.settings.locate("pipelines/retrain.py")
    if settings.runner == "cluster":
        return ClusterRunner(pipeline, settings)
    return LocalRunner(pipeline, locate_retraining_state(run), settings)


def build_retraining(run: RunContext, checks: Checks) -> Callable[[str], tuple[Retraining, bool]]:
    """Return a function that runs the retraining of a trigger id; see `closedloop.loop.retrain.run_retraining`."""
    from closedloop.loop.retrain import run_retraining

    plan, runner = build_retraining_plan(run), build_runner(run)
    return partial(
        run_retraining, run.params, run.dataset, checks, runner, plan=plan, now=lambda: dt.datetime.now(dt.UTC)
    )


def build_retraining_plan(run: RunContext) -> Callable[[Params], Params]:
    """Return a function that gives the parameters of a retraining; see `closedloop.loop.retrain.plan_retraining`."""
    from closedloop.loop.retrain import plan_retraining

    how, only = run.settings.retraining, run.settings.monitoring.policy == "recalibrate"

    def plan(params: Params) -> Params:
        return plan_retraining(
            params,
            run.dataset,
            window_days=how.window_days,
            split=how.split,
            champion=build_tracking(run).read_champion_version(),
            recalibrates_only=only,
        )

    return plan


def locate_retraining_state(run: RunContext) -> Path:
    """The folder for the artifacts, log and locks of this data set's local retrainings."""
    return run.settings.locate(run.settings.retraining.state) / run.dataset.model_name


def build_release_evidence(run: RunContext) -> Evidence:
    """The source of the evidence that a release step is decided on."""
    from closedloop.config.featureset import list_value_columns
    from closedloop.release.evidence import Evidence, Unit
    from closedloop.store.release_queries import ReleaseQueries

    settings, predictions = run.settings.release, build_predictions(run)
    by_row = settings.traffic == "row"  # the stream worker follows the row too; a proxy splits HTTP only
    sent = run.settings.serving.count_sent_features
    sources: tuple[Source, ...] = ("http", "stream") if by_row else ("http",)
    queries = ReleaseQueries(run.database, sources, sent_features=sent, sticky=by_row)
    errors = _build_error_counts(run)
    unit: Unit = "customer" if by_row else "request"
    worth = run.dataset.value, list_value_columns(run.params, run.dataset)
    return Evidence(queries, predictions, errors, unit, run.dataset.horizon_days, sent, *worth)


def read_worth(run: RunContext) -> ValueSource | None:
    """The worth of a kept customer, for the monitor; None without a value in the data set's config."""
    from closedloop.config.featureset import list_value_columns
    from closedloop.loop.monitor.monitor import ValueSource

    value = run.dataset.value
    return None if value is None else ValueSource(value, list_value_columns(run.params, run.dataset))


def _build_error_counts(run: RunContext) -> ErrorCounts:
    from closedloop.adapters.prometheus import ErrorCounts

    settings = run.settings.release
    matchers = ",".join(filter(None, (f'model_name="{run.dataset.model_name}"', settings.prometheus_matchers)))
    return ErrorCounts(settings.prometheus, locate_service(run).metrics_page, matchers)


class ServiceAddress(NamedTuple):
    """Where the service answers, and its metrics page."""

    address: str
    metrics_page: str


def locate_service(run: RunContext) -> ServiceAddress:
    """Where this data set's service was last started here; else where the settings would start it."""
    from closedloop.serving.config import CONFIG_FILE, read_config

    serving = run.settings.serving
    with suppress(OSError, ValueError):
        serving = read_config(locate_serving_state(run) / CONFIG_FILE).settings
    host = "127.0.0.1" if serving.host == "0.0.0.0" else serving.host  # noqa: S104 - called, not listened on
    return ServiceAddress(f"http://{host}:{serving.port}", f"http://{host}:{serving.metrics_port}/metrics")


def build_samples(run: RunContext) -> Samples:
    """The monitor's view of the operations store."""
    from closedloop.store.samples import Samples

    return Samples(run.database, sent_features=run.settings.serving.count_sent_features)


def build_agent(run: RunContext, *, parent: int | None = None) -> tuple[Agent, Path]:
    """The agent, a process beside the service's workers, and the state folder that they share."""
    from closedloop.serving.process.agent import Agent, OperationsStore

    state_dir, slot = locate_serving_state(run), run.settings.serving.slot
    name, registry = run.dataset.model_name, build_tracking(run)
    stores = OperationsStore(run.database.upgrade, build_predictions(run), build_journal(run))
    return Agent(state_dir, name, stores, registry, parent=parent, slot=slot), state_dir


@contextmanager
def open_slot(run: RunContext, model_dir: Path | None) -> Iterator[Slot]:
    """Open the model to score with outside the service: the folder ``model_dir``, else the released version."""
    from closedloop.scoring.champion import open_champion
    from closedloop.serving.slots.slots import read_bundled

    if model_dir is not None:
        yield read_bundled(model_dir.resolve())
        return
    journal, registry = build_journal(run), build_tracking(run)
    with open_champion(locate_serving_state(run), run.dataset.model_name, journal, registry) as slot:
        run.database.close()  # scoring takes long and needs no connection
        yield slot


@contextmanager
def hold_working_files(run: RunContext) -> Iterator[None]:
    """Hold the lock on the working files outside of dvc.yaml's graph: one process at a time writes or reads them."""
    from closedloop.files import wait_for_lock

    with wait_for_lock(run.settings.locate("state/working.lock")):
        yield


def locate_active(run: RunContext) -> Path:
    """The working files of what scores all active customers; `hold_working_files` guards them."""
    return run.settings.locate("state/active") / run.dataset.model_name


def locate_serving_state(run: RunContext) -> Path:
    """The state folder that the service's workers and agent share."""
    return run.settings.locate(run.settings.serving.state) / run.dataset.model_name


def load_id_key(run: RunContext) -> bytes:
    """The key that seals prediction ids, as the service has it."""
    from closedloop.serving.worker import read_id_key

    return read_id_key(locate_serving_state(run), run.settings.serving.id_key)


def build_batch_options(run: RunContext, *, log: bool = True, **chosen: Any) -> BatchOptions:
    """How rows are scored outside the service, by its settings; ``log``: into the operations store."""
    from closedloop.scoring.batch import BatchOptions

    return BatchOptions(
        range_margin=run.settings.serving.range_margin,
        id_key=load_id_key(run),
        store=build_predictions(run) if log else None,
        threads=run.settings.engine.threads,
        **chosen,
    )


def build_worker_config(
    run: RunContext, *, as_of: dt.date | None, bundled_dir: Path | None, clock: Path | None = None, agent: bool = True
) -> WorkerConfig:
    """The config of a process that answers requests; its only secret may be the online store's password."""
    from closedloop.adapters.feast_store import read_store_config
    from closedloop.adapters.online_store import pick_online
    from closedloop.serving.config import WorkerConfig

    return WorkerConfig(
        model_name=run.dataset.model_name,
        state_dir=locate_serving_state(run),
        settings=run.settings.serving,
        bundled_dir=bundled_dir.resolve() if bundled_dir else None,
        online=pick_online(read_store_config(run.settings, run.dataset.model_name)),
        feature_max_age_days=run.dataset.feature_max_age_days,
        as_of=as_of,
        clock=clock.resolve() if clock else None,
        params=run.params_path.resolve(),
        agent=agent,
    )


def write_stream_config(run: RunContext, *, as_of: dt.date | None, bundled_dir: Path | None, agent: bool) -> Path:
    """Write the stream worker's config file; its secrets stay in the environment."""
    from closedloop.scoring.stream import StreamConfig

    worker = build_worker_config(run, as_of=as_of, bundled_dir=bundled_dir, agent=agent)
    stream = run.settings.stream.name_topics(run.dataset.model_name)
    return _hand_over(run, "stream.json", StreamConfig(**dict(worker), stream=stream))


def write_serving_config(
    run: RunContext, *, as_of: dt.date | None, bundled_dir: Path | None, clock: Path | None = None
) -> Path:
    """Write the config file of the service's processes; their secrets stay in the environment."""
    from closedloop.serving.config import CONFIG_FILE

    return _hand_over(run, CONFIG_FILE, build_worker_config(run, as_of=as_of, bundled_dir=bundled_dir, clock=clock))


def _hand_over(run: RunContext, name: str, config: WorkerConfig) -> Path:
    from closedloop.files import write_text

    path = locate_serving_state(run) / name
    write_text(path, config.model_dump_json(indent=2) + "\n", private=True)
    return path
