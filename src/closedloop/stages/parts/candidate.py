"""The model that is evaluated: what training wrote, read back and scored on the test rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from closedloop.config.layout import CHOICES_FILE, Layout
from closedloop.contract import MODEL_FILE, ModelContract, digest_folder, read_contract
from closedloop.files import read_json
from closedloop.tabular.tables import read_table

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from closedloop.adapters.onnxruntime import OnnxScorer

LABEL, GROUP = "churned", "sensitive_group"


@dataclass(frozen=True)
class Candidate:
    """The model under evaluation, in both forms, with its rows and scores.

    ``next_period`` is what `closedloop.stages.parts.next_period.measure_next_period` returned when it was trained;
    ``draw`` what `closedloop.stages.parts.draw_cost.measure_draw` did.
    """

    contract: ModelContract
    folder_sha256: str
    scorer: OnnxScorer
    pipeline: Pipeline
    train: pd.DataFrame
    test: pd.DataFrame
    labels: np.ndarray
    scores: np.ndarray
    next_period: Mapping[str, Any]
    draw: Mapping[str, Any] | None


def load_candidate(layout: Layout) -> Candidate:
    """Read the model in both forms, refuse what its contract does not vouch for, and score the test rows."""
    from closedloop.adapters.onnxruntime import OnnxScorer
    from closedloop.adapters.skops import PIPELINE_FILE, load_pipeline
    from closedloop.core.training.estimators import encode_frame

    contract = read_contract(layout.model)
    scorer = OnnxScorer(layout.model / MODEL_FILE)
    train = read_table(layout.training / "train.parquet", made_by="closedloop training-set")
    test = read_table(layout.training / "test.parquet", made_by="closedloop training-set")
    choices = read_json(layout.pipeline / CHOICES_FILE, made_by="closedloop train")
    return Candidate(
        contract=contract,
        folder_sha256=digest_folder(layout.model),
        scorer=scorer,
        pipeline=load_pipeline(layout.pipeline / PIPELINE_FILE, contract.model_type),
        train=train,
        test=test,
        labels=test[LABEL].to_numpy(),
        scores=scorer.score(encode_frame(contract.features, test)),
        next_period=choices["next_period"],
        draw=choices["draw"],
    )
