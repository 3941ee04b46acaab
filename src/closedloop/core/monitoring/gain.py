"""The log loss that a recalibration would win back on closed outcomes: cross-fitted, its error by customers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from closedloop.core.evaluation.metrics import list_log_losses
from closedloop.core.monitoring.performance import Calibration, calibrate
from closedloop.core.training.splits import hash_shares

FOLDS = 5


class Gain(NamedTuple):
    """Mean log loss of each row that a recalibration wins back, nats, and its standard error over customers.

    ``intercept`` and ``slope`` are those of a recalibration on all rows (`Calibration`): 0 and 1 change nothing.
    """

    mean: float
    error: float
    customers: int
    intercept: float
    slope: float


def estimate_gain(labels: npt.ArrayLike, scores: npt.ArrayLike, customers: npt.ArrayLike) -> Gain:
    """How much log loss a logistic recalibration (Cox 1958) saves on customers that it was not fitted on.

    Customers fall into five folds by a stable hash; each fold is recalibrated by the other four, so that a model that
    needs nothing shows a gain of about 0, or just below it. The scores are taken at their word: nothing of the model's
    own evaluation enters, so an error that it was born with is no norm.

    Parameters
    ----------
    labels, scores
        Closed outcomes 0/1 and probabilities of churn, shape (n,).
    customers
        The customer of each row; a missing one is a customer of its own.

    Examples
    --------
    >>> scores = np.full(400, 0.2)
    >>> found = estimate_gain(np.arange(400) % 2, scores, np.arange(400))
    >>> round(found.mean, 2), found.mean > 4 * found.error
    (0.22, True)
    """
    truth, score = np.asarray(labels, dtype=np.int8), np.asarray(scores, dtype=np.float64)
    ids = pd.Series(np.asarray(customers, dtype=object))
    ids = ids.where(ids.notna(), pd.Series([f"row {number}" for number in range(len(ids))]))
    fold = np.floor(hash_shares(ids, "gain") * FOLDS)
    recalibrated = score.copy()
    for place in range(FOLDS):
        mine = fold == place
        if mine.any() and not mine.all():
            recalibrated[mine] = calibrate(score[~mine], truth[~mine]).apply(score[mine])
    gains = list_log_losses(truth, score) - list_log_losses(truth, recalibrated)
    mean, owners = float(gains.mean()), pd.factorize(ids)[0]
    residuals = np.bincount(owners, gains - mean)
    whole: Calibration = calibrate(score, truth)
    return Gain(mean, float(np.sqrt(residuals @ residuals) / len(gains)), len(residuals), whole.intercept, whole.slope)


def score_calibration(labels: npt.ArrayLike, scores: npt.ArrayLike, customers: npt.ArrayLike) -> float:
    """How many standard errors the outcomes are away from what the scores promised, without a sign.

    The score test of a recalibration's intercept with the variance of the customers' own sums (Boos 1992, "On
    generalized score tests", The American Statistician 46). Where few rows stand for many it finds a change far sooner
    than the gain, whose error is that of the few.

    Parameters
    ----------
    labels, scores, customers
        As for `estimate_gain`.

    Examples
    --------
    >>> round(score_calibration([1] * 60 + [0] * 40, [0.5] * 100, range(100)), 2)
    2.0
    """
    residuals = np.asarray(labels, dtype=np.float64) - np.asarray(scores, dtype=np.float64)
    ids = pd.Series(np.asarray(customers, dtype=object))
    ids = ids.where(ids.notna(), pd.Series([f"row {number}" for number in range(len(ids))]))
    sums = np.bincount(pd.factorize(ids)[0], residuals)
    error = float(np.sqrt(sums @ sums))
    return abs(float(sums.sum())) / error if error else 0.0
