"""Addresses of services and limits of this process: command line, environment, configs/<profile>.yaml, defaults."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from closedloop.config.invalid import describe_invalid
from closedloop.config.yaml import read_yaml
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.core.release.policy import ReleasePolicy
from closedloop.errors import ConfigError
from closedloop.files import locate_sqlite

PROFILE_VARIABLE = "CLOSEDLOOP_PROFILE"
CONFIG_FOLDER = Path("configs")
ENVIRONMENT = "the environment (CLOSEDLOOP_*)"
WEBHOOK_KEY_BYTES_MIN = 24
TOKEN = re.compile(r"[!-~]+")
SECRETS = {
    "serving": {"tokens", "id_key"},
    "release": {"journal_key"},
    "stream": {"properties"},
    "retraining": {"token"},
    "webhook": {"secret"},
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class DataSettings(_Section):
    """DVC's remote, a bucket or folder; `make data-remote` writes it to DVC's config."""

    remote: str = ""


class TrackingSettings(_Section):
    """MLflow: its store, and the folder or bucket of its artifacts."""

    uri: str = "sqlite:///mlflow.db"
    artifacts: str = "state/mlflow"
    wandb: bool = False


class FeatureStoreSettings(_Section):
    """``overrides`` of ``feature_repo/feature_store.yaml``, in Feast's keys; ``offline``: folder of published rows."""

    offline: str = "state/feast/offline"
    overrides: dict[str, Any] = {}


class EngineSettings(_Section):
    """The engine that computes features, labels and the training set's join, and scores batches: DuckDB here, or Spark.

    DuckDB spills to ``temp_directory`` beyond its ``memory_limit``. ``threads`` are DuckDB's, those that score, or
    Spark's queries side by side.
    """

    kind: Literal["duckdb", "spark"] = "duckdb"
    memory_limit: str = Field(default="2GB", pattern=r"^\d+(\.\d+)?\s?[KMG]i?B$")
    threads: int = Field(default=2, ge=1, le=1024)
    temp_directory: str = "state/duckdb"


class SparkSettings(_Section):
    """The cluster for ``engine.kind: spark``, as Spark names it; its machines see the project under the same path.

    ``properties`` are Spark's own, such as ``spark.executor.memory``; one that is a secret belongs in the environment.
    """

    master: str = Field(default="local[*]", min_length=1)
    properties: dict[str, str] = Field(default={}, repr=False)


JOURNAL_KEY_LENGTH_MIN = 32
# These texts become arguments of kubectl, so allow only names of Kubernetes.
ResourceName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,250}[a-z0-9])?$")]


class IstioSettings(_Section):
    """The VirtualService whose route to these two subsets gets the weights of the release."""

    virtual_service: ResourceName = "closedloop"
    namespace: ResourceName = "default"
    stable: str = "stable"
    canary: str = "canary"


class GatewaySettings(_Section):
    """The HTTPRoute of the Gateway API whose rule for these two Services gets the weights of the release."""

    http_route: ResourceName = "closedloop"
    namespace: ResourceName = "default"
    stable: ResourceName = "serving-stable"
    canary: ResourceName = "serving-canary"


