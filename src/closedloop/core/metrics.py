"""How well scores agree with what happened: point figures and their uncertainty.

Everywhere below, ``labels`` is shape (n,), bool or 0/1, 1 = churned; ``scores`` is shape (n,), probabilities of
churn in [0, 1]; and the decision is "churns" where ``score >= threshold``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from closedloop.errors import DataError

Floats = npt.NDArray[np.float64]
CALIBRATION_BINS = 10


class UnusableScores(DataError, ValueError):
    """Labels and scores that no figure can be computed from: one class only, missing values, unequal lengths."""


class Interval(NamedTuple):
    """Both ends of a confidence interval, in the figure's own unit."""

    low: float
    high: float


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
        ``churn_rate``, ``predicted_rate``, ``mean_score``, ``rows``.

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
    *,
    seed: int,
    samples: int = 1000,
    level: float = 0.95,
    customers: npt.ArrayLike | None = None,
) -> dict[str, Interval]:
    """Percentile bootstrap intervals (Efron 1979) of the main figures.

    Parameters
    ----------
    labels, scores, threshold
        As in `measure_classification`.
    seed : int
        Same seed, same intervals.
    samples : int
        Number of resamples. Those that drew one class only have no AUC and do not count for it.
    level : float in (0, 1)
    customers : array-like, shape (n,), optional
        Customer of each row. Where ids repeat, whole customers are drawn: a customer's snapshots resemble each
        other, and drawing single rows would call the model more certain than it is.

    Returns
    -------
    dict of str to Interval
        Of accuracy, f1_weighted, roc_auc, brier and log_loss.

    Raises
    ------
    UnusableScores
        As in `measure_classification`.
    """
    truth, score = check_scores(labels, scores, threshold)
    measures = _list_measures(truth, score, threshold)
    draws = np.array(
        [
            [measure(counts) for measure in measures.values()]
            for counts in draw_resamples(len(truth), seed=seed, samples=samples, customers=customers)
        ]
    )
    return {name: find_interval(draws[:, column], level) for column, name in enumerate(measures)}


def draw_resamples(rows: int, *, seed: int, samples: int, customers: npt.ArrayLike | None = None) -> Iterator[Floats]:
    """Yield ``samples`` bootstrap resamples as how often each row was drawn, shape (rows,).

    Rows are drawn, or whole customers where ids repeat (the cluster bootstrap; then the counts' sum varies).
    """
    generator = np.random.default_rng(seed)
    owners = np.arange(rows) if customers is None else pd.factorize(np.asarray(customers, dtype=object))[0]
    if len(owners) != rows or (owners < 0).any():
        raise UnusableScores(f"customers: found {len(owners)} ids, allowed are {rows} without a missing one")
    units = int(owners.max()) + 1
    for _ in range(samples):
        counts = np.bincount(generator.integers(0, units, units), minlength=units).astype(np.float64)
        yield counts[owners]


def find_interval(draws: Floats, level: float) -> Interval:
    """The central ``level`` of bootstrap draws, ignoring draws that had no figure (nan)."""
    known = draws[~np.isnan(draws)]
    if not len(known):
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


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
        raise UnusableScores(f"groups: found {len(given)} values, allowed are {len(truth)}, one a row")
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
        raise UnusableScores(f"labels: found only class {truth[0]} in {len(truth)} rows, both 0 and 1 must occur")
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
    }


def _expected_calibration_error(truth: npt.NDArray[np.int8], score: Floats) -> float:
    # Naeini et al. 2015, with equal-count bins: most churn scores are low, and equal-width bins would be near empty.
    table = bin_scores(truth, score, CALIBRATION_BINS)
    gaps = (table["churn_rate"] - table["mean_score"]).abs()
    return float((gaps * table["rows"]).sum() / len(truth))
