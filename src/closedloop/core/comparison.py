"""Is the challenger better than the champion? Paired, on the same rows, with uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from closedloop.core.metrics import (
    Interval,
    check_scores,
    draw_resamples,
    find_interval,
    list_log_losses,
    rank_auc,
)

Verdict = Literal["win", "lose", "inconclusive"]
# Below these the percentile bootstrap covers too little, and chance would promote models.
CUSTOMERS_MIN = 30
CLASS_ROWS_MIN = 10
# McNemar's chi-squared approximation is usual from 25 disagreeing rows on; the exact test below.
EXACT_BELOW_ROWS = 25


@dataclass(frozen=True)
class Comparison:
    """What the champion-challenger gate decided, and on what; every difference is challenger minus champion."""

    verdict: Verdict
    reason: str
    rows: int
    customers: int
    auc_difference: float
    auc_interval: Interval
    log_loss_difference: float
    log_loss_interval: Interval
    accuracy_difference: float
    mcnemar_p: float


def compare_models(
    labels: npt.ArrayLike,
    champion_scores: npt.ArrayLike,
    challenger_scores: npt.ArrayLike,
    *,
    champion_threshold: float,
    challenger_threshold: float,
    seed: int,
    samples: int = 1000,
    level: float = 0.95,
    customers: npt.ArrayLike | None = None,
) -> Comparison:
    """Compare two models' scores of the same rows by a paired bootstrap.

    The rule, which treats both models alike: a figure (log loss, AUC) is *better* or *worse* if the interval of its
    difference lies wholly on that side of 0. The challenger wins if a figure is better and none is worse, loses if
    one is worse and none is better; anything else, conflict and too few rows included, is inconclusive. Each figure
    errs with probability (1 - level) / 2 on each side, so that at most about 1 - level of equally good challengers
    are promoted.

    Parameters
    ----------
    labels, champion_scores, challenger_scores : array-like, shape (n,)
        Labels 0/1 and probabilities of churn in [0, 1], row for row the same customers.
    champion_threshold, challenger_threshold : float in [0, 1]
        Only the accuracy difference and McNemar's test, which are reported, not decided on, depend on them.
    seed : int
        Both models see the same resamples.
    customers : array-like, shape (n,), optional
        Customer of each row; where ids repeat, whole customers are drawn. McNemar's p takes rows as independent.

    Raises
    ------
    UnusableScores
        If only one class occurs, lengths differ, or a value is missing or out of range.

    Examples
    --------
    >>> labels = np.tile([0, 0, 0, 1], 50)
    >>> blind, sharp = np.full(200, 0.25), np.where(labels == 1, 0.7, 0.1)
    >>> compare_models(labels, blind, sharp, champion_threshold=0.5, challenger_threshold=0.5, seed=1).verdict
    'win'
    """
    truth, champion = check_scores(labels, champion_scores, champion_threshold)
    _, challenger = check_scores(labels, challenger_scores, challenger_threshold)
    champion_auc, challenger_auc = rank_auc(truth, champion), rank_auc(truth, challenger)
    loss_gaps = list_log_losses(truth, challenger) - list_log_losses(truth, champion)
    draws = np.array(
        [
            (challenger_auc(counts) - champion_auc(counts), counts @ loss_gaps / counts.sum())
            for counts in draw_resamples(len(truth), seed=seed, samples=samples, customers=customers)
        ]
    )
    auc_interval, loss_interval = find_interval(draws[:, 0], level), find_interval(draws[:, 1], level)
    champion_right = (champion >= champion_threshold) == truth
    challenger_right = (challenger >= challenger_threshold) == truth
    once = np.ones(len(truth))
    units = len(truth) if customers is None else pd.Series(np.asarray(customers, dtype=object)).nunique()
    verdict, reason = _decide(auc_interval, loss_interval, _find_shortage(truth, units))
    return Comparison(
        verdict=verdict,
        reason=reason,
        rows=len(truth),
        customers=units,
        auc_difference=challenger_auc(once) - champion_auc(once),
        auc_interval=auc_interval,
        log_loss_difference=float(loss_gaps.mean()),
        log_loss_interval=loss_interval,
        accuracy_difference=float(challenger_right.mean() - champion_right.mean()),
        mcnemar_p=_test_mcnemar(champion_right, challenger_right),
    )


def _find_shortage(truth: npt.NDArray[np.int8], units: int) -> str:
    churners = int(truth.sum())
    fewest = min(churners, len(truth) - churners)
    if units < CUSTOMERS_MIN:
        return f"{units} customers are too few to compare on, at least {CUSTOMERS_MIN} are needed"
    if fewest < CLASS_ROWS_MIN:
        return f"one class has {fewest} rows, at least {CLASS_ROWS_MIN} are needed to compare"
    return ""


def _decide(auc: Interval, log_loss: Interval, shortage: str) -> tuple[Verdict, str]:
    if shortage:
        return "inconclusive", shortage
    # Lower log loss is better: mirrored, so that both figures read the same way.
    sides = {_find_side(auc.low, auc.high), _find_side(-log_loss.high, -log_loss.low)}
    found = f"log loss changes by {log_loss.low:+.4f} to {log_loss.high:+.4f}, AUC by {auc.low:+.4f} to {auc.high:+.4f}"
    if sides == {"better", "worse"}:
        return "inconclusive", f"log loss and AUC contradict each other: {found}"
    if "better" in sides:
        return "win", f"the challenger is better: {found}"
    if "worse" in sides:
        return "lose", f"the challenger is worse: {found}"
    return "inconclusive", f"no difference beyond chance: {found}"


def _find_side(low: float, high: float) -> Literal["better", "worse", "level"]:
    if low > 0:
        return "better"
    return "worse" if high < 0 else "level"


def _test_mcnemar(champion_right: npt.NDArray[np.bool_], challenger_right: npt.NDArray[np.bool_]) -> float:
    only_champion = int((champion_right & ~challenger_right).sum())
    only_challenger = int((challenger_right & ~champion_right).sum())
    if only_champion + only_challenger == 0:
        return 1.0
    from statsmodels.stats.contingency_tables import mcnemar

    table = [[0, only_champion], [only_challenger, 0]]
    return float(mcnemar(table, exact=only_champion + only_challenger < EXACT_BELOW_ROWS).pvalue)