class ReleaseSettings(ReleasePolicy):
    """How a version is released: the policy, the component that splits traffic, and the source of error counts.

    ``auto_promote``: a version that won offline becomes champion at once; production releases by evidence instead.
    ``journal_key`` (environment only) signs the journal's entries. It may hold several keys with commas between them,
    the newest first: the first key signs, and the older ones verify earlier entries.
    """

    auto_promote: bool = False
    journal_key: str = Field(default="", repr=False)
    traffic: Literal["row", "istio", "gateway"] = "row"
    prometheus: str = ""
    prometheus_matchers: str = ""
    istio: IstioSettings = IstioSettings()
    gateway: GatewaySettings = GatewaySettings()

    def list_journal_keys(self) -> tuple[bytes, ...]:
        """The keys of ``journal_key``, the newest first."""
        return tuple(key.encode() for key in self.journal_key.split(",") if key)

    @field_validator("journal_key")
    @classmethod
    def _require_long_journal_keys(cls, keys: str) -> str:
        if keys and any(len(key) < JOURNAL_KEY_LENGTH_MIN for key in keys.split(",")):
            raise ValueError(f"each key has at least {JOURNAL_KEY_LENGTH_MIN} characters, as of `openssl rand -hex 32`")
        return keys

    @model_validator(mode="after")
    def _require_prometheus_for_a_proxy(self) -> ReleaseSettings:
        if self.traffic != "row" and not self.prometheus:
            raise ValueError(
                f"release.traffic {self.traffic} needs release.prometheus: errors are those of two services"
            )
        return self


class OperationsSettings(_Section):
    """The operations store: predictions, outcomes, journal and deployment row. A password belongs in the environment.

    ``connections_max``: connections that a process opens to it at once; some commands write while they read.
    """

    url: str = "sqlite:///state/operations.db"
    connections_max: int = Field(default=5, ge=2)
    predictions_keep_days: int = Field(default=400, ge=1)


class ServingSettings(_Section):
    """The service's addresses and limits.

    ``tokens`` (environment only) is ``{token: [scope, ...]}`` with the scopes predict, outcomes and admin; without
    any, requests need none. ``id_key`` (environment only) seals prediction ids, and all replicas share it; without it
    the service makes a key in its state folder. ``slot``: the slot of the deployment row that this service answers
    with; the canary's own service behind a proxy takes ``challenger``. ``range_margin``: a numeric feature may leave
    its range in training by this many widths of that range. ``drain_seconds_max``: answer only while the operations
    store could take all spooled records within this time; set it if the state folder is deleted with its pod.
    ``count_sent_features``: releases and the monitor also count requests that carry their features. Clients can then
    influence the measurements.
    """

    host: str = "127.0.0.1"
    slot: Literal["champion", "challenger"] = "champion"
    port: int = Field(default=3000, ge=0, le=65535)
    metrics_port: int = Field(default=8001, ge=0, le=65535)
    workers: int = Field(default=1, ge=1, le=64)
    state: str = "state/serving"
    tokens: dict[str, tuple[Literal["predict", "outcomes", "admin"], ...]] = Field(default={}, repr=False, exclude=True)
    id_key: str = Field(default="", repr=False, exclude=True, max_length=64)
    body_bytes_max: int = Field(default=1_000_000, ge=1_000)
    batch_items_max: int = Field(default=1_000, ge=1)
    queue_max: int = Field(default=512, ge=1)
    outcomes_per_minute: int = Field(default=6_000, ge=1)
    range_margin: float = Field(default=1.0, ge=0)
    count_sent_features: bool = False
    access_log: bool = False
    fsync_before_answer: bool = False
    fsync_every_ms: int = Field(default=50, ge=1, le=50)
    spool_segment_bytes: int = Field(default=16_000_000, ge=10_000)
    spool_bytes_max: int | None = Field(default=None, ge=1)
    drain_seconds_max: float | None = Field(default=None, gt=0)
    disk_free_bytes_min: int = Field(default=50_000_000, ge=0)

    @field_validator("tokens")
    @classmethod
    def _require_usable_tokens(cls, tokens: dict[str, Any]) -> dict[str, Any]:
        # refuse an empty token, which a template without its secret leaves: every request would have its scopes
        if not all(TOKEN.fullmatch(token) for token in tokens):
            raise ValueError("a token must be one or more ASCII characters without spaces")
        return tokens


class ExporterSettings(_Section):
    """The address at which Prometheus scrapes the loop's metrics."""

    host: str = "127.0.0.1"
    port: int = Field(default=8002, ge=0, le=65535)


class MetricsSettings(_Section):
    """All pages for Prometheus; ``aliases``: also show each metric as it was named before ``closedloop_``."""

    aliases: bool = True


