"""Every gate of a model, on its test rows; the limits come from the data set's config."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from closedloop.adapters.tables import read_table
from closedloop.core import gates as gate
from closedloop.core.limits import GateLimits
from closedloop.core.metrics import Interval
from closedloop.dataset import DatasetConfig
from closedloop.params import Params
from closedloop.stages.candidate import GROUP, LABEL, Candidate

CUTOFF_SAMPLE = 500


def judge(
    params: Params,
    dataset: DatasetConfig,
    candidate: Candidate,
    figures: dict[str, float],
    intervals: dict[str, Interval],
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


def judge_noise(params: Params, limits: GateLimits, candidate: Candidate) -> gate.GateResult:
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


def judge_trivial(dataset: DatasetConfig, limits: GateLimits, candidate: Candidate, accuracy: float) -> gate.GateResult:
    """Against the majority class of the training rows, and the best rule on recency alone."""
    majority = bool(candidate.train[LABEL].mean() >= 0.5)
    majority_accuracy = float((candidate.labels == majority).mean())
    recency_accuracy = None
    if dataset.label is not None:
        column = f"{dataset.label.event_type}_recency_days"
        rule = gate.fit_recency_rule(candidate.train[column].to_numpy(), candidate.train[LABEL].to_numpy())
        recency_accuracy = float((rule.predict(candidate.test[column].to_numpy()) == candidate.labels).mean())
    return gate.gate_better_than_trivial(accuracy, majority_accuracy, recency_accuracy, limits.trivial_margin_min)


def judge_export(limits: GateLimits, candidate: Candidate) -> list[gate.GateResult]:
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
