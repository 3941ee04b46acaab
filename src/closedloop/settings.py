"""Where services live and what this process may use: command line, environment, configs/<profile>.yaml, defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from closedloop.dataset import describe_invalid, read_yaml
from closedloop.errors import ConfigError

PROFILE_VARIABLE = "CLOSEDLOOP_PROFILE"
CONFIG_FOLDER = Path("configs")
ENVIRONMENT = "the environment (CLOSEDLOOP_*)"
TOKEN = re.compile(r"[!-~]+")
SECRETS = {"serving": {"tokens", "id_key"}, "stream": {"properties"}, "retraining": {"token"}}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class DataSettings(_Section):
    """DVC's remote: a bucket or folder; `make data-remote` tells DVC."""

    remote: str = ""


class TrackingSettings(_Section):
    """MLflow: its store, and the folder or bucket of its artifacts."""

    uri: str = "sqlite:///mlflow.db"
    artifacts: str = "state/mlflow"
    wandb: bool = False


class FeatureStoreSettings(_Section):
    """What differs from ``feature_repo/feature_store.yaml``, in Feast's own words; ``offline``: published rows."""

    offline: str = "state/feast/offline"
    overrides: dict[str, Any] = {}


class EngineSettings(_Section):
    """DuckDB's limits; it spills to ``temp_directory`` beyond them."""

    memory_limit: str = Field(default="2GB", pattern=r"^\d+(\.\d+)?\s?[KMG]i?B$")
    threads: int = Field(default=2, ge=1, le=1024)
    temp_directory: str = "state/duckdb"


class IstioSettings(_Section):
    """The VirtualService whose weights follow the release: of its route to these two subsets."""

    virtual_service: str = "closedloop"
    namespace: str = "default"
    stable: str = "stable"
    canary: str = "canary"


class ReleaseSettings(_Section):
    """How a version is released; the limits are those of `closedloop.core.rollout.RolloutPolicy`.

    ``auto_promote``: a version that won offline becomes champion at once; production releases by evidence instead.
    ``steps``: those between shadow and champion; ``requests_min``: in each, null for what a power calculation says.
    ``hours_max``, ``last_hours_max``, ``guard_hours_max``: of a step, the last canary step, the watch over a champion.
    """

    auto_promote: bool = False
    evidence: Literal["offline", "outcomes"] = "offline"
    traffic: Literal["row", "istio"] = "row"
    prometheus: str = ""
    prometheus_matchers: str = ""
    steps: tuple[Literal["canary_5", "canary_25", "canary_50"], ...] = ("canary_5", "canary_25", "canary_50")
    requests_min: int | None = Field(default=None, ge=1)
    hours_max: float = Field(default=72, gt=0)
    last_hours_max: float = Field(default=24 * 45, gt=0)
    guard_hours_max: float = Field(default=24 * 60, gt=0)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    guard_alpha: float = Field(default=0.01, gt=0, lt=1)
    split_alpha: float = Field(default=0.001, gt=0, lt=1)
    outcomes_planned: int = Field(default=5_000, ge=1)
    outcomes_deviation: float = Field(default=0.3, gt=0)
    outcomes_min: int = Field(default=200, ge=1)
    error_ratio_max: float = Field(default=1.5, ge=1)
    error_rate_max: float = Field(default=0.05, gt=0, lt=1)
    latency_ratio_max: float = Field(default=1.5, ge=1)
    latency_slack_ms: float = Field(default=5.0, ge=0)
    score_distance_max: float = Field(default=0.2, ge=0, le=1)
    istio: IstioSettings = IstioSettings()

    @model_validator(mode="after")
    def _errors_of_both_services(self) -> ReleaseSettings:
        if self.traffic == "istio" and not self.prometheus:
            raise ValueError("release.traffic istio needs release.prometheus: errors are those of two services")
        return self


class OperationsSettings(_Section):
    """The operations store: predictions, outcomes, the deployment row. A password belongs in the environment.

    ``connections_max``: of each of the few clients (store, journal, checks, ...) that a process has open.
    """

    url: str = "sqlite:///state/operations.db"
    connections_max: int = Field(default=5, ge=1)
    predictions_keep_days: int = Field(default=400, ge=1)


