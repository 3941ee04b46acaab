"""evaluate: figures on the test rows, every model gate, and the challenger against the champion."""

from __future__ import annotations

import logging
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from closedloop.contract import ModelContract, check_digest, read_contract
from closedloop.core import gates as gate
from closedloop.dataset import DatasetConfig
from closedloop.featureset import read_features
from closedloop.files import replace_folder, write_json, write_text
from closedloop.params import Params
from closedloop.stages.candidate import GROUP, Candidate, load_candidate
from closedloop.stages.judge import judge

if TYPE_CHECKING:
    from closedloop.adapters.feast import Features
    from closedloop.adapters.mlflow import Tracking
    from closedloop.core.comparison import Comparison
    from closedloop.core.metrics import Interval

logger = logging.getLogger(__name__)


def evaluate(
    params: Params,
    dataset: DatasetConfig,
    tracking: Tracking,
    features: Features,
    *,
    raw_dir: Path,
    training_dir: Path,
    model_dir: Path,
    pipeline_dir: Path,
    figures_dir: Path,
    plots_dir: Path,
    card_path: Path,
    gates_path: Path,
    metrics_path: Path,
) -> dict[str, Any]:
    """Judge the model in ``model_dir`` on rows that it was not trained on; all reports are written before any refusal.

    Raises
    ------
    GateFailed
        If a gate says no: one line each, with figure and limit.
    DataError
        If the model folder does not hold what its contract says.
    """
    candidate = load_candidate(training_dir, model_dir, pipeline_dir)
    logger.info("measuring %d test rows, %d resamples", len(candidate.test), params.evaluation.bootstrap_samples)
    figures, intervals = measure(params, candidate)
    groups = measure_sensitive_groups(dataset, candidate)
    logger.info("comparing with the champion")
    comparison, champion = compare_with_champion(params, tracking, features, candidate)
    logger.info("judging by every gate")
    results = judge(params, dataset, candidate, figures, intervals, groups, raw_dir=raw_dir)
    results.append(gate.gate_champion_challenger(comparison, _explain(champion)))
    failed = gate.failed_gates(results)
    verdict = {
        "passed": not failed,
        "folder_sha256": candidate.folder_sha256,
        "champion": champion,
        "comparison": None if comparison is None else asdict(comparison),
        "gates": {result.name: {**_finite(asdict(result)), "sentence": result.sentence()} for result in results},
    }
    with replace_folder(plots_dir) as plots, replace_folder(figures_dir) as pictures:
        draw(candidate, plots, pictures)
        write_card(card_path, params, dataset, candidate, figures, intervals, groups, verdict, pictures)
    flat = {name: value for name, value in figures.items() if math.isfinite(value)}
    write_json(metrics_path, {**flat, "intervals": intervals})
    write_json(gates_path, verdict)
    with tracking.start_run("evaluate", run_id=tracking.find_run(candidate.folder_sha256)):
        tracking.log_metrics(flat, prefix="test_")
        tracking.set_tags({"closedloop.gates": "failed" if failed else "passed"})
        tracking.log_files({"evaluation": card_path, "evaluation/figures": figures_dir, "gates": gates_path})
    gate.require_gates(results)
    return {"figures": figures, "intervals": intervals, **verdict}


def measure(params: Params, candidate: Candidate) -> tuple[dict[str, float], dict[str, Interval]]:
    """Figures on the test rows, and the bootstrap intervals of the main ones."""
    from closedloop.core.metrics import bootstrap_intervals, measure_classification

    threshold = candidate.contract.threshold
    figures = measure_classification(candidate.labels, candidate.scores, threshold)
    intervals = bootstrap_intervals(
        candidate.labels,
        candidate.scores,
        threshold,
        seed=params.seed,
        samples=params.evaluation.bootstrap_samples,
        level=params.evaluation.level,
        customers=candidate.test["customer_id"].to_numpy(),
    )
    return figures, intervals


def measure_sensitive_groups(dataset: DatasetConfig, candidate: Candidate) -> pd.DataFrame | None:
    """The figures of each sensitive group; None if the data set names no such column."""
    from closedloop.core.metrics import measure_groups

    if GROUP not in candidate.test:
        return None
    return measure_groups(
        candidate.labels,
        candidate.scores,
        candidate.contract.threshold,
        candidate.test[GROUP],
        minimum_rows=dataset.gates.group_rows_min,
    )


