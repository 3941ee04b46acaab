"""Measures the model under evaluation on its test rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from closedloop.config.dataset import DatasetConfig
from closedloop.config.params import Params
from closedloop.contract import NumericFeature
from closedloop.core.evaluation.bootstrap import Bootstrap, Interval
from closedloop.core.evaluation.column_leaks import rank_columns, rank_pairs
from closedloop.core.evaluation.comparison import compare_models
from closedloop.core.evaluation.metrics import bootstrap_intervals, measure_classification, measure_groups
from closedloop.core.evaluation.trivial import Gains, measure_gains, score_recency
from closedloop.core.reasons.explainer import Explainer, Reason
from closedloop.core.reasons.importance import Importance, rank_importance
from closedloop.core.training.estimators import build_pipeline, encode_frame, list_missing, score
from closedloop.core.training.weights import list_fit_weights
from closedloop.errors import ConfigError, DataError
from closedloop.stages.parts.candidate import GROUP, LABEL, Candidate
from closedloop.stages.parts.money import Money, measure_money, read_stake

logger = logging.getLogger(__name__)
IMPORTANCE_ROWS, EXAMPLE_REASONS = 500, 4
BASELINE_TYPE = "logistic_regression"
BASELINE_ROWS_MAX = 50_000
BASELINE_FIGURES = ("roc_auc", "average_precision", "lift", "log_loss", "brier", "accuracy")


class Example(NamedTuple):
    """A test row and the strongest reasons for its score.

    It has no id: the card is copied into the tracker and onto people's disks, where nobody can erase a customer.
    """

    chosen: str
    score: float
    left: bool
    reasons: list[Reason]


@dataclass(frozen=True)
class ScoreFigures:
    """Figures of the test rows with their intervals; ``groups`` is None if the data set names no sensitive column.

    ``gains`` are those against trivial rules.
    """

    figures: dict[str, float]
    intervals: dict[str, Interval]
    groups: pd.DataFrame | None
    gains: dict[str, Gains]


@dataclass(frozen=True)
class Measured(ScoreFigures):
    """Those, and more: ``columns`` and ``pairs`` say how far columns rank the label alone.

    ``baseline`` has the figures of a logistic regression, and how the model compares with it. ``money`` is None if the
    data set's config has no ``value``.
    """

    columns: dict[str, float]
    pairs: dict[tuple[str, str], float]
    baseline: dict[str, Any]
    money: Money | None = None


def measure(params: Params, dataset: DatasetConfig, candidate: Candidate) -> Measured:
    """All that the gates and the card need, on the test rows."""
    rows, threshold = {"train": candidate.train, "test": candidate.test}, candidate.contract.threshold
    found = measure_scores(params, dataset, rows, candidate.scores, threshold)
    columns, pairs = find_strong_columns(params, dataset, candidate, found.figures["roc_auc"])
    bootstrap, stake = choose_bootstrap(params, candidate.test), read_stake(params, dataset, candidate.test)
    baseline = measure_baseline(params, candidate, bootstrap)
    money = None if stake is None else measure_money(stake, candidate.scores, threshold, bootstrap)
    return Measured(**vars(found), columns=columns, pairs=pairs, baseline=baseline, money=money)


def measure_scores(
    params: Params, dataset: DatasetConfig, rows: Mapping[str, pd.DataFrame], scores: np.ndarray, threshold: float
) -> ScoreFigures:
    """The figures of the test rows' labels and scores; trivial rules know the train rows."""
    test = rows["test"]
    labels, bootstrap = test[LABEL].to_numpy(), choose_bootstrap(params, test)
    groups = None
    if GROUP in test:
        least = dataset.gates.group_rows_min
        groups = measure_groups(labels, scores, threshold, test[GROUP], minimum_rows=least)
    trivial = score_trivially(dataset, rows["train"], test)
    return ScoreFigures(
        measure_classification(labels, scores, threshold),
        bootstrap_intervals(labels, scores, threshold, bootstrap),
        groups,
        measure_gains(labels, scores, threshold, trivial, bootstrap),
    )


def open_reasons(path: Path, candidate: Candidate) -> Explainer | None:
    """The explainer of the model's scores; None if its graph, in ``path``, gives no reasons."""
    from closedloop.adapters.onnx_explainer import open_explainer

    try:
        return open_explainer(path, candidate.contract)
    except DataError as error:
        logger.warning("%s", error)
        return None


def measure_importance(explainer: Explainer, candidate: Candidate, seed: int) -> list[Importance]:
    """The importance of each feature, on at most 500 test rows."""
    features, rows = candidate.contract.features, candidate.test
    if len(rows) > IMPORTANCE_ROWS:
        rows = rows.sample(IMPORTANCE_ROWS, random_state=seed)
    matrix = encode_frame(features, rows)
    categorical = [feature.name for feature in features if not isinstance(feature, NumericFeature)]
    return rank_importance(candidate.contract.feature_names, explainer.weigh(matrix), matrix, categorical)


