"""The YAML of `closedloop attach`: a model that somebody else serves, and where its predictions are."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from closedloop.config.dataset import NAME_PATTERN, LabelColumn
from closedloop.config.invalid import describe_invalid
from closedloop.config.yaml import read_yaml
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.errors import ConfigError


class AttachedModel(BaseModel):
    """A model to watch.

    Attributes
    ----------
    reference, window
        A CSV or Parquet file, or a database's table as ``VARIABLE#table``. The reference has rows that the model was
        not trained on, with their scores and labels; the window has new ones, whose labels may be blank or left out.
    score, label
        The column of the probability of churn, and that of what happened.
    customer_id
        The column of the customer, if there is one.
    numeric, categorical
        The features; both left out, every other column is one, by what it holds.
    threshold
        From which score on the model says that a customer churns.
    trained
        The day of the model, if age is to be judged.
    policy
        As the settings section ``monitoring``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME_PATTERN)
    reference: str
    window: str
    score: str
    label: LabelColumn
    customer_id: str | None = None
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    threshold: float = Field(default=0.5, gt=0, lt=1)
    trained: dt.date | None = None
    policy: MonitoringPolicy = MonitoringPolicy()


def load_attached(path: Path) -> AttachedModel:
    """Read and check the file.

    Raises
    ------
    ConfigError
        If a key is wrong.
    """
    try:
        return AttachedModel.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}:\n  {describe_invalid(error)}") from error
