"""The models that are compared: the project's own, and a random forest trained on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DEFAULT, FOREST = "default", "forest"
FOREST_PARAMS = {"n_estimators": 100, "max_depth": 10}


def prepare_models(project: Path, work: Path, threads: int) -> tuple[Any, Any]:
    """Both models in ``work``, as contract folder, MLflow model and joblib file; returns contract and training rows."""
    import numpy as np
    import pandas as pd

    from closedloop.adapters.skops import load_pipeline
    from closedloop.contract import read_contract
    from closedloop.core.training.estimators import build_pipeline
    from closedloop.core.training.trees import round_thresholds

    contract = read_contract(project / "models/candidate")
    names = list(contract.feature_names)
    training = pd.read_parquet(project / "data/training/train.parquet")
    pipeline = load_pipeline(project / "models/pipeline/pipeline.skops", contract.model_type)
    write_model(work / DEFAULT, pipeline, contract, training[names])
    forest = build_pipeline(
        contract.features,
        model_type="random_forest",
        model_params={**FOREST_PARAMS, "n_jobs": threads},
        normalize=False,
        feature_selection=None,
        seed=7,
    )
    forest.fit(training[names], training["churned"].to_numpy(dtype=np.bool_))
    write_model(work / FOREST, round_thresholds(forest), contract, training[names])
    return contract, training


def require_project(parser: Any, project: Path) -> None:
    """End with what to do where nothing has been trained."""
    if not (project / "models/pipeline/pipeline.skops").is_file():
        parser.error(f"{project}: there is no trained model; run `make run` first, or name a --project")


def draw_rows(contract: Any, training: Any, count: int, rng: Any) -> dict[str, Any]:
    """Training rows by column, drawn at random; amounts vary so that hardly any two rows are alike."""
    drawn = training.iloc[rng.integers(0, len(training), count)]
    columns: dict[str, Any] = {}
    for feature in contract.features:
        values = drawn[feature.name].to_numpy()
        if feature.kind == "numeric" and any(word in feature.name for word in ("sum", "mean", "income")):
            values = (values * rng.uniform(0.95, 1.05, count)).clip(feature.minimum, feature.maximum)
        columns[feature.name] = values
    return columns


def write_model(folder: Path, pipeline: Any, contract: Any, training: Any) -> None:
    """A pipeline in the forms that contenders load."""
    import joblib
    import mlflow
    import pandas as pd
    from mlflow.models import infer_signature

    from closedloop.adapters.onnx import export_model
    from closedloop.adapters.skops import TRUSTED_TYPES
    from closedloop.contract import CONTRACT_FILE, MODEL_FILE, REFERENCE_FILE, digest_file

    folder.mkdir(parents=True)
    export_model(pipeline, folder / MODEL_FILE, len(contract.features))
    training.head(1000).to_parquet(folder / REFERENCE_FILE)
    golden = pd.DataFrame([row.features for row in contract.golden_rows])
    scores = pipeline.predict_proba(golden)[:, 1]
    rows = [row.model_copy(update={"score": score}) for row, score in zip(contract.golden_rows, scores, strict=True)]
    changed = {"model_sha256": digest_file(folder / MODEL_FILE), "golden_rows": tuple(rows), "threshold": 0.5}
    (folder / CONTRACT_FILE).write_text(contract.model_copy(update=changed).model_dump_json(), encoding="utf-8")
    joblib.dump(pipeline, folder / "pipeline.joblib")
    mlflow.sklearn.save_model(
        pipeline,
        folder / "mlflow",
        signature=infer_signature(training.head(100), pipeline.predict_proba(training.head(100))),
        serialization_format="skops",
        skops_trusted_types=TRUSTED_TYPES,
        pyfunc_predict_fn="predict_proba",
        pip_requirements=["scikit-learn"],
    )
