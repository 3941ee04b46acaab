"""Fit a pipeline on train rows; calibrate it and choose its threshold on validation rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from closedloop.config.featureset import FeatureSet
from closedloop.config.params import Params
from closedloop.contract import Feature

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline


@dataclass(frozen=True)
class Fitted:
    """A fitted pipeline with the choices made while fitting.

    ``recent_share``: it was trained on the newest snapshots, one in so many; 0: on all.
    """

    pipeline: Pipeline
    uncalibrated: Pipeline
    features: tuple[Feature, ...]
    calibration: str
    threshold: float
    hyper_parameters: dict[str, Any]
    kind: str = "training"
    recent_share: int = 0


def build_unfitted(
    params: Params, feature_set: FeatureSet, hyper_parameters: dict[str, Any], rows: pd.DataFrame
) -> tuple[Pipeline, tuple[Feature, ...]]:
    """The pipeline for these rows, and the features that it takes."""
    from closedloop.core.training.estimators import build_pipeline, describe_features, list_missing

    features = describe_features(rows, feature_set.numeric, feature_set.categorical)
    pipeline = build_pipeline(
        features,
        model_type=params.model.type,
        model_params=hyper_parameters,
        normalize=params.preprocess.normalize,
        feature_selection=params.preprocess.feature_selection,
        seed=params.seed,
        missing=list_missing(features, rows),
    )
    return pipeline, features


def fit(
    params: Params, feature_set: FeatureSet, hyper_parameters: dict[str, Any], rows: dict[str, pd.DataFrame]
) -> Fitted:
    """Fit on train rows; calibrate and choose the threshold on validation rows."""
    from closedloop.core.training.calibration import calibrate_pipeline
    from closedloop.core.training.trees import round_thresholds
    from closedloop.core.training.weights import list_fit_weights

    train_rows, validation = rows["train"], rows["validation"]
    unfitted, features = build_unfitted(params, feature_set, hyper_parameters, train_rows)
    weights = list_fit_weights(unfitted, train_rows)
    uncalibrated = round_thresholds(unfitted.fit(train_rows, train_rows["churned"].to_numpy(), **weights))
    pipeline, calibration = uncalibrated, "switched off (model.calibrate)"
    if params.model.calibrate:
        labels, ids = validation["churned"].to_numpy(), validation["customer_id"].tolist()
        pipeline, calibration = calibrate_pipeline(uncalibrated, validation, labels, ids)
    threshold = cut(params, feature_set, pipeline, validation)
    return Fitted(pipeline, uncalibrated, features, calibration, threshold, hyper_parameters)


def cut(params: Params, feature_set: FeatureSet, pipeline: Pipeline, validation: pd.DataFrame) -> float:
    """The threshold for the pipeline's scores, by ``model.threshold``, chosen on validation rows."""
    from closedloop.core.evaluation.profit import count_profit, read_kept
    from closedloop.core.training.calibration import choose_threshold
    from closedloop.core.training.estimators import score

    labels, rule, value, gains = validation["churned"].to_numpy(), params.model.threshold, feature_set.value, None
    if rule == "profit" and value is not None:
        gains = count_profit(labels, read_kept(value.kept, validation, feature_set.value_columns), value)
    return choose_threshold(labels, score(pipeline, validation), rule, gains)
