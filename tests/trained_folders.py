"""Model folders with really trained and exported models, of every type, with missing values and categories."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.pipeline import Pipeline

from closedloop.adapters.onnx import export_model
from closedloop.adapters.onnxruntime import OnnxScorer
from closedloop.contract import (
    CONTRACT_FILE,
    MODEL_FILE,
    REFERENCE_FILE,
    GoldenRow,
    ModelContract,
    digest_file,
)
from closedloop.core.training.calibration import fit_sigmoid
from closedloop.core.training.estimators import build_pipeline, describe_features, encode_frame, list_missing
from closedloop.core.training.trees import round_thresholds
from closedloop.stages.parts.model_folder import summarise
from tests.model_folders import LINEAGE

NUMERIC, CATEGORICAL = ["age", "visits_7d", "visits_30d", "empty"], ["plan", "city"]
SMALL: dict[str, dict[str, Any]] = {
    "logistic_regression": {},
    "random_forest": {"n_estimators": 5, "max_depth": 4, "min_samples_leaf": 10},
    "gradient_boosting": {"n_estimators": 6, "max_depth": 3},
    "hist_gradient_boosting": {"max_iter": 6, "max_leaf_nodes": 9, "min_samples_leaf": 20},
    "lightgbm": {"n_estimators": 6, "num_leaves": 9, "min_child_samples": 20},
    "xgboost": {"n_estimators": 6, "max_depth": 4, "min_child_weight": 5},
}


class Trained(NamedTuple):
    """A model folder, and what it was made from."""

    folder: Path
    pipeline: Pipeline
    contract: ModelContract
    frame: pd.DataFrame

    def read_raw_scores(self, frame: pd.DataFrame) -> np.ndarray:
        """The raw scores by the model's library: log-odds, or the share of the trees' votes of a forest."""
        model = self.pipeline[-1]
        if hasattr(model, "calibrated_classifiers_"):
            model = model.estimator.estimator
        prepared = self.prepare(frame)
        return model.predict_proba(prepared)[:, 1] if hasattr(model, "oob_score") else model.decision_function(prepared)

    def prepare(self, frame: pd.DataFrame) -> np.ndarray:
        """The columns that the model takes."""
        return np.asarray(self.pipeline[1:-1].transform(encode_frame(self.contract.features, frame)), dtype=np.float32)


def make_people(rows: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows with missing numbers and categories, and a column without any value."""
    generator = np.random.default_rng(seed)
    frame = pd.DataFrame({"age": generator.normal(40, 15, rows), "visits_7d": generator.poisson(2, rows).astype(float)})
    frame["visits_30d"] = frame["visits_7d"] + generator.poisson(5, rows)
    frame["empty"] = np.nan
    frame["plan"] = generator.choice(np.array(["basic", "plus", None], dtype=object), rows)
    frame["city"] = generator.choice(np.array(list("ABCD"), dtype=object), rows)
    logit = 1 - 0.3 * frame["visits_30d"] + (frame["plan"] == "plus") * (frame["age"] > 40) + (frame["city"] == "B")
    labels = np.asarray(generator.random(rows) < 1 / (1 + np.exp(-logit)))
    frame.loc[generator.random(rows) < 0.2, ["age", "visits_30d"]] = np.nan
    return frame, labels


def write_trained_folder(
    folder: Path,
    model_type: str,
    *,
    params: dict[str, Any] | None = None,
    selected: int | None = None,
    calibrated: bool = False,
    reasons: dict[str, tuple[str, ...]] | None = None,
    model_name: str = "test_churn",
    rows: int = 3_000,
) -> Trained:
    """Train a small model and write its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    frame, labels = make_people(rows, 0)
    features = describe_features(frame, NUMERIC, CATEGORICAL)
    pipeline = build_pipeline(
        features,
        model_type=model_type,
        model_params=SMALL[model_type] if params is None else params,
        normalize=True,
        feature_selection=selected,
        seed=0,
        missing=list_missing(features, frame),
    )
    pipeline = round_thresholds(pipeline.fit(frame, labels))
    if calibrated:
        pipeline = fit_sigmoid(pipeline, frame, labels)
    export_model(pipeline, folder / MODEL_FILE, len(features))
    scores = OnnxScorer(folder / MODEL_FILE).score(encode_frame(features, frame))
    frame.assign(score=scores).to_parquet(folder / REFERENCE_FILE)
    contract = ModelContract(
        model_name=model_name,
        model_type=model_type,
        model_sha256=digest_file(folder / MODEL_FILE),
        features=features,
        feature_service=f"{model_name}_0",
        threshold=0.5,
        horizon_days=30,
        lineage=LINEAGE,
        golden_rows=tuple(GoldenRow(features=list_values(frame, row), score=scores[row]) for row in range(5)),
        reference={feature.name: summarise(feature, frame[feature.name]) for feature in features},
        reasons=reasons or {},
    )
    (folder / CONTRACT_FILE).write_text(contract.model_dump_json(), encoding="utf-8")
    return Trained(folder, pipeline, contract, frame)


def list_values(frame: pd.DataFrame, row: int) -> dict[str, Any]:
    """A row's features as a request sends them."""
    return {name: None if pd.isna(value) else value for name, value in frame.iloc[row].to_dict().items()}
