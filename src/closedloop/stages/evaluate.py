"""evaluate: figures on the test rows, every model gate, and the challenger against the champion."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from closedloop.adapters.mlflow import CHAMPION, DIGEST_TAG, NOTE_TAG
from closedloop.config.dataset import DatasetConfig
from closedloop.config.featureset import read_features
from closedloop.config.layout import Layout
from closedloop.config.params import Params
from closedloop.contract import ModelContract, check_digest, read_contract
from closedloop.core.evaluation import gates as gate
from closedloop.files import replace_folder, write_json, write_text
from closedloop.stages.parts.candidate import Candidate, load_candidate
from closedloop.stages.parts.card import describe_run, describe_standing, render_card
from closedloop.stages.parts.judge import Champion, judge
from closedloop.stages.parts.measure import Measured, choose_bootstrap, measure
from closedloop.stages.parts.money import draw_money, judge_profit, read_stake

if TYPE_CHECKING:
    from closedloop.adapters.feast import Features
    from closedloop.adapters.mlflow import Tracking
    from closedloop.core.evaluation.comparison import Comparison

logger = logging.getLogger(__name__)
COLUMNS_SHOWN = 10


def evaluate(
    params: Params,
    dataset: DatasetConfig,
    tracking: Tracking,
    features: Features,
    layout: Layout,
    *,
    auto_promote: bool = False,
    policy: str = "own",
) -> dict[str, Any]:
    """Judge ``layout.model`` on rows that it was not trained on; write all reports before any gate refuses.

    For the card alone: ``auto_promote`` is what `register` will be told, ``policy`` what will retrain the model.

    Raises
    ------
    GateFailed
        If a gate says no; the message has one line for each such gate, with figure and limit.
    DataError
        If the model folder's files do not match its contract.
    """
    candidate = load_candidate(layout)
    logger.info("measuring test rows: %d, resamples: %d", len(candidate.test), params.evaluation.bootstrap_samples)
    measured = measure(params, dataset, candidate)
    champion, beside = compare_with_champion(params, tracking, features, candidate)
    comparison = beside.comparison if beside else None
    logger.info("judging by every gate")
    results = judge(params, dataset, candidate, measured, layout, beside)
    stake, bootstrap = read_stake(params, dataset, candidate.test), choose_bootstrap(params, candidate.test)
    before = beside.scores if beside else None
    results += judge_profit(stake, candidate.scores, before, bootstrap, _explain(champion))
    results.append(gate.gate_champion_challenger(comparison, _explain(champion)))
    verdict = describe_verdict(candidate, measured, results, champion, comparison)
    with replace_folder(layout.test_plots) as plots, replace_folder(layout.test_figures) as pictures:
        draw(candidate, plots, pictures)
        if stake is not None:
            draw_money(stake, candidate, bootstrap, plots, pictures)
        standing = describe_standing(tracking, candidate.folder_sha256, verdict, policy, auto_promote=auto_promote)
        write_text(layout.card, render_card(params, dataset, candidate, measured, verdict, standing, layout, pictures))
    flat = list_figures(measured)
    write_json(layout.eval_metrics, flat | _prefix("next_period", candidate.next_period.get("figures", {})))
    write_json(layout.gates, verdict)
    with tracking.start_run("evaluate", run_id=tracking.find_run(candidate.folder_sha256)) as run_id:
        note = describe_run(dataset, candidate, measured, verdict, run_id)
        log_evaluation(tracking, layout, flat, note, passed=verdict["passed"])
    gate.require_gates(results)
    return {"figures": measured.figures, **verdict}


def list_figures(measured: Measured) -> dict[str, float]:
    """Figures of the test rows, and the simple baseline's beside them; what cannot be said is left out."""
    flat = {name: value for name, value in measured.figures.items() if math.isfinite(value)}
    money = {} if measured.money is None else measured.money.figures
    return flat | _prefix("baseline", measured.baseline["figures"]) | money


def _prefix(word: str, figures: Mapping[str, float]) -> dict[str, float]:
    return {f"{word}_{name}": value for name, value in figures.items()}


