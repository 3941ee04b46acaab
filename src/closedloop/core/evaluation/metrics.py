"""How well scores agree with what happened: point figures and their uncertainty.

Everywhere below, ``labels`` is shape (n,), bool or 0/1, 1 = churned; ``scores`` is shape (n,), probabilities of
churn in [0, 1]; and the decision is "churns" where ``score >= threshold``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from closedloop.core.evaluation.bootstrap import Bootstrap, Floats, Interval, UnusableScores
from closedloop.errors import count_noun

CALIBRATION_BINS = 10


def measure_classification(labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float) -> dict[str, float]:
    """Every figure of the model's report.

    Parameters
    ----------
    labels, scores : array-like, shape (n,)
        See the module's docstring.
    threshold : float in [0, 1]

    Returns
    -------
    dict of str to float
        ``accuracy``, ``f1_weighted`` (mean of both classes' F1, weighted by their rows), ``f1``, ``precision``,
        ``recall`` (churn class; 0 where undefined), ``roc_auc``, ``average_precision``, ``log_loss`` (nats; scores
        of exactly 0 or 1 are clipped by 2.2e-16), ``brier``, ``expected_calibration_error`` (10 equal-count bins),
        ``lift`` (churn rate of the tenth with the highest scores over that of all rows), ``churn_rate``,
        ``predicted_rate``, ``mean_score``, ``rows``.

    Raises
    ------
    UnusableScores
        If only one class occurs, lengths differ, or a value is missing or out of range.

    Examples
    --------
    >>> figures = measure_classification([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9], 0.5)
    >>> figures["accuracy"], figures["roc_auc"], figures["predicted_rate"]
    (0.5, 0.75, 0.5)
    """
    from sklearn import metrics

    truth, score = check_scores(labels, scores, threshold)
    decided = score >= threshold
    figures = {
        "accuracy": metrics.accuracy_score(truth, decided),
        "f1_weighted": metrics.f1_score(truth, decided, average="weighted", zero_division=0),
        "f1": metrics.f1_score(truth, decided, zero_division=0),
        "precision": metrics.precision_score(truth, decided, zero_division=0),
        "recall": metrics.recall_score(truth, decided, zero_division=0),
        "roc_auc": metrics.roc_auc_score(truth, score),
        "average_precision": metrics.average_precision_score(truth, score),
        "log_loss": metrics.log_loss(truth, score),
        "brier": metrics.brier_score_loss(truth, score),
        "expected_calibration_error": _expected_calibration_error(truth, score),
        "lift": rank_top(truth, score)[1](np.ones(len(truth))),
        "churn_rate": truth.mean(),
        "predicted_rate": decided.mean(),
        "mean_score": score.mean(),
        "rows": len(truth),
    }
    return {name: float(figure) for name, figure in figures.items()}


def bootstrap_intervals(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    threshold: float,
    bootstrap: Bootstrap,
) -> dict[str, Interval]:
    """Bootstrap intervals of the main figures.

    Parameters
    ----------
    labels, scores, threshold
        As in `measure_classification`.
    bootstrap : Bootstrap
        Same seed, same intervals. Resamples that drew one class only have no AUC and do not count for it.

    Returns
    -------
    dict of str to Interval
        Of accuracy, f1_weighted, roc_auc, brier, log_loss, lift, and average_precision_gain: average precision above
        the churn rate, which is what a model without skill has.

    Raises
    ------
    UnusableScores
        As in `measure_classification`.
    """
    truth, score = check_scores(labels, scores, threshold)
    measures = _list_measures(truth, score, threshold)
    draws = np.array([[measure(counts) for measure in measures.values()] for counts in bootstrap.draw(len(truth))])
    return {name: bootstrap.find_interval(draws[:, column]) for column, name in enumerate(measures)}


def rank_auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> Callable[[Floats], float]:
    """Sort once, and get a function from row weights (n,) to the weighted ROC AUC (nan if a class weighs 0).

    The AUC is the Mann-Whitney statistic: the share of (churner, stayer) pairs in which the churner scored higher,
    a tie counting half (Hanley and McNeil 1982). Sorting once makes a resample linear in the rows.

    Examples
    --------
    >>> rank_auc([0, 1, 1], [0.2, 0.2, 0.9])(np.array([1.0, 1.0, 1.0]))
    0.75
    """
    score = np.asarray(scores, dtype=np.float64)
    order = np.argsort(score, kind="stable")
    ranked = score[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    churned = np.asarray(labels)[order].astype(np.float64)

    def weigh(weights: Floats) -> float:
        sorted_weights = weights[order]
        positives = np.add.reduceat(sorted_weights * churned, starts)
        totals = np.add.reduceat(sorted_weights, starts)
        negatives = totals - positives
        below = np.cumsum(negatives) - negatives
        pairs = positives.sum() * negatives.sum()
        return float(positives @ (below + negatives / 2) / pairs) if pairs else float("nan")

    return weigh


def rank_top(
    labels: npt.ArrayLike, scores: npt.ArrayLike, share: float = 0.1
) -> tuple[Callable[[Floats], float], Callable[[Floats], float]]:
    """Sort once, and get two functions of row weights (n,); nan where no churner has weight.

    The first is average precision minus the churn rate, the second the lift: the churn rate of the ``share`` with the
    highest scores over that of all. Rows of equal score count in equal parts.

    Examples
    --------
    >>> gain, lift = rank_top([0, 1, 0, 0], [0.1, 0.9, 0.2, 0.3], share=0.25)
    >>> gain(np.ones(4)), lift(np.ones(4))
    (0.75, 4.0)
    """
    score = np.asarray(scores, dtype=np.float64)
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    churned = np.asarray(labels)[order].astype(np.float64)

    def cumulate(weights: Floats) -> tuple[Floats, Floats]:
        """Weight, and churners' weight, down to each score."""
        sorted_weights = weights[order]
        churners = np.cumsum(np.add.reduceat(sorted_weights * churned, starts))
        return np.cumsum(np.add.reduceat(sorted_weights, starts)), churners

    def weigh_gain(weights: Floats) -> float:
        rows, churners = cumulate(weights)
        if not churners[-1]:
            return float("nan")
        precision = np.divide(churners, rows, out=np.zeros_like(rows), where=rows > 0)
        recall_steps = np.diff(churners, prepend=0) / churners[-1]
        return float(recall_steps @ precision - churners[-1] / rows[-1])

    def weigh_lift(weights: Floats) -> float:
        rows, churners = cumulate(weights)
        if not churners[-1]:
            return float("nan")
        caught = np.interp(share * rows[-1], np.r_[0.0, rows], np.r_[0.0, churners])
        return float(caught / (share * churners[-1]))

    return weigh_gain, weigh_lift


def list_log_losses(labels: npt.NDArray[np.int8 | np.bool_], scores: Floats) -> Floats:
    """Log loss of each row in nats, shape (n,), clipped as scikit-learn clips."""
    tiny = np.finfo(np.float64).eps
    clipped = np.clip(scores, tiny, 1 - tiny)
    return np.where(labels == 1, -np.log(clipped), -np.log1p(-clipped))


def measure_groups(
    labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float, groups: npt.ArrayLike, *, minimum_rows: int
) -> pd.DataFrame:
    """The model's figures for each group of customers.

    Parameters
    ----------
    groups : array-like, shape (n,)
        Group of each row; missing ones form the group ``(missing)``.
    minimum_rows : int
        Smaller groups are marked: their figures are mostly noise.

    Returns
    -------
    DataFrame
        One row a group, sorted by name: ``group`` str, ``rows`` int, ``enough_rows`` bool, and float ``accuracy``,
        ``roc_auc`` (nan if one class only), ``churn_rate``, ``predicted_rate``.
    """
    truth, score = check_scores(labels, scores, threshold, both_classes=False)
    given = pd.Series(np.asarray(groups, dtype=object))
    if len(given) != len(truth):
        raise UnusableScores(f"groups: found {count_noun(len(given), 'value')}, allowed are {len(truth)}, one a row")
    names = given.where(given.notna(), "(missing)").astype(str).to_numpy()
    lines = []
    for name in sorted(set(names)):
        of_group = names == name
        actual, decided = truth[of_group], score[of_group] >= threshold
        line = {
            "group": name,
            "rows": len(actual),
            "enough_rows": len(actual) >= minimum_rows,
            "accuracy": float(np.mean(actual == decided)),
            "roc_auc": rank_auc(actual, score[of_group])(np.ones(len(actual))),
            "churn_rate": float(actual.mean()),
            "predicted_rate": float(decided.mean()),
        }
        lines.append(line)
    return pd.DataFrame(lines)


def check_scores(
    labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float = 0.5, *, both_classes: bool = True
) -> tuple[npt.NDArray[np.int8], Floats]:
    """Labels as int8 and scores as float64, or a refusal that says what is wrong with them."""
    raw: npt.NDArray[Any] = np.asarray(labels)
    score = np.asarray(scores, dtype=np.float64)
    if raw.ndim != 1 or raw.shape != score.shape or not len(raw):
        raise UnusableScores(f"labels and scores: found shapes {raw.shape} and {score.shape}, allowed is (n,) twice")
    if not np.isin(raw, (0, 1)).all():
        raise UnusableScores("labels: found values other than 0 and 1, allowed are only these")
    if not ((score >= 0) & (score <= 1)).all():
        bad = int(np.flatnonzero(~((score >= 0) & (score <= 1)))[0])
        raise UnusableScores(f"scores: found {score[bad]} in row {bad}, allowed are probabilities from 0 to 1")
    if not 0 <= threshold <= 1:
        raise UnusableScores(f"threshold: found {threshold}, allowed is 0 to 1")
    truth = raw.astype(np.int8)
    if both_classes and truth.min() == truth.max():
        raise UnusableScores(
            f"labels: found only class {truth[0]} in {count_noun(len(truth), 'row')}, both 0 and 1 must occur"
        )
    return truth, score


def bin_scores(truth: npt.NDArray[np.int8], score: Floats, bins: int) -> pd.DataFrame:
    """Equal-count bins of the scores: ``bin`` (from 1), ``rows``, ``churners``, scores and ``churn_rate``."""
    mean_rank = pd.Series(score).rank(method="average").to_numpy()
    frame = pd.DataFrame({"bin": ((mean_rank - 0.5) * bins // len(score)).astype(int) + 1, "s": score, "y": truth})
    return frame.groupby("bin", as_index=False).agg(
        rows=("y", "size"),
        churners=("y", "sum"),
        lowest_score=("s", "min"),
        highest_score=("s", "max"),
        mean_score=("s", "mean"),
        churn_rate=("y", "mean"),
    )


def _list_measures(
    truth: npt.NDArray[np.int8], score: Floats, threshold: float
) -> dict[str, Callable[[Floats], float]]:
    decided = score >= threshold
    correct = (truth == decided).astype(np.float64)
    squares = (score - truth) ** 2
    losses = list_log_losses(truth, score)
    precision_gain, lift = rank_top(truth, score)
    cells = np.stack([decided & (truth == 1), decided & (truth == 0), ~decided & (truth == 1)]).astype(np.float64)

    def weigh_f1(counts: Floats) -> float:
        hits, false_alarms, misses = cells @ counts
        total = counts.sum()
        rejections = total - hits - false_alarms - misses
        wrong = false_alarms + misses
        churn_f1 = 2 * hits / (2 * hits + wrong) if hits + wrong else 0.0
        stay_f1 = 2 * rejections / (2 * rejections + wrong) if rejections + wrong else 0.0
        return float(((hits + misses) * churn_f1 + (false_alarms + rejections) * stay_f1) / total)

    return {
        "accuracy": lambda counts: float(counts @ correct / counts.sum()),
        "f1_weighted": weigh_f1,
        "roc_auc": rank_auc(truth, score),
        "brier": lambda counts: float(counts @ squares / counts.sum()),
        "log_loss": lambda counts: float(counts @ losses / counts.sum()),
        "average_precision_gain": precision_gain,
        "lift": lift,
    }


def _expected_calibration_error(truth: npt.NDArray[np.int8], score: Floats) -> float:
    # Naeini et al. 2015, with equal-count bins: most churn scores are low, and equal-width bins would be near empty.
    table = bin_scores(truth, score, CALIBRATION_BINS)
    gaps = (table["churn_rate"] - table["mean_score"]).abs()
    return float((gaps * table["rows"]).sum() / len(truth))
