"""The contract folder that training writes: the graph, what it takes and comes from, and its reference rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from closedloop.config.dataset import DatasetConfig
from closedloop.config.featureset import list_features
from closedloop.config.params import Params
from closedloop.contract import (
    CONTRACT_FILE,
    JOIN_KEY,
    MODEL_FILE,
    REFERENCE_FILE,
    Feature,
    GoldenRow,
    Lineage,
    ModelContract,
    NumericFeature,
    ReferenceStatistics,
    digest_file,
)
from closedloop.tabular.tables import write_table

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

REFERENCE_ROWS_MAX = 50_000
GOLDEN_ROWS = 20


def write_model(
    folder: Path,
    pipeline: Pipeline,
    features: tuple[Feature, ...],
    threshold: float,
    *,
    params: Params,
    dataset: DatasetConfig,
    test: pd.DataFrame,
    lineage: Lineage,
) -> None:
    """Fill an empty folder with model.onnx, contract.json and reference.parquet.

    Parameters
    ----------
    pipeline
        Fitted and, where it helps, calibrated.
    test
        Out-of-sample rows with their labels, of which at most 50,000 become the reference.
    """
    from closedloop.adapters.onnx import export_model
    from closedloop.adapters.onnxruntime import OnnxScorer
    from closedloop.core.training.estimators import encode_frame

    export_model(pipeline, folder / MODEL_FILE, len(features))
    scorer = OnnxScorer(folder / MODEL_FILE)
    reference = test
    if len(test) > REFERENCE_ROWS_MAX:
        reference = test.sample(REFERENCE_ROWS_MAX, random_state=params.seed).sort_index()
    scores = scorer.score(encode_frame(features, reference))
    # without ids: a model outlives the erasure of its customers
    write_table(folder / REFERENCE_FILE, reference.drop(columns=JOIN_KEY).assign(score=scores))
    places = np.linspace(0, len(reference) - 1, min(GOLDEN_ROWS, len(reference))).astype(int)
    golden = [GoldenRow(features=_plain(reference.iloc[one], features), score=float(scores[one])) for one in places]
    known = list_features(params, dataset)
    contract = ModelContract(
        model_name=dataset.model_name,
        model_type=params.model.type,
        model_sha256=digest_file(folder / MODEL_FILE),
        features=features,
        feature_service=known.service,
        threshold=threshold,
        horizon_days=dataset.horizon_days,
        lineage=lineage,
        golden_rows=tuple(golden),
        reference={feature.name: summarise(feature, reference[feature.name]) for feature in features},
        reasons=dict(known.reasons),
    )
    _write_contract(folder / CONTRACT_FILE, contract)


def _write_contract(path: Path, contract: ModelContract) -> None:
    # without groups it is what a release that does not know them reads
    text = contract.model_dump_json(indent=2, exclude=None if contract.reasons else {"reasons"})
    path.write_text(text + "\n", encoding="utf-8")


def summarise(feature: Feature, values: pd.Series) -> ReferenceStatistics:
    """Statistics of one feature in the reference rows."""
    missing = float(values.isna().mean())
    if isinstance(feature, NumericFeature):
        known = values.dropna()
        if known.empty:
            return ReferenceStatistics(rows=len(values), missing_share=missing)
        mean, deviation = float(known.mean()), float(known.std(ddof=0))
        return ReferenceStatistics(rows=len(values), missing_share=missing, mean=mean, standard_deviation=deviation)
    shares = values.value_counts(normalize=True).sort_index()
    return ReferenceStatistics(
        rows=len(values), missing_share=missing, shares={str(k): float(v) for k, v in shares.items()}
    )


def _plain(row: pd.Series, features: tuple[Feature, ...]) -> dict[str, float | str | None]:
    return {one.name: None if pd.isna(row[one.name]) else row[one.name] for one in features}
