"""A plain BentoML service on the scikit-learn model, for `benchmarks/serving.py`; ``MODEL_FOLDER`` names the model."""

import os
from pathlib import Path
from typing import Any

import bentoml
import joblib
import pandas as pd


@bentoml.service(workers=1)
class Churn:
    def __init__(self) -> None:
        self.pipeline = joblib.load(Path(os.environ["MODEL_FOLDER"]) / "pipeline.joblib")

    @bentoml.api  # type: ignore[untyped-decorator]
    def predict(self, features: dict[str, Any]) -> dict[str, float]:
        probability = float(self.pipeline.predict_proba(pd.DataFrame([features]))[0, 1])
        return {"prediction": int(probability >= 0.5), "probability": probability}