def describe_verdict(
    candidate: Candidate,
    measured: Measured,
    results: list[gate.GateResult],
    champion: dict[str, Any] | None,
    comparison: Comparison | None,
) -> dict[str, Any]:
    """The content of `metrics/gates.json`."""
    return {
        "passed": not gate.failed_gates(results),
        "excused": [result.name for result in results if result.excused],
        "judges": candidate.next_period["judged"],
        "folder_sha256": candidate.folder_sha256,
        "champion": champion,
        "comparison": None if comparison is None else asdict(comparison),
        "baseline": measured.baseline,
        "intervals": measured.intervals | ({"profit": measured.money.interval} if measured.money else {}),
        "next_period": candidate.next_period,
        "draw": candidate.draw,
        "columns": dict(list(measured.columns.items())[:COLUMNS_SHOWN]),
        "gates": {result.name: _describe(result) for result in results},
    }


def log_evaluation(
    tracking: Tracking, layout: Layout, figures: Mapping[str, float], note: str, *, passed: bool
) -> None:
    """Log figures and reports to the open run, and describe it."""
    tracking.log_metrics(figures, prefix="test_")
    tracking.set_tags({"closedloop.gates": "passed" if passed else "failed", NOTE_TAG: note})
    tracking.log_files({"evaluation": layout.card, "evaluation/figures": layout.test_figures, "gates": layout.gates})


def compare_with_champion(
    params: Params, tracking: Tracking, features: Features, candidate: Candidate
) -> tuple[dict[str, Any] | None, Champion | None]:
    """The champion, and how the model compares with it on the test rows; None where there is none to compare with."""
    from closedloop.adapters.onnxruntime import OnnxScorer
    from closedloop.contract import MODEL_FILE
    from closedloop.core.evaluation.comparison import compare_models
    from closedloop.core.training.estimators import encode_frame

    version = tracking.read_alias(CHAMPION)
    if version is None:
        return None, None
    champion = {"version": version.version, "folder_sha256": version.tags.get(DIGEST_TAG)}
    if champion["folder_sha256"] == candidate.folder_sha256:
        return {**champion, "is_candidate": True}, None
    with tempfile.TemporaryDirectory() as folder:
        place, registered = tracking.fetch_version(version.version, Path(folder))
        check_digest(place, registered)
        contract = read_contract(place)
        rows = read_champion_rows(features, contract, candidate.test)
        if rows is None:
            reason = f"its features ({contract.feature_service}) of the test snapshots are not in the feature store"
            return {**champion, "not_compared": reason}, None
        scores = OnnxScorer(place / MODEL_FILE).score(encode_frame(contract.features, rows))
    comparison = compare_models(
        candidate.labels,
        scores,
        candidate.scores,
        champion_threshold=contract.threshold,
        challenger_threshold=candidate.contract.threshold,
        bootstrap=choose_bootstrap(params, candidate.test),
    )
    return champion, Champion(scores, contract.threshold, comparison)


def _explain(champion: dict[str, Any] | None) -> str:
    """The reason why there was no comparison with a champion."""
    if champion is None:
        return "there is no champion yet"
    return str(champion.get("not_compared", "it is the champion"))


def read_champion_rows(features: Features, contract: ModelContract, test: pd.DataFrame) -> pd.DataFrame | None:
    """The test rows with the champion's features, in the same order; None if the feature store lacks them.

    For a champion with another feature definition these are the rows that were published for that definition.
    """
    if contract.feature_service == features.features.service:
        return test
    return features.with_definition(read_features(contract)).read_published(test[["customer_id", "event_timestamp"]])


def draw(candidate: Candidate, plots: Path, pictures: Path) -> None:
    """Draw the test rows: plot data for DVC, and pictures."""
    from closedloop.adapters.matplotlib import draw_scores
    from closedloop.core.evaluation.curves import tabulate_calibration, tabulate_curve, tabulate_lift

    labels, scores = candidate.labels, candidate.scores
    tabulate_curve(labels, scores, "roc").to_csv(plots / "roc.csv", index=False)
    tabulate_curve(labels, scores, "precision_recall").to_csv(plots / "precision_recall.csv", index=False)
    tabulate_calibration(labels, scores).to_csv(plots / "calibration.csv", index=False)
    tabulate_lift(labels, scores).to_csv(plots / "lift.csv", index=False)
    decided = np.where(scores >= candidate.contract.threshold, "churned", "stayed")
    actual = np.where(labels, "churned", "stayed")
    pd.DataFrame({"actual": actual, "predicted": decided}).to_csv(plots / "confusion.csv", index=False)
    draw_scores(pictures, labels, scores, candidate.contract.threshold, rows_name="test")


def _describe(result: gate.GateResult) -> dict[str, Any]:
    """A gate's result as values that JSON can hold (JSON has no NaN)."""
    values = asdict(result) | {"sentence": result.sentence(), "remedy": result.remedy}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
