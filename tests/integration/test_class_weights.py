"""Class weights at one churner in a hundred: scores are probabilities all the same, in the graph as in the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.adapters.onnx import export_model, measure_parity
from closedloop.adapters.onnxruntime import OnnxScorer
from closedloop.core.evaluation.metrics import list_log_losses, measure_classification
from closedloop.core.training.calibration import calibrate_pipeline
from closedloop.core.training.estimators import build_pipeline, describe_features, score
from closedloop.core.training.trees import round_thresholds
from closedloop.errors import DataError
from tests.trained_folders import SMALL

RATE, ROWS = 0.01, 12_000
BALANCED, HUNDRED = {"class_weight": "balanced"}, {"scale_pos_weight": 100}
WEIGHTS: list[tuple[str, dict[str, Any]]] = [
    ("logistic_regression", BALANCED),
    ("random_forest", BALANCED),
    ("hist_gradient_boosting", BALANCED),
    ("lightgbm", BALANCED),
    ("lightgbm", HUNDRED),
    ("xgboost", HUNDRED),
]


def make_rare(seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """One in a hundred leaves, those above all who seldom come."""
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame({"visits": draw.normal(size=ROWS), "fee": draw.gamma(2, 10, ROWS)})
    pull = -1.8 * frame["visits"] + draw.logistic(size=ROWS)
    return frame, np.asarray(pull > np.quantile(pull, 1 - RATE))


def fit(model_type: str, weights: dict[str, Any]) -> tuple[Any, Any]:
    frame, labels = make_rare(0)
    features = describe_features(frame, ["visits", "fee"], [])
    params = {**SMALL[model_type], **weights}
    options: dict[str, Any] = {"normalize": True, "feature_selection": None, "seed": 0}
    pipeline = build_pipeline(features, model_type=model_type, model_params=params, **options)
    return round_thresholds(pipeline.fit(frame, labels)), features


@pytest.mark.parametrize(("model_type", "weights"), WEIGHTS)
def test_weighted_scores_are_calibrated_whatever_they_gain(
    model_type: str, weights: dict[str, Any], tmp_path: Path
) -> None:
    pipeline, features = fit(model_type, weights)
    validation, truth = make_rare(1)
    test, labels = make_rare(2)
    assert score(pipeline, test).mean() > 5 * RATE  # the raw ones are no probabilities of these customers
    found, note = calibrate_pipeline(pipeline, validation, truth, [str(row) for row in range(ROWS)])
    assert note == "sigmoid scores: class weights move the raw ones (12,000 rows)"
    scores = score(found, test)
    figures, raw = (measure_classification(labels, each, 0.5) for each in (scores, score(pipeline, test)))
    assert scores.mean() == pytest.approx(RATE, rel=0.25)
    assert figures["expected_calibration_error"] < 0.004 < raw["expected_calibration_error"]
    one_score = list_log_losses(labels, np.full(ROWS, RATE)).mean()
    assert list_log_losses(labels, scores).mean() < 0.97 * one_score
    assert figures["roc_auc"] == pytest.approx(raw["roc_auc"], abs=1e-3)  # the order stays
    export_model(found, tmp_path / "model.onnx", 2)
    parity = measure_parity(found, OnnxScorer(tmp_path / "model.onnx"), test, features)
    assert (parity.rows_over, parity.difference_max < 1e-6) == (0, True)


def test_weights_with_too_few_rows_to_calibrate_are_refused() -> None:
    """Unweighted, the raw scores would do."""
    pipeline, _ = fit("logistic_regression", BALANCED)
    frame, _ = make_rare(1)
    few, truth = frame.head(200), np.arange(200) < 4
    with pytest.raises(DataError, match="a class has 4 validation rows, 5 are needed; give more validation rows, or"):
        calibrate_pipeline(pipeline, few, truth, [str(row) for row in range(200)])
    plain, _ = fit("logistic_regression", {"class_weight": None})
    assert calibrate_pipeline(plain, few, truth, [str(row) for row in range(200)])[0] is plain