class StreamSettings(_Section):
    """The Kafka worker; ``{model_name}`` in a topic or group stands for the data set's model name.

    ``properties`` (environment only, JSON) are properties of librdkafka, such as the brokers' credentials.
    """

    brokers: str = "127.0.0.1:9092"
    input_topic: str = "{model_name}.requests"
    output_topic: str = "{model_name}.predictions"
    dead_letter_topic: str = "{model_name}.dead"
    group: str = "{model_name}"
    batch_size: int = Field(default=500, ge=1, le=1000)
    properties: dict[str, str] = Field(default={}, repr=False, exclude=True)

    def name_topics(self, model_name: str) -> StreamSettings:
        """The settings with this data set's topics and group."""
        named = {key: text.format(model_name=model_name) for key, text in self if isinstance(text, str)}
        return self.model_copy(update=named)

    @model_validator(mode="after")
    def _require_distinct_topics(self) -> StreamSettings:
        if len({self.input_topic, self.output_topic, self.dead_letter_topic}) < 3:
            raise ValueError("input_topic, output_topic and dead_letter_topic must differ: answers would be read again")
        return self


class RetrainingSettings(_Section):
    """Where retrainings run: as processes here (``local``), or on a cluster's Kubeflow Pipelines at ``endpoint``.

    Without a start date a retraining takes the last ``window_days`` of snapshots with closed labels (None: as many as
    `closedloop run`), split by ``split`` (`closedloop.config.params.SplitParams`). On a cluster every
    pod runs ``base_image`` with the variables of ``environment``, and with the keys ``secret_keys`` of the Kubernetes
    Secret ``secret``; it requests ``cpu_request`` and ``memory_request`` (empty: the cluster's
    default). ``token`` (environment only) is the endpoint's bearer token.
    """

    runner: Literal["local", "cluster"] = "local"
    window_days: int | None = Field(default=None, ge=1)
    split: Literal["time", "customer"] = "customer"
    state: str = "state/retraining"
    endpoint: str = ""
    token: str = Field(default="", repr=False)
    namespace: str = "kubeflow"
    service_account: str = ""
    base_image: str = "closedloop/jobs-python:latest"
    environment: dict[str, str] = {"CLOSEDLOOP_PROFILE": "production"}
    secret: str = ""
    secret_keys: tuple[str, ...] = ()
    cpu_request: str = Field(default="", pattern=r"^(\d+m?|\d*\.\d+)?$")
    memory_request: str = Field(default="", pattern=r"^(\d+([KMGTPE]i?)?)?$")
    timeout_seconds: int = Field(default=6 * 3600, ge=1)

    @model_validator(mode="after")
    def _require_endpoint_for_cluster(self) -> RetrainingSettings:
        if self.runner == "cluster" and not self.endpoint:
            raise ValueError("runner 'cluster' needs the address of Kubeflow Pipelines: endpoint")
        return self


class MonitoringSettings(MonitoringPolicy):
    """The monitor's policy; with ``retrain`` the monitor itself runs a retraining that is due."""

    retrain: bool = False
    reports: str = "state/monitoring"


class WebhookSettings(_Section):
    """Where verdicts, refusals of gates and releases are told; ``secret`` (environment only) signs them."""

    url: str = Field(default="", pattern=r"^(https?://\S+)?$")
    secret: str = Field(default="", repr=False)

    @model_validator(mode="after")
    def _require_secret(self) -> WebhookSettings:
        prefix, _, key = self.secret.rpartition("_")
        try:
            usable = prefix == "whsec" and len(base64.b64decode(key, validate=True)) >= WEBHOOK_KEY_BYTES_MIN
        except ValueError:
            usable = False
        if not usable and (self.url or self.secret):
            raise ValueError("webhook.url needs webhook.secret: whsec_ and what `openssl rand -base64 32` prints")
        return self


