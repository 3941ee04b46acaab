"""Every gate of a model, on its test rows; the limits come from the data set's config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from closedloop.config.dataset import DatasetConfig
from closedloop.config.layout import Layout
from closedloop.config.params import Params
from closedloop.core.evaluation import gates as gate
from closedloop.core.evaluation.comparison import Comparison
from closedloop.core.evaluation.excuses import excuse_beside_champion
from closedloop.core.evaluation.limits import GateLimits
from closedloop.stages.parts.candidate import GROUP, LABEL, Candidate
from closedloop.stages.parts.measure import Measured, ScoreFigures, measure_scores
from closedloop.tabular.tables import read_table

CUTOFF_SAMPLE = 500


class Champion(NamedTuple):
    """The champion's scores of the test rows, its threshold, and how the challenger compares with it."""

    scores: np.ndarray
    threshold: float
    comparison: Comparison


def judge(
    params: Params,
    dataset: DatasetConfig,
    candidate: Candidate,
    measured: Measured,
    layout: Layout,
    champion: Champion | None = None,
) -> list[gate.GateResult]:
    """Every model gate; the limits come from the data set's config, and ``champion`` excuses some (`excuse`)."""
    limits = dataset.gates
    columns, most = (measured.columns, measured.pairs), (limits.single_column_auc_max, limits.column_pair_auc_max)
    results = judge_scores(params, dataset, candidate.labels, measured)
    results.append(gate.gate_single_column(*columns, *most))
    results.append(judge_noise(params, limits, candidate))
    results += judge_export(limits, candidate)
    if dataset.kind == "events":
        results.append(judge_cutoff(params, dataset, candidate, layout.raw))
    return excuse(params, dataset, {"train": candidate.train, "test": candidate.test}, results, champion)


def judge_scores(
    params: Params, dataset: DatasetConfig, labels: np.ndarray, measured: ScoreFigures
) -> list[gate.GateResult]:
    """The gates that need the labels and scores of the test rows alone."""
    limits, intervals = dataset.gates, measured.intervals
    churners = int(labels.sum())
    results = [
        gate.gate_class_rows(churners, len(labels) - churners, limits.class_rows_min),
        gate.gate_roc_auc(intervals["roc_auc"].low, limits.roc_auc_min),
        gate.gate_average_precision(intervals["average_precision_gain"].low, limits.average_precision_gain_min),
        gate.gate_lift(intervals["lift"].low, limits.lift_min),
        gate.gate_better_than_trivial(measured.gains, limits.trivial_margin_min),
        gate.gate_calibration(measured.figures["expected_calibration_error"], limits.calibration_error_max),
        *judge_decisions(params, limits, measured),
    ]
    if measured.groups is not None:
        where = dataset.columns.sensitive or GROUP
        results.append(gate.gate_group_fairness(measured.groups, limits.group_accuracy_min, where=where))
    return results


def excuse(
    params: Params,
    dataset: DatasetConfig,
    rows: Mapping[str, pd.DataFrame],
    results: list[gate.GateResult],
    champion: Champion | None,
) -> list[gate.GateResult]:
    """The results of a challenger; where it wins, what the champion misses too on the same rows stops nothing.

    ``rows`` has those of the challenger's parts ``train`` and ``test``: both models meet the same trivial rules.
    """
    if champion is None or champion.comparison.verdict != "win" or not gate.failed_gates(results):
        return results
    measured = measure_scores(params, dataset, rows, champion.scores, champion.threshold)
    of_champion = judge_scores(params, dataset, rows["test"][LABEL].to_numpy(), measured)
    return excuse_beside_champion(results, of_champion, champion.comparison)


def judge_decisions(params: Params, limits: GateLimits, measured: ScoreFigures) -> list[gate.GateResult]:
    """The gates on decisions; what they say depends on the churn rate and on what the threshold is chosen for.

    Where accuracy says little, or was not asked for, they are reported and stop nothing; whether the model is too good
    is then asked of its AUC.
    """
    figures, chosen = measured.figures, params.model.threshold
    rate = figures["churn_rate"]
    is_rare = min(rate, 1 - rate) <= limits.rare_class_rate_max
    rare = f"with a churn rate of {rate:.3f} it says little" if is_rare else ""
    other = "" if chosen in (0.5, "accuracy") else f"model.threshold {chosen} is not chosen for accuracy"
    f1 = gate.gate_f1_weighted(figures["f1_weighted"], limits.f1_weighted_min)
    balance = gate.gate_class_balance(figures["predicted_rate"], rate, limits.rate_difference_max)
    results = [
        gate.gate_accuracy(figures["accuracy"], limits.accuracy_min).report_only(rare or other),
        f1.report_only(rare or ("" if chosen == "f1" else other)),
        gate.gate_trivial_accuracy(measured.gains).report_only(rare or other),
        balance.report_only(other),
    ]
    if not is_rare:
        results.append(gate.gate_too_good("accuracy", figures["accuracy"], limits.accuracy_max))
    if is_rare or limits.roc_auc_max is not None:
        highest = limits.accuracy_max if limits.roc_auc_max is None else limits.roc_auc_max
        results.append(gate.gate_too_good("roc_auc", figures["roc_auc"], highest))
    return results


def judge_noise(params: Params, limits: GateLimits, candidate: Candidate) -> gate.GateResult:
    """Decisions under noise of a share of each numeric feature's standard deviation."""
    from closedloop.core.evaluation.noise import measure_noise_agreement
    from closedloop.core.training.estimators import encode_frame

    reference = candidate.contract.reference
    deviations = [reference[name].standard_deviation or 0.0 for name in candidate.contract.feature_names]
    agreement = measure_noise_agreement(
        candidate.scorer.score,
        encode_frame(candidate.contract.features, candidate.test),
        scale=limits.noise_scale,
        standard_deviations=deviations,
        threshold=candidate.contract.threshold,
        seed=params.seed,
    )
    return gate.gate_noise_robustness(agreement, limits.noise_agreement_min)


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
    from closedloop.config.featureset import build_window_spec
    from closedloop.core.features.leak_check import choose_suspects, count_mismatches, recompute_features

    spec = build_window_spec(params, dataset)
    # a customer who was held out of a campaign is there several times, the same in every column
    rows = pd.concat([candidate.train, candidate.test]).drop_duplicates(ignore_index=True)
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
