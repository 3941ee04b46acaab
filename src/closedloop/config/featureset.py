"""Which features a data set has, under which definition: one answer for engine, store, training and serving."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase

from closedloop.config.dataset import DatasetConfig
from closedloop.config.params import Params
from closedloop.config.sources import FileSource
from closedloop.contract import ModelContract
from closedloop.core.evaluation.value import CustomerValue
from closedloop.core.features.windows import WindowSpec, feature_names
from closedloop.errors import ConfigError

# Raised when code changes what a feature means while its name stays: rows of both meanings must not be mixed.
DEFINITION_VERSION = 2
KINDS = ("numeric", "categorical")
ROLES = ("time", "amount", "quantity", "event_type", "since")


@dataclass(frozen=True)
class FeatureSet:
    """Names of the features in order; ``service`` carries a digest of the definition.

    ``reasons`` has the features that are summed into one reason; ``value`` what a kept customer is worth, and
    ``value_columns`` the features that say it (`list_value_columns`).
    """

    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    service: str
    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    value: CustomerValue | None = None
    value_columns: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, numeric ones first."""
        return self.numeric + self.categorical


def build_window_spec(params: Params, dataset: DatasetConfig) -> WindowSpec:
    """The windows of an ``events`` data set."""
    if dataset.label is None:
        raise ConfigError(f"{dataset.name}: a 'table' data set has no windows")
    return WindowSpec(
        event_types=tuple(dataset.event_types),
        amount_types=tuple(name for name, kind in dataset.event_types.items() if kind.has_amount),
        label_event_type=dataset.label.event_type,
        window_days=params.features.window_days,
        aggregations=params.features.aggregations,
        active_days=dataset.label.active_days,
        recency_cap_days=params.features.recency_cap_days,
        tenure_cap_days=params.features.tenure_cap_days,
    )


def list_features(params: Params, dataset: DatasetConfig) -> FeatureSet:
    """Names and definition digest of a data set's features.

    The digest covers names, types, the window definition and how the data are read, so that a view or service never
    changes its meaning.
    """
    columns = dataset.columns
    definition: dict[str, object] = {"version": DEFINITION_VERSION, "categorical": columns.categorical}
    definition |= describe_reading(dataset)
    numeric = columns.numeric
    if dataset.kind == "events":
        spec = build_window_spec(params, dataset)
        numeric = (*feature_names(spec), *columns.numeric)
        definition["windows"] = asdict(spec)
    definition["numeric"] = numeric
    digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:8]
    reasons = _list_reasons(dataset, numeric + columns.categorical)
    service, worth = f"{dataset.model_name}_{digest}", list_value_columns(params, dataset)
    return FeatureSet(numeric, columns.categorical, service, reasons, dataset.value, worth)


def list_value_columns(params: Params, dataset: DatasetConfig) -> tuple[str, ...]:
    """The features that are added up to what a kept customer is worth; none if it is a number, or not given.

    An amount of days is the sum over a window, of every event type with an amount, that the features have already.

    Raises
    ------
    ConfigError
        If there is no such window, windows have no sums, or a threshold is asked for that needs a value.
    """
    if dataset.value is None and params.model.threshold == "profit":
        raise ConfigError(f"model.threshold profit needs the section value in configs/datasets/{dataset.name}.yaml")
    kept = None if dataset.value is None else dataset.value.kept
    if kept is None or kept.number is not None:
        return ()
    if kept.column is not None:
        return (kept.column,)
    spec, place = build_window_spec(params, dataset), f"configs/datasets/{dataset.name}.yaml: value.kept.amount_of_days"
    if kept.amount_of_days not in spec.window_days:
        days = ", ".join(map(str, spec.window_days))
        raise ConfigError(f"{place}: {kept.amount_of_days} is no window; features.window_days has {days}")
    if "sum" not in spec.aggregations:
        raise ConfigError(f"{place}: needs sums over windows; add sum to features.aggregations")
    return tuple(f"{name}_sum_{kept.amount_of_days}d" for name in spec.amount_types)


def _list_reasons(dataset: DatasetConfig, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The features of each group in ``reasons``, where a ``*`` stands for any characters.

    Raises
    ------
    ConfigError
        If a name means no feature, a feature is in two groups, or a group has the name of another feature.
    """
    taken: dict[str, str] = {}
    found: dict[str, tuple[str, ...]] = {}
    for reason, patterns in dataset.reasons.items():
        place = f"configs/datasets/{dataset.name}.yaml: reasons.{reason}"
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(f"{place}: {pattern!r} is no feature; features are {', '.join(names)}")
        members = tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
        for name in members:
            if name in taken:
                raise ConfigError(f"{place}: {name} is in reasons.{taken[name]} already; a feature has one reason")
            taken[name] = reason
        if reason in names and reason not in members:
            raise ConfigError(f"{place}: is the name of a feature that is not in it; give the reason another name")
        found[reason] = members
    return found


def describe_reading(dataset: DatasetConfig) -> dict[str, object]:
    """The settings that decide which rows count and what their times and amounts mean: those that are set and apply.

    Another amount column, zone or rule of cleaning makes other values under the same names.
    """
    roles = ROLES if dataset.kind == "events" else ROLES[:1]
    columns = dataset.columns.model_dump(include=set(roles), exclude_none=True)
    cleaning = dataset.cleaning.model_dump(exclude_defaults=True)
    for rule in ("require_positive", "require_value"):
        if rule in cleaning:
            cleaning[rule] = sorted(cleaning[rule])
    zone = dataset.timezone if "time" in columns else None
    found: dict[str, object] = {"columns": columns, "cleaning": cleaning, "timezone": zone}
    found["rename"] = dataset.columns.rename
    for role, source in (("source", dataset.source), ("customers_source", dataset.customers_source)):
        if isinstance(source, FileSource):
            found[role] = source.model_dump(include={"decimal", "na_values", "time_format"}, exclude_defaults=True)
    return {key: value for key, value in found.items() if value}


def read_features(contract: ModelContract) -> FeatureSet:
    """The features of a model that was trained."""
    kinds = {kind: tuple(one.name for one in contract.features if one.kind == kind) for kind in KINDS}
    return FeatureSet(kinds["numeric"], kinds["categorical"], contract.feature_service, contract.reasons)