class _Environment(EnvSettingsSource):
    """The environment without the profile: an argument may override that, and it is known before its file is read.

    JSON in which a name stands twice is refused, as in every YAML file.
    """

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:  # noqa: ARG002
        from closedloop.rules import read_object  # with numpy, which most commands do without

        return json.loads(value, object_pairs_hook=read_object)

    def __call__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__call__().items() if name != "profile"}


class _FromEnvironment(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="CLOSEDLOOP_", env_nested_delimiter="__", frozen=True)

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


class Settings(_FromEnvironment):
    """All settings, resolved; relative paths are relative to ``root``."""

    model_config = SettingsConfigDict(extra="forbid")

    profile: Literal["local", "production"] = "local"
    root: Path = Path()
    data: DataSettings = DataSettings()
    tracking: TrackingSettings = TrackingSettings()
    features: FeatureStoreSettings = FeatureStoreSettings()
    engine: EngineSettings = EngineSettings()
    spark: SparkSettings = SparkSettings()
    release: ReleaseSettings = ReleaseSettings()
    operations: OperationsSettings = OperationsSettings()
    serving: ServingSettings = ServingSettings()
    exporter: ExporterSettings = ExporterSettings()
    metrics: MetricsSettings = MetricsSettings()
    stream: StreamSettings = StreamSettings()
    monitoring: MonitoringSettings = MonitoringSettings()
    retraining: RetrainingSettings = RetrainingSettings()
    webhook: WebhookSettings = WebhookSettings()

    @model_validator(mode="after")
    def _refuse_auto_promote_in_production(self) -> Settings:
        if self.profile == "production" and self.release.auto_promote:
            raise ValueError("release.auto_promote is refused in production: a champion is released by canary")
        return self

    def locate(self, path: str) -> Path:
        """A path of the settings as an absolute path."""
        return (self.root / path).resolve()

    def locate_url(self, url: str) -> str:
        """A database address with a relative SQLite file made absolute; any other is returned as it is."""
        return locate_sqlite(url, self.root)


class _ServingEnvironment(_FromEnvironment):
    """Only the service's section: an error in another section must not stop a process that only answers."""

    serving: ServingSettings = ServingSettings()


class _StreamEnvironment(_FromEnvironment):
    stream: StreamSettings = StreamSettings()


def read_serving_environment() -> ServingSettings:
    """Read the service's settings from the environment alone, which has the secrets.

    Raises
    ------
    ConfigError
        If a key is wrong.
    """
    with _name_source(ENVIRONMENT):
        return _ServingEnvironment().serving


def read_stream_environment() -> StreamSettings:
    """As `read_serving_environment`, of the Kafka worker."""
    with _name_source(ENVIRONMENT):
        return _StreamEnvironment().stream


@contextmanager
def _name_source(source: str) -> Iterator[None]:
    """Turn pydantic's errors into a `ConfigError` that names the source of the wrong values and shows no secret."""
    try:
        yield
    except SettingsError as error:
        rule = "it must be JSON in which no object has a name twice; a section's keys are named SECTION__KEY"
        raise ConfigError(f"{ENVIRONMENT}: {error}: {rule}") from error
    except ValidationError as error:
        raise ConfigError(f"{source}:\n  {describe_invalid(error, SECRETS)}") from error


def _refuse_secrets(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse secrets in a file: files are committed, and some processes read only the environment."""
    for section, names in SECRETS.items():
        for name in names & values[section].keys() if isinstance(values.get(section), dict) else ():
            variable = f"CLOSEDLOOP_{section}__{name}".upper()
            raise ConfigError(f"{path}: {section}.{name} is a secret: set {variable} in the environment instead")


def load_settings(profile: str | None = None, *, folder: Path = CONFIG_FOLDER) -> Settings:
    """Read the settings of a profile (default: the environment's CLOSEDLOOP_PROFILE, else local).

    The root is the parent of the real ``configs`` folder, so a workspace that links to it shares the project's stores.

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
