"""The values that change the model (params.yaml); the environment never overrides them."""

from __future__ import annotations

import datetime as dt
import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from closedloop.config.dataset import NAME_PATTERN
from closedloop.config.invalid import describe_invalid
from closedloop.core.features.windows import AGGREGATIONS
from closedloop.core.training.model_types import MODEL_TYPES, is_model_type
from closedloop.core.training.weights import NEUTRAL, has_class_weights
from closedloop.errors import ConfigError

PARAMS_FILE = Path("params.yaml")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)


class DataParams(_Frozen):
    """Where the data are (None: as the data set's config says), and which snapshots may train and test."""

    source: str | None = None
    customers_source: str | None = None
    start_date: dt.date | None = None
    end_date: dt.date | None = None


class SimulatorParams(_Frozen):
    """Scale of the simulated shop; ``calls`` is a folder with lists of campaigns, whose customers it calls."""

    start_date: dt.date = dt.date(2023, 1, 1)
    customers: int = Field(default=24_000, ge=1, le=1_000_000)
    calls: str | None = None
    covariate_at: dt.date | None = None
    harmless_at: dt.date | None = None
    concept_at: dt.date | None = None


class FeatureParams(_Frozen):
    """Windows before a snapshot, and the aggregates of each."""

    window_days: tuple[int, ...] = (7, 30, 90)
    aggregations: tuple[str, ...] = ("count", "days", "sum", "mean")
    recency_cap_days: int = Field(default=180, ge=1)
    tenure_cap_days: int = Field(default=365, ge=1)

    @field_validator("window_days")
    @classmethod
    def _windows_are_positive(cls, days: tuple[int, ...]) -> tuple[int, ...]:
        if not days or min(days) < 1 or len(set(days)) != len(days):
            raise ValueError("must be different whole numbers of days, each at least 1")
        return days

    @field_validator("aggregations")
    @classmethod
    def _aggregations_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(names) - set(AGGREGATIONS))
        if unknown or not names:
            raise ValueError(f"unknown aggregation {', '.join(unknown)}; allowed: {', '.join(AGGREGATIONS)}")
        return names


class SplitParams(_Frozen):
    """Snapshots of each part (``events``, or tables with time), fractions elsewhere.

    ``by`` customer: a stable hash holds out a share of the customers, who never train; the newest closed snapshot, or a
    table's newest days, then trains (the others) and tests (those held out) at once. By time no training label is newer
    than the test snapshot, which is what a model of the next period meets. ``rows_max`` bounds the rows of each part;
    those of a larger one are drawn by a stable hash.
    """

    by: Literal["time", "customer"] = "time"
    rows_max: int | None = Field(default=None, ge=1_000)
    train_snapshots_max: int | None = Field(default=None, ge=1)
    validation_snapshots: int = Field(default=1, ge=1)
    test_snapshots: int = Field(default=1, ge=1)
    validation_fraction: float = Field(default=0.2, gt=0, lt=0.5)
    test_fraction: float = Field(default=0.2, gt=0, lt=0.5)


class PreprocessParams(_Frozen):
    """``normalize`` applies to linear models only; ``feature_selection`` keeps that many columns."""

    normalize: bool = True
    feature_selection: int | None = Field(default=None, ge=1)


class ModelParams(_Frozen):
    """The classifier, its hyper-parameters, and how its scores become decisions.

    ``recalibrates`` is a registered version, set by a retraining: recalibrated on the newest outcomes, it is the
    candidate in place of the trained model where it does better on validation rows; with ``recalibrates_only`` it is
    the candidate in any case.
    """

    type: str
    params: dict[str, Any] = {}
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["accuracy", "f1", "profit"] = 0.5
    calibrate: bool = True
    recalibrates: int | None = Field(default=None, ge=1)
    recalibrates_only: bool = False

    @field_validator("type")
    @classmethod
    def _type_is_known(cls, name: str) -> str:
        if not is_model_type(name):
            known = ", ".join(MODEL_TYPES)
            raise ValueError(f"must be one of {known}, or a module of one's own, such as my_types.extra_trees")
        return name

    @field_validator("params")
    @classmethod
    def _numbers_are_not_text(cls, params: dict[str, Any]) -> dict[str, Any]:
        for name, value in params.items():
            if isinstance(value, str) and _is_number(value):
                raise ValueError(f"{name} is the text {value!r}: write the number without quotes")
        return params


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _Strict(_Frozen):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Range(_Strict):
    @model_validator(mode="after")
    def _can_be_searched(self) -> Self:
        values = self.model_dump()
        if values["low"] > values["high"] or (values["log"] and values["low"] <= 0):
            raise ValueError("low must not be above high, and above 0 if log")
        if values["log"] and values["step"] != type(self).model_fields["step"].default:
            raise ValueError("step and log exclude each other")
        return self


