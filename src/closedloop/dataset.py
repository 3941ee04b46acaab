"""The data set config: new data are described by roles in one YAML file, without code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from closedloop.core.limits import GateLimits
from closedloop.errors import ConfigError, hide_passwords

CONFIG_FOLDER = Path("configs/datasets")
NAME_PATTERN = r"^[a-z][a-z0-9_]{0,47}$"  # safe as a folder, a Feast project, a URL part and an SQL identifier


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)


class SimulatorSource(_Frozen):
    """The built-in shop; its scale and seed stand in params.yaml."""

    type: Literal["simulator"]


class FileSource(_Frozen):
    """CSV or Parquet: a file, a folder (every file in it) or a glob pattern; ``data.source`` in params wins."""

    type: Literal["csv", "parquet"]
    path: str | None = None
    encoding: str = "utf-8"
    delimiter: str = ","


class SqlSource(_Frozen):
    """A query; the database's address is a secret and comes from the environment variable named here."""

    type: Literal["sql"]
    url_variable: str
    query: str


Source = Annotated[SimulatorSource | FileSource | SqlSource, Field(discriminator="type")]


class LabelColumn(_Frozen):
    """The label of a ``table`` data set: its column and its two values."""

    column: str
    churned: str
    stayed: str


class Columns(_Frozen):
    """Which column plays which role; roles that a data set does not have are left out."""

    entity_id: str
    time: str | None = None
    amount: str | None = None
    quantity: str | None = None
    event_type: str | None = None
    since: str | None = None
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    sensitive: str | None = None
    label: LabelColumn | None = None

    @property
    def attributes(self) -> tuple[str, ...]:
        """Columns that are features as they are."""
        return self.numeric + self.categorical


# columns of our own beside the features, from the canonical tables to the monitor's samples
RESERVED = frozenset(
    {"customer_id", "event_timestamp", "churned", "part", "sensitive_group", "score", "decision", "outcome", "__row"}
)


class EventType(_Frozen):
    """One kind of event in the log."""

    has_amount: bool = False


class Cancellation(_Frozen):
    """A line that takes a purchase back: ``column`` begins with ``prefix``."""

    column: str
    prefix: str


class Cleaning(_Frozen):
    """Which lines are dropped; each dropped line is kept with its reasons in ``dropped.parquet``."""

    drop_missing_id: bool = True
    drop_duplicates: bool = False
    cancellation: Cancellation | None = None
    require_positive: tuple[str, ...] = ()


class LabelRule(_Frozen):
    """Churned: no ``event_type`` in the ``horizon_days`` from a snapshot, among those active in ``active_days`` before.

    ``warmup_days`` of history come before the first snapshot, since windows are truncated there.
    """

    event_type: str
    horizon_days: int = Field(ge=1, le=3650)
    active_days: int = Field(ge=1, le=3650)
    snapshot_every_days: int = Field(ge=1, le=3650)
    warmup_days: int = Field(default=90, ge=0, le=3650)


class ExpectationConfig(_Frozen):
    """One Great Expectations expectation: its own ``type`` and keyword arguments, on one of our tables."""

    table: Literal["customers", "events", "days", "freshness"]
    type: str = Field(pattern=r"^expect_[a-z_]+$")
    severity: Literal["critical", "warning"] = "critical"
    kwargs: dict[str, Any] = {}


