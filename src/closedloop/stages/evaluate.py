"""evaluate: figures on the test rows, every model gate, and the challenger against the champion."""

from __future__ import annotations

import logging
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from closedloop.adapters.tables import read_table
from closedloop.contract import ModelContract, digest_folder, read_contract
from closedloop.core import gates as gate
from closedloop.dataset import DatasetConfig
from closedloop.files import replace_folder, write_json, write_text
from closedloop.params import Params

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from closedloop.adapters.feast import Features
    from closedloop.adapters.mlflow import Tracking
    from closedloop.adapters.onnxruntime import OnnxScorer
    from closedloop.core.comparison import Comparison

logger = logging.getLogger(__name__)
LABEL, GROUP = "churned", "sensitive_group"
CUTOFF_SAMPLE = 500
INTERVALS = ("accuracy", "f1_weighted", "roc_auc", "brier", "log_loss")


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
    results.append(gate.gate_champion_challenger(comparison))
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
    write_json(metrics_path, {**flat, "intervals": {name: list(pair) for name, pair in intervals.items()}})
    write_json(gates_path, verdict)
    with tracking.start_run("evaluate", run_id=tracking.find_run(candidate.folder_sha256)):
        tracking.log_metrics(flat, prefix="test_")
        tracking.set_tags({"closedloop.gates": "failed" if failed else "passed"})
        tracking.log_files({"evaluation": card_path, "evaluation/figures": figures_dir, "gates": gates_path})
    gate.require_gates(results)
    return {"figures": figures, "intervals": intervals, **verdict}


def load_candidate(training_dir: Path, model_dir: Path, pipeline_dir: Path) -> Candidate:
    """Read the model in both forms, refuse what its contract does not vouch for, and score the test rows."""
    from closedloop.adapters.onnxruntime import OnnxScorer
    from closedloop.adapters.skops import load_pipeline
    from closedloop.contract import MODEL_FILE
    from closedloop.core.estimators import encode_frame
    from closedloop.stages.train import PIPELINE_FILE

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


def measure(params: Params, candidate: Candidate) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
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
        names=INTERVALS,
        customers=candidate.test["customer_id"].to_numpy(),
    )
    return figures, {name: (float(low), float(high)) for name, (low, high) in intervals.items()}


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
        place = tracking.fetch_contract(version, Path(folder))
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


def read_champion_rows(features: Features, contract: ModelContract, test: pd.DataFrame) -> pd.DataFrame | None:
    """The test rows with the features that the champion takes, in the same order; None if they are not to be had.

    A champion of another feature definition reads the rows that were published for it.
    """
    if contract.feature_service == features.features.service:
        return test
    from closedloop.featureset import FeatureSet

    numeric = tuple(feature.name for feature in contract.features if feature.kind == "numeric")
    categorical = tuple(feature.name for feature in contract.features if feature.kind == "categorical")
    definition = FeatureSet(numeric, categorical, contract.feature_service)
    return features.with_definition(definition).read_published(test[["customer_id", "event_timestamp"]])


def judge(
    params: Params,
    dataset: DatasetConfig,
    candidate: Candidate,
    figures: dict[str, float],
    intervals: dict[str, tuple[float, float]],
    groups: pd.DataFrame | None,
    *,
    raw_dir: Path,
) -> list[gate.GateResult]:
    """Every model gate; the limits come from the data set's config."""
    limits = dataset.gates
    results = [
        gate.gate_accuracy(figures["accuracy"], limits.accuracy_min),
        gate.gate_f1_weighted(figures["f1_weighted"], limits.f1_weighted_min),
        gate.gate_roc_auc(intervals["roc_auc"][0], limits.roc_auc_min),
        gate.gate_too_good("accuracy", figures["accuracy"], limits.accuracy_max),
        gate.gate_class_balance(figures["predicted_rate"], figures["churn_rate"], limits.rate_difference_max),
        gate.gate_calibration(figures["expected_calibration_error"], limits.calibration_error_max),
    ]
    if limits.roc_auc_max is not None:
        results.append(gate.gate_too_good("roc_auc", figures["roc_auc"], limits.roc_auc_max))
    if groups is not None:
        where = dataset.columns.sensitive or GROUP
        results.append(gate.gate_group_fairness(groups, limits.group_accuracy_min, where=where))
    results.append(judge_noise(params, limits, candidate))
    results.append(judge_trivial(dataset, limits, candidate, figures["accuracy"]))
    results += judge_export(limits, candidate)
    if dataset.kind == "events":
        results.append(judge_cutoff(params, dataset, candidate, raw_dir))
    return results


