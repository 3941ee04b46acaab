"""The model that is evaluated: what training wrote, read back and scored on the test rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from closedloop.adapters.tables import read_table
from closedloop.contract import MODEL_FILE, ModelContract, digest_folder, read_contract

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from closedloop.adapters.onnxruntime import OnnxScorer

LABEL, GROUP = "churned", "sensitive_group"


@dataclass(frozen=True)
class Candidate:
    """The model under evaluation, in both forms, with its rows and scores."""

    contract: ModelContract
    folder_sha256: str
    scorer: OnnxScorer
    pipeline: Pipeline
    train: pd.DataFrame
    test: pd.DataFrame
    labels: np.ndarray
    scores: np.ndarray


def load_candidate(training_dir: Path, model_dir: Path, pipeline_dir: Path) -> Candidate:
    """Read the model in both forms, refuse what its contract does not vouch for, and score the test rows."""
    from closedloop.adapters.onnxruntime import OnnxScorer
    from closedloop.adapters.skops import PIPELINE_FILE, load_pipeline
    from closedloop.core.estimators import encode_frame

    contract = read_contract(model_dir)
    scorer = OnnxScorer(model_dir / MODEL_FILE)
    train = read_table(training_dir / "train.parquet", made_by="closedloop training-set")
    test = read_table(training_dir / "test.parquet", made_by="closedloop training-set")
    return Candidate(
        contract=contract,
        folder_sha256=digest_folder(model_dir),
        scorer=scorer,
        pipeline=load_pipeline(pipeline_dir / PIPELINE_FILE),
        train=train,
        test=test,
        labels=test[LABEL].to_numpy(),
        scores=scorer.score(encode_frame(contract.features, test)),
    )