class ServingSettings(_Section):
    """The service's addresses and limits.

    ``tokens`` (environment only) is ``{token: [scope, ...]}`` with the scopes predict, outcomes and admin; without
    any, requests need none. ``id_key`` (environment only) seals prediction ids: all replicas share one; without it
    the state folder keeps one of its own. ``slot``: which version of the deployment row this service answers with;
    a canary's own service behind a proxy takes the challenger. ``range_margin``: a numeric feature may leave the range
    seen in training by this many of its widths.
    """

    host: str = "127.0.0.1"
    slot: Literal["champion", "challenger"] = "champion"
    port: int = Field(default=3000, ge=0, le=65535)
    metrics_port: int = Field(default=8001, ge=0, le=65535)
    workers: int = Field(default=1, ge=1, le=64)
    state: str = "state/serving"
    tokens: dict[str, tuple[Literal["predict", "outcomes", "admin"], ...]] = Field(default={}, repr=False)
    id_key: str = Field(default="", repr=False, max_length=64)
    body_bytes_max: int = Field(default=1_000_000, ge=1_000)
    batch_items_max: int = Field(default=1_000, ge=1)
    queue_max: int = Field(default=512, ge=1)
    outcomes_per_minute: int = Field(default=6_000, ge=1)
    range_margin: float = Field(default=1.0, ge=0)
    access_log: bool = False
    fsync_before_answer: bool = False
    fsync_every_ms: int = Field(default=50, ge=1, le=50)
    spool_segment_bytes: int = Field(default=16_000_000, ge=10_000)
    spool_bytes_max: int | None = Field(default=None, ge=1)
    disk_free_bytes_min: int = Field(default=50_000_000, ge=0)

    @field_validator("tokens")
    @classmethod
    def _tokens_are_tokens(cls, tokens: dict[str, Any]) -> dict[str, Any]:
        # of an empty one, as a template without its secret leaves it, every request would have the scopes
        if not all(TOKEN.fullmatch(token) for token in tokens):
            raise ValueError("a token is ASCII characters without spaces, and at least one")
        return tokens

    @model_validator(mode="after")
    def _drained_spools_fit(self) -> ServingSettings:
        # each worker keeps the file that it writes to, drained or not
        if self.spool_bytes_max is not None and self.spool_bytes_max < 2 * self.workers * self.spool_segment_bytes:
            raise ValueError("spool_bytes_max must be at least two files (spool_segment_bytes) for each of the workers")
        return self


class ExporterSettings(_Section):
    """Where Prometheus finds the loop's figures."""

    host: str = "127.0.0.1"
    port: int = Field(default=8002, ge=0, le=65535)


class StreamSettings(_Section):
    """The Kafka worker; ``{model_name}`` in a name is the data set's.

    ``properties`` (environment only, JSON) are librdkafka's, with the credentials that the brokers ask for.
    """

    brokers: str = "127.0.0.1:9092"
    input_topic: str = "{model_name}.requests"
    output_topic: str = "{model_name}.predictions"
    dead_letter_topic: str = "{model_name}.dead"
    group: str = "{model_name}"
    batch_size: int = Field(default=500, ge=1, le=1000)
    properties: dict[str, str] = Field(default={}, repr=False)

    @model_validator(mode="after")
    def _topics_differ(self) -> StreamSettings:
        if len({self.input_topic, self.output_topic, self.dead_letter_topic}) < 3:
            raise ValueError("input_topic, output_topic and dead_letter_topic must differ: answers would be read again")
        return self


class RetrainingSettings(_Section):
    """Where retrainings run: as processes here (``local``), or on a cluster's Kubeflow Pipelines at ``endpoint``.

    Without a start date a retraining takes the last ``window_days`` of snapshots with closed labels. On a cluster every
    pod runs ``base_image`` with the variables of ``environment``, and those keys of the Kubernetes Secret ``secret``
    that ``secret_keys`` names. ``token`` (environment only) opens the endpoint.
    """

    runner: Literal["local", "cluster"] = "local"
    window_days: int = Field(default=90, ge=1)
    state: str = "state/retraining"
    endpoint: str = ""
    token: str = Field(default="", repr=False)
    namespace: str = "kubeflow"
    service_account: str = ""
    base_image: str = "closedloop/jobs-python:latest"
    environment: dict[str, str] = {"CLOSEDLOOP_PROFILE": "production"}
    secret: str = ""
    secret_keys: tuple[str, ...] = ()
    timeout_seconds: int = Field(default=6 * 3600, ge=1)

    @model_validator(mode="after")
    def _cluster_has_an_address(self) -> RetrainingSettings:
        if self.runner == "cluster" and not self.endpoint:
            raise ValueError("runner 'cluster' needs the address of Kubeflow Pipelines: endpoint")
        return self


