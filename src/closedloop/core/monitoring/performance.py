"""How well a model does, before labels are there and after: expected figures from calibrated probabilities.

Everywhere below, ``scores`` is shape (n,), the model's probabilities of churn; ``labels`` is shape (n,), 0 or 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from closedloop.core.evaluation.metrics import rank_auc

Floats = npt.NDArray[np.float64]
ADDED_WEIGHT = 1e-3


class Calibration(NamedTuple):
    """logit P(churn) = ``intercept`` + ``slope`` logit(score), and how many labelled rows it was learnt from."""

    intercept: float
    slope: float
    rows: int

    def apply(self, scores: Floats) -> Floats:
        """Calibrated probabilities, shape (n,)."""
        return _expit(self.intercept + self.slope * _logit(scores))


AS_GIVEN = Calibration(0.0, 1.0, 0)  # scores are taken at their word


class Expected(NamedTuple):
    """Figures that calibrated probabilities let expect, and the standard error of the accuracy's mean."""

    accuracy: float
    brier: float
    roc_auc: float
    churn_rate: float
    accuracy_error: float
    rows: int


class Realised(NamedTuple):
    """Figures of rows whose labels are known, beside those that their scores promised."""

    accuracy: float
    brier: float
    roc_auc: float | None
    churn_rate: float
    expected: Expected
    rows: int


def calibrate(scores: npt.ArrayLike, labels: npt.ArrayLike) -> Calibration:
    """Logistic recalibration (Cox 1958; Platt 1999): scikit-learn's logistic regression on the scores' log odds.

    Parameters
    ----------
    scores, labels
        Of rows that the model was not trained on: the reference.

    Examples
    --------
    >>> found = calibrate([0.2] * 10 + [0.8] * 10, [0] * 8 + [1] * 2 + [0] * 2 + [1] * 8)
    >>> round(found.intercept, 6) + 0.0, round(found.slope, 6)
    (0.0, 1.0)
    """
    from sklearn.linear_model import LogisticRegression

    truth = np.asarray(labels, dtype=np.float64)
    # of almost no weight, and calibrated: with one class only, or one score only, there would be no finite solution
    added = np.array([0.25, 0.25, 0.75, 0.75])
    odds = _logit(np.concatenate([np.asarray(scores, dtype=np.float64), added]))
    weights = np.concatenate([np.ones(len(truth)), ADDED_WEIGHT * np.array([0.75, 0.25, 0.25, 0.75])])
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-9)
    model.fit(odds[:, None], np.concatenate([truth, [0, 1, 0, 1]]), sample_weight=weights)
    return Calibration(float(model.intercept_[0]), float(model.coef_[0, 0]), len(truth))


def expect(scores: npt.ArrayLike, calibration: Calibration, threshold: float) -> Expected:
    """Confidence-based performance estimation: what the model's own calibrated probabilities let expect.

    A row with score s and probability p is decided rightly with probability p if it is called churning, else 1 - p;
    its expected squared error is p (1 - s)^2 + (1 - p) s^2; the AUC weighs it as p of a churner and 1 - p of a
    stayer. Described
    as average confidence by Guillory et al. (2021, arXiv:2107.03315) and as CBPE in NannyML's documentation
    (docs: how it works, estimation of performance of the monitored model). It holds as long as P(churn | score)
    is what it was: no method without labels sees a change of concept.

    Raises
    ------
    ValueError
        If there is no row.
    """
    score = np.asarray(scores, dtype=np.float64)
    if not len(score):
        raise ValueError("scores: found none, allowed is at least one")
    probability = calibration.apply(score)
    right = np.where(score >= threshold, probability, 1 - probability)
    return Expected(
        accuracy=float(right.mean()),
        brier=float((probability * (1 - score) ** 2 + (1 - probability) * score**2).mean()),
        roc_auc=rank_auc(probability, score)(np.ones(len(score))),
        churn_rate=float(probability.mean()),
        accuracy_error=float(right.std(ddof=0) / np.sqrt(len(score))),
        rows=len(score),
    )


def fall(reference: Expected, window: Expected) -> tuple[float, float]:
    """By how much the expected accuracy fell from reference to window, and that in standard errors of both."""
    drop = reference.accuracy - window.accuracy
    error = np.hypot(reference.accuracy_error, window.accuracy_error)
    return drop, float(drop / error) if error else 0.0


def realise(labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float) -> Realised:
    """Figures of labelled rows, beside what the scores promised if they are taken at their word.

    No recalibration on the model's own evaluation enters: with it, an error that the model was born with would be what
    is expected.
    """
    truth, score = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    return Realised(
        accuracy=float(((score >= threshold) == (truth == 1)).mean()),
        brier=float(((truth - score) ** 2).mean()),
        roc_auc=rank_auc(truth, score)(np.ones(len(score))) if 0 < truth.mean() < 1 else None,
        churn_rate=float(truth.mean()),
        expected=expect(score, AS_GIVEN, threshold),
        rows=len(score),
    )


def _logit(scores: Floats) -> Floats:
    clipped = np.clip(scores, 1e-6, 1 - 1e-6)
    return np.log(clipped) - np.log1p(-clipped)


def _expit(values: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-values)), dtype=np.float64)
