"""Is the challenger better than the champion? Paired, on the same rows, with uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from closedloop.core.evaluation.bootstrap import Bootstrap, Interval
from closedloop.core.evaluation.metrics import check_scores, list_log_losses, rank_auc
from closedloop.errors import count_noun

ComparisonResult = Literal["win", "lose", "inconclusive"]
# Below these the percentile bootstrap covers too little, and chance would promote models.
CUSTOMERS_MIN = 30
CLASS_ROWS_MIN = 10
# A challenger whose AUC is certain to be lower by more than this ranks customers too badly, whatever its log loss.
AUC_LOSS_MAX = 0.02
# McNemar's chi-squared approximation is usual from 25 disagreeing rows on; the exact test below.
EXACT_BELOW_ROWS = 25


@dataclass(frozen=True)
class Comparison:
    """The decision of the champion-challenger gate, and its grounds; every difference is challenger minus champion."""

    verdict: ComparisonResult
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
    bootstrap: Bootstrap,
) -> Comparison:
    """Compare two models' scores of the same rows by a paired bootstrap.

    The rule: the challenger wins if the interval of the difference in log loss lies wholly below 0, and loses if it
    lies wholly above 0; anything else, too few rows included, is inconclusive. Log loss comes first, since thresholds
    and prices rest on probabilities. AUC only guards: a win is inconclusive if the whole interval of the AUC's
    difference lies below -`AUC_LOSS_MAX`. At most about (1 - level) / 2 of equally good challengers win.

    Parameters
    ----------
    labels, champion_scores, challenger_scores : array-like, shape (n,)
        Labels 0/1 and probabilities of churn in [0, 1], row for row the same customers.
    champion_threshold, challenger_threshold : float in [0, 1]
        Only the accuracy difference and McNemar's test, which are reported, not decided on, depend on them.
    bootstrap : Bootstrap
        Both models see the same resamples. McNemar's p takes rows as independent.

    Raises
    ------
    UnusableScores
        If only one class occurs, lengths differ, or a value is missing or out of range.

    Examples
    --------
    >>> labels = np.tile([0, 0, 0, 1], 50)
    >>> blind, sharp = np.full(200, 0.25), np.where(labels == 1, 0.7, 0.1)
    >>> at = {"champion_threshold": 0.5, "challenger_threshold": 0.5}
    >>> compare_models(labels, blind, sharp, **at, bootstrap=Bootstrap(seed=1)).verdict
    'win'
    """
    truth, champion = check_scores(labels, champion_scores, champion_threshold)
    _, challenger = check_scores(labels, challenger_scores, challenger_threshold)
    champion_auc, challenger_auc = rank_auc(truth, champion), rank_auc(truth, challenger)
    loss_gaps = list_log_losses(truth, challenger) - list_log_losses(truth, champion)
    draws = np.array(
        [
            (challenger_auc(counts) - champion_auc(counts), counts @ loss_gaps / counts.sum())
            for counts in bootstrap.draw(len(truth))
        ]
    )
    auc_interval, loss_interval = bootstrap.find_interval(draws[:, 0]), bootstrap.find_interval(draws[:, 1])
    champion_right = (champion >= champion_threshold) == truth
    challenger_right = (challenger >= challenger_threshold) == truth
    once = np.ones(len(truth))
    known = bootstrap.customers
    units = len(truth) if known is None else pd.Series(np.asarray(known, dtype=object)).nunique()
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
        return f"{count_noun(units, 'customer')}: too few to compare on, at least {CUSTOMERS_MIN} are needed"
    if fewest < CLASS_ROWS_MIN:
        return f"one class has {count_noun(fewest, 'row')}, at least {CLASS_ROWS_MIN} are needed to compare"
    return ""


def _decide(auc: Interval, log_loss: Interval, shortage: str) -> tuple[ComparisonResult, str]:
    if shortage:
        return "inconclusive", shortage
    found = f"log loss changes by {log_loss.low:+.4f} to {log_loss.high:+.4f}, AUC by {auc.low:+.4f} to {auc.high:+.4f}"
    if log_loss.low > 0:
        return "lose", f"the challenger is worse: {found}"
    if log_loss.high >= 0:
        return "inconclusive", f"no difference beyond chance: {found}"
    if auc.high < -AUC_LOSS_MAX:
        return "inconclusive", f"log loss is better, but AUC falls by more than {AUC_LOSS_MAX:g}: {found}"
    return "win", f"the challenger is better: {found}"


def _test_mcnemar(champion_right: npt.NDArray[np.bool_], challenger_right: npt.NDArray[np.bool_]) -> float:
    only_champion = int((champion_right & ~challenger_right).sum())
    only_challenger = int((challenger_right & ~champion_right).sum())
    if only_champion + only_challenger == 0:
        return 1.0
    from statsmodels.stats.contingency_tables import mcnemar

    table = [[0, only_champion], [only_challenger, 0]]
    return float(mcnemar(table, exact=only_champion + only_challenger < EXACT_BELOW_ROWS).pvalue)