class FloatRange(_Range):
    """A number to search, evenly or on a logarithmic scale."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False
    step: float | None = Field(default=None, gt=0)


class IntRange(_Range):
    """A whole number to search."""

    type: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: int = Field(default=1, ge=1)


class Choices(_Strict):
    """A value to choose."""

    type: Literal["categorical"]
    choices: list[str | int | float | bool | None] = Field(min_length=1)


Space = Annotated[FloatRange | IntRange | Choices, Field(discriminator="type")]


class TuningParams(_Frozen):
    """Hyper-parameter search over time folds; no trials, no search."""

    trials: int = Field(default=0, ge=0, le=10_000)
    objective: Literal["roc_auc", "log_loss"] = "log_loss"
    folds: int = Field(default=3, ge=1, le=20)
    rows_max: int = Field(default=40_000, ge=100)
    space: dict[str, dict[str, Space]] = {}


class EvaluationParams(_Frozen):
    """Resamples of the bootstrap intervals and their level."""

    bootstrap_samples: int = Field(default=1000, ge=100, le=100_000)
    level: float = Field(default=0.95, gt=0.5, lt=1)


class Params(_Frozen):
    """params.yaml, checked."""

    dataset: str = Field(pattern=NAME_PATTERN)
    as_of: dt.date
    seed: int = Field(ge=0, le=2**32 - 1)
    data: DataParams = DataParams()
    simulator: SimulatorParams = SimulatorParams()
    features: FeatureParams = FeatureParams()
    split: SplitParams = SplitParams()
    preprocess: PreprocessParams = PreprocessParams()
    model: ModelParams
    tuning: TuningParams = TuningParams()
    evaluation: EvaluationParams = EvaluationParams()

    @field_validator("as_of", mode="before")
    @classmethod
    def _as_of_is_a_date(cls, value: object) -> object:
        if isinstance(value, str) and len(value.strip()) > 10:
            raise ValueError("snapshots are UTC midnights: give a date such as 2025-01-01, without a time of day")
        return value

    @model_validator(mode="after")
    def _trials_have_a_space(self) -> Self:
        if self.tuning.trials and not self.tuning.space.get(self.model.type):
            raise ValueError(
                f"tuning.space has no hyper-parameter of {self.model.type} to search, and tuning.trials is "
                f"{self.tuning.trials}: name some, or set tuning.trials to 0"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_not_judged_by_log_loss(self) -> Self:
        tuning, searched = self.tuning, self.tuning.space.get(self.model.type, {})
        weighs = has_class_weights(self.model.params) or not NEUTRAL.keys().isdisjoint(searched)
        if tuning.trials and tuning.objective == "log_loss" and weighs:
            raise ValueError(
                "tuning.objective is log_loss, by which class_weight and scale_pos_weight always lose: the scores of a "
                "trial are calibrated only after the search; set tuning.objective to roc_auc"
            )
        return self

    @property
    def as_of_at(self) -> dt.datetime:
        """``as_of`` as the UTC midnight that it stands for."""
        return dt.datetime.combine(self.as_of, dt.time(), dt.UTC)

    def digest_md5(self) -> str:
        """MD5 of the parameters in canonical form, for the lineage (not a security digest)."""
        return hashlib.md5(self.model_dump_json().encode(), usedforsecurity=False).hexdigest()


def parse_params(values: dict[str, Any], place: str) -> Params:
    """Check parameters; ``place`` names them in errors.

    Raises
    ------
    ConfigError
        Naming each wrong key, its rule and what was found.
    """
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{place}:\n  {describe_invalid(error)}") from error


def merge_values(base: dict[str, Any], *overrides: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings merged key by key, the later ones winning; nothing is mutated.

    >>> merge_values({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
    {'a': {'b': 1, 'c': 3}}
    """
    merged = dict(base)
    for override in overrides:
        for key, value in override.items():
            old = merged.get(key)
            merged[key] = merge_values(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