def judge_noise(params: Params, limits: gate.GateLimits, candidate: Candidate) -> gate.GateResult:
    """Decisions under noise of a share of each numeric feature's standard deviation."""
    from closedloop.core.estimators import encode_frame

    reference = candidate.contract.reference
    deviations = [reference[name].standard_deviation or 0.0 for name in candidate.contract.feature_names]
    agreement = gate.measure_noise_agreement(
        candidate.scorer.score,
        encode_frame(candidate.contract.features, candidate.test),
        scale=limits.noise_scale,
        standard_deviations=deviations,
        threshold=candidate.contract.threshold,
        seed=params.seed,
    )
    return gate.gate_noise_robustness(agreement, limits.noise_agreement_min)


def judge_trivial(
    dataset: DatasetConfig, limits: gate.GateLimits, candidate: Candidate, accuracy: float
) -> gate.GateResult:
    """Against the majority class of the training rows, and the best rule on recency alone."""
    majority = bool(candidate.train[LABEL].mean() >= 0.5)
    majority_accuracy = float((candidate.labels == majority).mean())
    recency_accuracy = None
    if dataset.label is not None:
        column = f"{dataset.label.event_type}_recency_days"
        rule = gate.fit_recency_rule(candidate.train[column].to_numpy(), candidate.train[LABEL].to_numpy())
        recency_accuracy = float((rule.predict(candidate.test[column].to_numpy()) == candidate.labels).mean())
    return gate.gate_better_than_trivial(accuracy, majority_accuracy, recency_accuracy, limits.trivial_margin_min)


def judge_export(limits: gate.GateLimits, candidate: Candidate) -> list[gate.GateResult]:
    """The exported graph against the pipeline: scores on train and test rows, and the time of a single row."""
    from closedloop.adapters.onnx import measure_latency_ratio, measure_parity

    features, results = candidate.contract.features, []
    for name, frame in (("train", candidate.train), ("test", candidate.test)):
        parity = measure_parity(candidate.pipeline, candidate.scorer, frame, features)
        results.append(
            gate.gate_onnx_parity(
                parity.difference_max,
                limits.parity_max,
                rows_name="train" if name == "train" else "test",
                rows_over=parity.rows_over,
            )
        )
    ratio = measure_latency_ratio(candidate.pipeline, candidate.scorer, candidate.test)
    return [*results, gate.gate_latency(ratio, limits.latency_ratio_max)]


def judge_cutoff(params: Params, dataset: DatasetConfig, candidate: Candidate, raw_dir: Path) -> gate.GateResult:
    """Features of a sample of rows, computed again from events strictly before each snapshot."""
    from closedloop.core.cutoff import choose_suspects, count_mismatches, recompute_features
    from closedloop.featureset import build_window_spec

    spec = build_window_spec(params, dataset)
    rows = pd.concat([candidate.train, candidate.test], ignore_index=True)
    events = read_table(raw_dir / "events", made_by="closedloop ingest")
    suspects = choose_suspects(events, rows, sample=CUTOFF_SAMPLE, seed=params.seed)
    recomputed = recompute_features(
        events,
        suspects,
        windows=spec.window_days,
        aggregations=spec.aggregations,
        event_types=spec.event_types,
        amount_types=spec.amount_types,
        recency_cap_days=spec.recency_cap_days,
    )
    mismatches, first = count_mismatches(rows, recomputed)
    return gate.gate_feature_cutoff(mismatches, first, dataset.gates.cutoff_mismatches_max, rows_checked=len(suspects))


def draw(candidate: Candidate, plots: Path, pictures: Path) -> None:
    """Plot data for DVC, and pictures, of the test rows."""
    from closedloop.adapters.pictures import draw_scores
    from closedloop.core.metrics import tabulate_calibration, tabulate_curve, tabulate_lift

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
    intervals: dict[str, tuple[float, float]],
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