def choose_examples(explainer: Explainer, candidate: Candidate) -> list[Example]:
    """Three test rows with their reasons: the highest score, the one nearest to the threshold, and the lowest."""
    scores, names = candidate.scores, candidate.contract.feature_names
    places = {
        "the highest score": int(scores.argmax()),
        "nearest to the threshold": int(np.abs(scores - candidate.contract.threshold).argmin()),
        "the lowest score": int(scores.argmin()),
    }
    rows = candidate.test.iloc[[*places.values()]]
    values = [[None if pd.isna(one) else one for one in row] for row in rows[[*names]].astype(object).to_numpy()]
    found = explainer.explain(encode_frame(candidate.contract.features, rows), values, EXAMPLE_REASONS)
    return [
        Example(chosen, float(scores[place]), bool(candidate.labels[place]), explained.reasons)
        for (chosen, place), explained in zip(places.items(), found, strict=True)
    ]


def choose_bootstrap(params: Params, test: pd.DataFrame) -> Bootstrap:
    """The resamples of the test rows by which every interval is drawn: whole customers, the same ones each time."""
    customers = test["customer_id"].to_numpy()
    return Bootstrap(params.seed, params.evaluation.bootstrap_samples, params.evaluation.level, customers)


def score_trivially(dataset: DatasetConfig, train: pd.DataFrame, test: pd.DataFrame) -> dict[str, np.ndarray]:
    """The test rows' scores by the training rows' churn rate, and by the best rule on recency if there are events."""
    trivial = {"one score for all": np.full(len(test), float(train[LABEL].mean()))}
    if dataset.label is not None:
        column = f"{dataset.label.event_type}_recency_days"
        days, known = test[column].to_numpy(), train[LABEL].to_numpy()
        trivial["a recency rule"] = score_recency(train[column].to_numpy(), known, days)
    return trivial


def find_strong_columns(
    params: Params, dataset: DatasetConfig, candidate: Candidate, roc_auc: float
) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """How far each column ranks the label, and pairs of them if the model does suspiciously well and no column alone.

    Raises
    ------
    ConfigError
        If the allow-list names what is no feature.
    """
    limits, features = dataset.gates, candidate.contract.features
    if unknown := sorted(set(limits.single_column_allowed) - {feature.name for feature in features}):
        raise ConfigError(
            f"configs/datasets/{dataset.name}.yaml: gates.single_column_allowed names {', '.join(unknown)}; "
            f"features of this model are {', '.join(feature.name for feature in features)}"
        )
    judged = [feature for feature in features if feature.name not in limits.single_column_allowed]
    numeric = [feature.name for feature in judged if isinstance(feature, NumericFeature)]
    categorical = [feature.name for feature in judged if not isinstance(feature, NumericFeature)]
    rows = pd.concat([candidate.train, candidate.test], ignore_index=True)
    columns = rank_columns(rows, numeric, categorical, rows[LABEL], seed=params.seed)
    limit = limits.single_column_auc_max
    if roc_auc < limit or max(columns.values(), default=1.0) >= limit:
        return columns, {}
    return columns, rank_pairs(rows, numeric, categorical, rows[LABEL], seed=params.seed)


def measure_baseline(params: Params, candidate: Candidate, bootstrap: Bootstrap) -> dict[str, Any]:
    """A logistic regression with its usual parameters, fitted on at most 50,000 training rows: is the model worth it?

    ``verdict`` is the model's against it: win, lose or inconclusive.
    """
    features, train = candidate.contract.features, candidate.train
    if len(train) > BASELINE_ROWS_MAX:
        train = train.sample(BASELINE_ROWS_MAX, random_state=params.seed)
    pipeline = build_pipeline(
        features,
        model_type=BASELINE_TYPE,
        model_params={},
        normalize=True,
        feature_selection=None,
        seed=params.seed,
        missing=list_missing(features, train),
    )
    pipeline.fit(train, train[LABEL].to_numpy(), **list_fit_weights(pipeline, train))
    scores = score(pipeline, candidate.test)
    figures = measure_classification(candidate.labels, scores, 0.5)
    compared = compare_models(
        candidate.labels,
        scores,
        candidate.scores,
        champion_threshold=0.5,
        challenger_threshold=candidate.contract.threshold,
        bootstrap=bootstrap,
    )
    found = {name: figures[name] for name in BASELINE_FIGURES}
    return {"model_type": BASELINE_TYPE, "figures": found, **asdict(compared)}
