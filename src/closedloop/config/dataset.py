"""The data set config: new data are described by roles in one YAML file, without code."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from closedloop.config.invalid import describe_invalid
from closedloop.config.sources import DataSource, FileSource, SimulatorSource, SqlSource
from closedloop.config.yaml import read_yaml
from closedloop.core.evaluation.limits import GateLimits
from closedloop.core.evaluation.value import CustomerValue
from closedloop.errors import ConfigError
from closedloop.files import names_table
from closedloop.rules import normalise_code

CONFIG_FOLDER = Path("configs/datasets")
NAME_PATTERN = r"^[a-z][a-z0-9_]{0,47}$"  # safe as a folder, a Feast project, a URL part and an SQL identifier

# columns of our own beside the features, from the canonical tables to the monitor's samples
RESERVED = frozenset(
    {
        *("customer_id", "event_timestamp", "churned", "part", "sensitive_group", "row_weight"),
        *("score", "decision", "outcome", "__row"),
    }
)
RENAME_ADVICE = "give the column another name with columns.rename: {its name in the source: a name}"
ROW_NUMBER = "row_number"
# Names of features become names in Feast, DuckDB, MLflow and pages: this is what all of them take.
COLUMN_RULE = "up to 100 letters, digits, spaces and _ - . / % & + ( ), the first one a letter, digit or _"
COLUMN_PATTERN = re.compile(r"\w(?:[\w \-./%&+()]{0,98}[\w\-./%&+()])?")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)


def _list_values(value: object) -> object:
    return value if isinstance(value, list | tuple) else (value,)


Values = Annotated[tuple[str, ...], BeforeValidator(_list_values), Field(min_length=1)]


class LabelColumn(_Frozen):
    """The label of a ``table`` data set: its column and its two values, each a text or a list of texts."""

    column: str
    churned: Values
    stayed: Values

    @model_validator(mode="after")
    def _values_differ(self) -> LabelColumn:
        both = {normalise_code(name) for name in self.churned} & {normalise_code(name) for name in self.stayed}
        if None in {normalise_code(name) for name in (*self.churned, *self.stayed)}:
            raise ValueError("a blank cell is no value: a row without a label says neither (cleaning.require_value)")
        if both:
            raise ValueError(f"{', '.join(map(repr, both))} means churned and stayed: a value can mean one of them")
        return self


class Columns(_Frozen):
    """Which column plays which role; roles that a data set does not have are left out.

    ``rename`` gives columns of the source the names that stand here; ``entity_id: row_number`` numbers the rows.
    """

    rename: dict[str, str] = {}
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

    @model_validator(mode="before")
    @classmethod
    def _there_is_an_id(cls, values: Any) -> Any:
        if isinstance(values, dict) and "entity_id" not in values:
            raise ValueError(
                "entity_id is required: the column with the customer's id; a 'table' without ids takes "
                f"entity_id: {ROW_NUMBER}, which numbers its rows"
            )
        return values

    @model_validator(mode="after")
    def _names_are_taken_once(self) -> Columns:
        roles = {self.entity_id: "the customer's id (columns.entity_id)"}
        roles |= {self.time: "the time (columns.time)"} if self.time else {}
        roles |= {self.label.column: "the label (columns.label.column), the answer itself"} if self.label else {}
        described = [*self.attributes, *(name for name in (self.sensitive, self.since) if name is not None)]
        for name in self.attributes:
            if name in roles or name == self.since:
                raise ValueError(f"{name!r} is {roles.get(name, 'columns.since')}: take it out of the features")
        for name in described:
            if name.casefold() in RESERVED:
                raise ValueError(f"{name!r} is the name of a column of our own: {RENAME_ADVICE}")
            if COLUMN_PATTERN.fullmatch(name) is None:
                raise ValueError(f"{name!r:.120}: a name is {COLUMN_RULE}; {RENAME_ADVICE}")
        if self.sensitive in self.attributes or len(set(self.attributes)) < len(self.attributes):
            raise ValueError("a column may be numeric, categorical or sensitive, once; a sensitive one is no feature")
        alike = [name for name in described if [one.casefold() for one in described].count(name.casefold()) > 1]
        if alike:
            raise ValueError(f"{' and '.join(map(repr, alike))} differ in case alone: {RENAME_ADVICE}")
        return self


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
    require_value: tuple[str, ...] = ()


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
    source: DataSource
    customers_source: FileSource | SqlSource | None = None
    timezone: str | None = None
    columns: Columns
    event_types: dict[str, EventType] = {}
    cleaning: Cleaning = Cleaning()
    label: LabelRule | None = None
    feature_max_age_days: int = Field(default=31, ge=1)
    reasons: dict[str, Values] = {}
    expectations: tuple[ExpectationConfig, ...]
    gates: GateLimits = GateLimits()
    value: CustomerValue | None = None
    params: dict[str, Any] = {}

    @property
    def horizon_days(self) -> int | None:
        """After how many days the label rule tells what a customer did; None without one."""
        return self.label.horizon_days if self.label else None

    def with_accuracy_min(self, accuracy_min: float) -> DatasetConfig:
        """The config with another minimum accuracy."""
        return self.model_copy(update={"gates": self.gates.model_copy(update={"accuracy_min": accuracy_min})})

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
        return self

    @model_validator(mode="after")
    def _event_types_make_names(self) -> DatasetConfig:
        for name in self.event_types:
            if COLUMN_PATTERN.fullmatch(name) is None:
                raise ValueError(f"event_types {name!r:.120}: features are called by it; a name is {COLUMN_RULE}")
        if self.kind == "events" and self.columns.entity_id == ROW_NUMBER:
            raise ValueError(f"columns.entity_id: an 'events' data set needs its customers' ids, not {ROW_NUMBER}")
        return self

    @model_validator(mode="after")
    def _value_can_be_read(self) -> DatasetConfig:
        kept = None if self.value is None else self.value.kept
        if kept is None:
            return self
        if kept.column is not None and kept.column not in self.columns.numeric:
            names = ", ".join(self.columns.numeric) or "none"
            raise ValueError(f"value.kept.column {kept.column!r} is no numeric attribute; columns.numeric has {names}")
        if kept.amount_of_days is not None and not any(kind.has_amount for kind in self.event_types.values()):
            raise ValueError(
                "value.kept.amount_of_days needs an event type with has_amount: true; event_types has none"
            )
        return self


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
    require_own_model_name(config, path)
    return config


def choose_name(source: str) -> str:
    """A data set's name for a file, folder, pattern or table.

    >>> choose_name("data/Kündigungen 2024.csv.gz"), choose_name("SHOP_DATABASE#public.orders"), choose_name("2024.csv")
    ('kundigungen_2024', 'orders', 'data_2024')
    """
    is_table = names_table(source)
    last = source.rsplit("#", 1)[-1].rsplit(".", 1)[-1] if is_table else Path(source).name.split(".")[0]
    plain = unicodedata.normalize("NFKD", last).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "_", plain).strip("_")[:40].strip("_")
    return name if name[:1].isalpha() else f"data_{name}".rstrip("_")


def require_own_model_name(config: DatasetConfig, path: Path) -> None:
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
