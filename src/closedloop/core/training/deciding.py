"""A fitted pipeline with its threshold: what MLflow serves. Its models carry this file, so it needs public packages."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline


class DecidingModel(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Answers each row's probability of churn, and the decision that the contract's threshold makes of it."""

    def __init__(self, pipeline: Pipeline, threshold: float) -> None:
        self.pipeline, self.threshold = pipeline, threshold

    def predict(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Columns ``probability`` and ``prediction`` (0 or 1), called as in the service's answers."""
        probability = self.predict_proba(frame)[:, 1]
        return pd.DataFrame({"probability": probability, "prediction": (probability >= self.threshold).astype(int)})

    def predict_proba(self, frame: pd.DataFrame) -> np.ndarray:
        """The pipeline's probabilities of staying and of churning, shape (n, 2)."""
        found: np.ndarray = self.pipeline.predict_proba(frame)
        return found