def compare_with_champion(
    params: Params, tracking: Tracking, features: Features, candidate: Candidate
) -> tuple[Comparison | None, dict[str, Any] | None]:
    """The paired comparison on the test rows, and who the champion is; None where there is nobody to compare with."""
    from closedloop.adapters.mlflow import CHAMPION, DIGEST_TAG
    from closedloop.adapters.onnxruntime import OnnxScorer
    from closedloop.contract import MODEL_FILE
    from closedloop.core.comparison import compare_models
    from closedloop.core.estimators import encode_frame

    version = tracking.read_alias(CHAMPION)
    if version is None:
        return None, None
    champion = {"version": version.version, "folder_sha256": version.tags.get(DIGEST_TAG)}
    if champion["folder_sha256"] == candidate.folder_sha256:
        return None, {**champion, "is_candidate": True}
    with tempfile.TemporaryDirectory() as folder:
        place, registered = tracking.fetch_version(version.version, Path(folder))
        check_digest(place, registered)
        contract = read_contract(place)
        rows = read_champion_rows(features, contract, candidate.test)
        if rows is None:
            reason = f"its features ({contract.feature_service}) of the test snapshots are not in the feature store"
            return None, {**champion, "not_compared": reason}
        scores = OnnxScorer(place / MODEL_FILE).score(encode_frame(contract.features, rows))
    comparison = compare_models(
        candidate.labels,
        scores,
        candidate.scores,
        champion_threshold=contract.threshold,
        challenger_threshold=candidate.contract.threshold,
        seed=params.seed,
        samples=params.evaluation.bootstrap_samples,
        level=params.evaluation.level,
        customers=candidate.test["customer_id"].to_numpy(),
    )
    return comparison, champion


def _explain(champion: dict[str, Any] | None) -> str:
    """Why there is no comparison, where there is none."""
    if champion is None:
        return "there is no champion yet"
    return str(champion.get("not_compared", "it is the champion"))


def read_champion_rows(features: Features, contract: ModelContract, test: pd.DataFrame) -> pd.DataFrame | None:
    """The test rows with the features that the champion takes, in the same order; None if they are not to be had.

    A champion of another feature definition reads the rows that were published for it.
    """
    if contract.feature_service == features.features.service:
        return test
    return features.with_definition(read_features(contract)).read_published(test[["customer_id", "event_timestamp"]])


def draw(candidate: Candidate, plots: Path, pictures: Path) -> None:
    """Plot data for DVC, and pictures, of the test rows."""
    from closedloop.adapters.pictures import draw_scores
    from closedloop.core.charts import tabulate_calibration, tabulate_curve, tabulate_lift

    labels, scores = candidate.labels, candidate.scores
    tabulate_curve(labels, scores, "roc").to_csv(plots / "roc.csv", index=False)
    tabulate_curve(labels, scores, "precision_recall").to_csv(plots / "precision_recall.csv", index=False)
    tabulate_calibration(labels, scores).to_csv(plots / "calibration.csv", index=False)
    tabulate_lift(labels, scores).to_csv(plots / "lift.csv", index=False)
    decided = np.where(scores >= candidate.contract.threshold, "churned", "stayed")
    actual = np.where(labels, "churned", "stayed")
    pd.DataFrame({"actual": actual, "predicted": decided}).to_csv(plots / "confusion.csv", index=False)
    draw_scores(pictures, labels, scores, candidate.contract.threshold, rows_name="test")


def write_card(
    path: Path,
    params: Params,
    dataset: DatasetConfig,
    candidate: Candidate,
    figures: dict[str, float],
    intervals: dict[str, Interval],
    groups: pd.DataFrame | None,
    verdict: dict[str, Any],
    pictures: Path,
) -> None:
    """The model card, one HTML page with its pictures inside."""
    import base64

    from closedloop.adapters.pages import render_page

    images = {
        picture.stem: base64.b64encode(picture.read_bytes()).decode() for picture in sorted(pictures.glob("*.png"))
    }
    page = render_page(
        "model_card.html",
        params=params,
        dataset=dataset,
        contract=candidate.contract,
        figures=figures,
        intervals=intervals,
        groups=None if groups is None else groups.to_dict("records"),
        verdict=verdict,
        images=images,
        rows={"train": len(candidate.train), "test": len(candidate.test)},
    )
    write_text(path, page)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