class DatasetConfig(_Frozen):
    """One data set (``configs/datasets/<name>.yaml``)."""

    name: str = Field(pattern=NAME_PATTERN)
    model_name: str = Field(pattern=NAME_PATTERN)
    description: str
    kind: Literal["events", "table"]
    source: Source
    customers_source: FileSource | SqlSource | None = None
    timezone: str | None = None
    columns: Columns
    event_types: dict[str, EventType] = {}
    cleaning: Cleaning = Cleaning()
    label: LabelRule | None = None
    feature_max_age_days: int = Field(default=31, ge=1)
    expectations: tuple[ExpectationConfig, ...]
    gates: GateLimits = GateLimits()
    params: dict[str, Any] = {}

    @field_validator("timezone")
    @classmethod
    def _timezone_exists(cls, name: str | None) -> str | None:
        if name is not None:
            try:
                ZoneInfo(name)
            except (ZoneInfoNotFoundError, ValueError) as error:
                raise ValueError(f"{name!r} is not an IANA time zone such as Europe/London") from error
        return name

    @model_validator(mode="after")
    def _roles_fit_the_kind(self) -> DatasetConfig:
        if self.kind == "events":
            if self.label is None or self.columns.time is None or not self.event_types:
                raise ValueError("an 'events' data set needs label, columns.time and event_types")
            if len({name.casefold() for name in self.event_types}) < len(self.event_types):
                raise ValueError("event_types must differ in more than case: their names become columns")
            if self.label.event_type not in self.event_types:
                raise ValueError(f"label.event_type {self.label.event_type!r} is not one of event_types")
            if self.columns.event_type is None and len(self.event_types) != 1:
                raise ValueError("without columns.event_type there must be exactly one event type")
            if self.columns.amount is None and any(kind.has_amount for kind in self.event_types.values()):
                raise ValueError("an event type has an amount, but columns.amount is not given")
            described = self.columns.attributes or self.columns.sensitive or self.columns.since
            if described and self.customers_source is None and not isinstance(self.source, SimulatorSource):
                raise ValueError("numeric, categorical, sensitive and since are columns of customers_source: name it")
            if self.columns.label is not None:
                raise ValueError(
                    "columns.label is for 'table' data sets; here the label is computed, by the rule label"
                )
        elif isinstance(self.source, SimulatorSource) or self.customers_source is not None or self.label is not None:
            raise ValueError("a 'table' data set has one file or query, and its label is the column in columns.label")
        elif self.columns.label is None or not self.columns.attributes:
            raise ValueError("a 'table' data set needs columns.label and numeric or categorical columns")
        if self.kind == "table" and any(one.table != "customers" for one in self.expectations):
            raise ValueError("a 'table' data set has expectations of the table customers alone: it has no other")
        columns = self.columns
        taken = RESERVED | {name for name in (columns.entity_id, columns.time, columns.since) if name}
        taken |= {columns.label.column} if columns.label else set()
        for name in columns.attributes:
            if name in taken or name.casefold() in RESERVED:
                raise ValueError(f"numeric or categorical {name!r}: the name is taken; rename the column in the source")
        if columns.sensitive in columns.attributes or len(set(columns.attributes)) < len(columns.attributes):
            raise ValueError("a column may be numeric, categorical or sensitive, once; a sensitive one is no feature")
        return self


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises
    ------
    ConfigError
        If the file is missing, is not UTF-8, is not YAML or is not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file") from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a date such as 2025-13-01
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values, found {type(content).__name__}")
    return content


def describe_invalid(error: ValidationError, secrets: Mapping[str, Collection[str]] | None = None) -> str:
    """Say every wrong key of a config in one line each: the place, the rule and what was found.

    Of ``secrets``, names of keys by section, nothing is shown: not what was found, nor what stands below.
    """
    lines = []
    for problem in error.errors():
        section, *keys = problem["loc"] or ("",)
        hidden = (secrets or {}).get(str(section), ())
        secret = bool(hidden) and (not keys or keys[0] in hidden)
        place = ".".join(str(part) for part in problem["loc"][: 2 if secret else None]) or "the file"
        shown = problem["loc"] and problem["type"] not in ("missing", "extra_forbidden") and not secret
        found = f", found {hide_passwords(repr(problem['input'])):.80}" if shown else ""
        rule = {"extra_forbidden": "unknown key", "missing": "is required"}.get(problem["type"], problem["msg"])
        lines.append(f"{place}: {rule}{found}")
    return "\n  ".join(lines)


def load_dataset(name: str, folder: Path = CONFIG_FOLDER) -> DatasetConfig:
    """Read and check ``<folder>/<name>.yaml``.

    Raises
    ------
    ConfigError
        If there is no such config, or a key in it is wrong.
    """
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in folder.glob("*.yaml"))) or "none"
        raise ConfigError(f"dataset {name!r}: {path} does not exist; data sets here: {known}")
    try:
        config = DatasetConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}:\n  {describe_invalid(error)}") from error
    if config.name != name:
        raise ConfigError(f"{path}: name is {config.name!r}, but the file is called {name!r}")
    _require_own_model_name(config, path)
    return config


def _require_own_model_name(config: DatasetConfig, path: Path) -> None:
    """Everything in the stores is keyed by the model name: a copied config that kept it would meet its original."""
    for other in sorted(path.parent.glob("*.yaml")):
        if other == path:
            continue
        try:
            taken = read_yaml(other).get("model_name")
        except ConfigError:
            continue  # another data set's broken config is not this one's trouble
        if taken == config.model_name:
            raise ConfigError(f"{path}: model_name {taken!r} belongs to {other.name}; each data set needs its own")