class MonitoringSettings(_Section):
    """When the monitor alarms, and when it asks for a retraining; ``retrain`` runs it at once, here."""

    false_alarm_rate: float = Field(default=0.01, gt=0, lt=0.5)
    effect_min: float = Field(default=0.1, ge=0, le=1)
    limits: Literal["calibrated", "fixed", "both"] = "calibrated"
    drifted_share_max: float = Field(default=0.3, gt=0, le=1)
    missing_share_max: float = Field(default=0.05, gt=0, le=1)
    mean_sigmas_max: float = Field(default=3.0, gt=0)
    estimate_drop_min: float = Field(default=0.02, ge=0, le=1)
    loss_excess_min: float = Field(default=0.01, ge=0, le=1)
    churn_gap_min: float = Field(default=0.03, ge=0, le=1)
    accuracy_threshold: float | None = Field(default=None, ge=0, le=1)
    window_rows_min: int = Field(default=500, ge=50)
    outcome_rows_min: int = Field(default=500, ge=50)
    window_days_max: int = Field(default=31, ge=1)
    sample_rows_max: int = Field(default=20_000, ge=1_000)
    breaches: int = Field(default=3, ge=1)
    of_checks: int = Field(default=3, ge=1)
    outcome_breaches: int = Field(default=1, ge=1)
    outcome_of_checks: int = Field(default=1, ge=1)
    model_age_days_max: int | None = Field(default=365, ge=1)
    cooldown_days: int = Field(default=14, ge=0)
    retrainings_per_month: int = Field(default=2, ge=1)
    retrain: bool = False
    reports: str = "state/monitoring"

    @model_validator(mode="after")
    def _breaches_fit(self) -> MonitoringSettings:
        if self.breaches > self.of_checks or self.outcome_breaches > self.outcome_of_checks:
            raise ValueError("breaches must not be more than of_checks, nor outcome_breaches than outcome_of_checks")
        return self


class _Environment(EnvSettingsSource):
    """The environment without the profile, which was decided before its file was read: an argument wins there."""

    def __call__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__call__().items() if name != "profile"}


class Settings(BaseSettings):
    """All settings, resolved; relative paths are relative to ``root``."""

    model_config = SettingsConfigDict(env_prefix="CLOSEDLOOP_", env_nested_delimiter="__", frozen=True, extra="forbid")

    profile: Literal["local", "production"] = "local"
    root: Path = Path()
    data: DataSettings = DataSettings()
    tracking: TrackingSettings = TrackingSettings()
    features: FeatureStoreSettings = FeatureStoreSettings()
    engine: EngineSettings = EngineSettings()
    release: ReleaseSettings = ReleaseSettings()
    operations: OperationsSettings = OperationsSettings()
    serving: ServingSettings = ServingSettings()
    exporter: ExporterSettings = ExporterSettings()
    stream: StreamSettings = StreamSettings()
    monitoring: MonitoringSettings = MonitoringSettings()
    retraining: RetrainingSettings = RetrainingSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the profile's file, which comes in through ``init_settings``."""
        return _Environment(settings_cls), init_settings

    @model_validator(mode="after")
    def _production_releases_on_evidence(self) -> Settings:
        if self.profile == "production" and self.release.auto_promote:
            raise ValueError("release.auto_promote is refused in production: a champion is released by canary")
        return self

    def locate(self, path: str) -> Path:
        """A path of the settings as an absolute path."""
        return (self.root / path).resolve()

    def locate_url(self, url: str) -> str:
        """A database address with a relative SQLite file made absolute; any other is returned as it is."""
        prefix = "sqlite:///"
        if url.startswith(prefix) and not url.startswith(prefix + "/"):
            return prefix + str(self.locate(url.removeprefix(prefix)))
        return url


class _ServingEnvironment(BaseSettings):
    """The service's section alone: what else is wrong is of no concern to what only answers."""

    model_config = SettingsConfigDict(env_prefix="CLOSEDLOOP_", env_nested_delimiter="__", frozen=True)

    serving: ServingSettings = ServingSettings()


def read_serving_environment() -> ServingSettings:
    """The service's settings as the environment has them, where no profile's file is.

    Raises
    ------
    ConfigError
        If a key is wrong.
    """
    with _name_source(ENVIRONMENT):
        return _ServingEnvironment().serving


@contextmanager
def _name_source(source: str) -> Iterator[None]:
    """Turn what pydantic says of wrong values into an error that says where they stand, and shows no secret."""
    try:
        yield
    except SettingsError as error:
        raise ConfigError(f"{ENVIRONMENT}: {error}; a section's keys are named SECTION__KEY") from error
    except ValidationError as error:
        raise ConfigError(f"{source}:\n  {describe_invalid(error, SECRETS)}") from error


def _refuse_secrets(path: Path, values: Mapping[str, Any]) -> None:
    """What a file must not hold: it is committed, and what reads the environment alone would not know it."""
    for section, names in SECRETS.items():
        for name in names & values[section].keys() if isinstance(values.get(section), dict) else ():
            variable = f"CLOSEDLOOP_{section}__{name}".upper()
            raise ConfigError(f"{path}: {section}.{name} is a secret: set {variable} in the environment instead")


def load_settings(profile: str | None = None, *, folder: Path = CONFIG_FOLDER) -> Settings:
    """Read the settings of a profile (default: the environment's CLOSEDLOOP_PROFILE, else local).

    The root is where the real ``configs`` folder stands, so that a workspace that links to it shares the stores.

    Raises
    ------
    ConfigError
        If the profile's file is missing or a key is wrong.
    """
    name = profile or os.environ.get(PROFILE_VARIABLE, "local")
    path = folder / f"{name}.yaml"
    values = {"root": folder.resolve().parent, **read_yaml(path), "profile": name}
    _refuse_secrets(path, values)
    with _name_source(f"{path} and {ENVIRONMENT}"):
        return Settings(**values)
