"""The days that a model's figures are of, and the figures of the same recipe a horizon later."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Mapping
from typing import Any, Literal

import pandas as pd

from closedloop.config.dataset import DatasetConfig
from closedloop.config.featureset import FeatureSet
from closedloop.config.params import Params
from closedloop.core.evaluation.metrics import measure_classification
from closedloop.core.training.estimators import score
from closedloop.core.training.splits import split_held_out, split_held_out_days
from closedloop.errors import count_noun
from closedloop.stages.parts.challengers import CLASS_ROWS_MIN, list_recent
from closedloop.stages.parts.fitting import Fitted, fit

logger = logging.getLogger(__name__)
Period = Literal["today", "next period", "no time"]


def name_period(params: Params, dataset: DatasetConfig) -> Period:
    """The days that the test rows stand for.

    ``today``: customers who were held out, at the newest snapshot, on which the others train. ``next period``: no
    training label is newer than the test rows, as in service until the next model.
    """
    if dataset.columns.time is None:
        return "no time"
    return "today" if params.split.by == "customer" else "next period"


def measure_next_period(
    params: Params, dataset: DatasetConfig, feature_set: FeatureSet, fitted: Fitted, rows: Mapping[str, pd.DataFrame]
) -> dict[str, Any]:
    """Train the recipe of ``fitted`` once more, on what was known a horizon before the test rows, and test it on them.

    The hyper-parameters stay, without another search. Other customers than those who train calibrate it.

    Returns
    -------
    dict
        ``judged``: what the test rows stand for (`name_period`); ``figures``, the training ``rows`` and the newest day
        ``until`` of their snapshots, or ``why`` there are none.
    """
    judged = name_period(params, dataset)
    if judged != "today":
        return {"judged": judged, "why": "the model was judged on no rows of today"}
    return {"judged": judged, **_measure_earlier(params, dataset, feature_set, fitted, rows)}


def _measure_earlier(
    params: Params, dataset: DatasetConfig, feature_set: FeatureSet, fitted: Fitted, rows: Mapping[str, pd.DataFrame]
) -> dict[str, Any]:
    if fitted.kind.startswith("recalibration"):
        return {"why": f"a {fitted.kind} has no recipe of its own"}
    earlier = split_earlier(params, dataset, rows["train"], first_test=rows["test"]["event_timestamp"].min())
    if fitted.recent_share and (recent := list_recent(earlier["train"], fitted.recent_share)) is not None:
        earlier["train"] = recent
    for part, some in earlier.items():
        churned = int(some["churned"].sum())
        if min(churned, len(some) - churned) < CLASS_ROWS_MIN:
            few = f"fewer than {count_noun(CLASS_ROWS_MIN, 'row')} of a class"
            return {"why": f"a horizon before, {part} has {few}"}
    logger.info("fitting once more as of a horizon before, rows: %d", len(earlier["train"]))
    before = fit(params, feature_set, fitted.hyper_parameters, earlier)
    labels, scores = rows["test"]["churned"].to_numpy(), score(before.pipeline, rows["test"])
    figures = measure_classification(labels, scores, before.threshold)
    until = earlier["train"]["event_timestamp"].max()
    return {"figures": figures, "rows": len(earlier["train"]), "until": f"{until:%Y-%m-%d}"}


def split_earlier(
    params: Params, dataset: DatasetConfig, train: pd.DataFrame, *, first_test: pd.Timestamp
) -> dict[str, pd.DataFrame]:
    """Training rows whose label was known at ``first_test``, as ``train`` and ``validation`` of other customers."""
    horizon = dt.timedelta(days=dataset.horizon_days or 1)
    known = train[train["event_timestamp"] + horizon <= first_test]
    chosen: dict[str, Any] = {
        "fractions": {"test": 0.0, "validation": params.split.validation_fraction},
        "salt": f"{params.seed} a horizon before",  # another than that by which these customers were chosen to train
    }
    if dataset.label is None:
        newest = params.split.test_fraction
        parts = split_held_out_days(known["customer_id"], known["event_timestamp"], newest=newest, **chosen)
    else:
        counts = {name: getattr(params.split, name) for name in ("validation_snapshots", "train_snapshots_max")}
        parts = split_held_out(known["customer_id"], known["event_timestamp"], **chosen, **counts)
    return {part: known[parts == part] for part in ("train", "validation")}
