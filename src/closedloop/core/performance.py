"""How well a model does, before labels are there and after: expected figures from calibrated probabilities.

Everywhere below, ``scores`` is shape (n,), the model's probabilities of churn; ``labels`` is shape (n,), 0 or 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from closedloop.core.metrics import rank_auc

Floats = npt.NDArray[np.float64]


class Calibration(NamedTuple):
    """logit P(churn) = ``intercept`` + ``slope`` logit(score), and how many labelled rows it was learnt from."""

    intercept: float
    slope: float
    rows: int

    def apply(self, scores: Floats) -> Floats:
        """Calibrated probabilities, shape (n,)."""
        return _expit(self.intercept + self.slope * _logit(scores))


class Expected(NamedTuple):
    """Figures that calibrated probabilities let expect, and the standard error of the accuracy's mean."""

    accuracy: float
    brier: float
    roc_auc: float
    churn_rate: float
    accuracy_error: float
    rows: int


class Realised(NamedTuple):
    """Figures of rows whose labels are known, beside those expected of the same rows.

    ``loss_excess`` is the Brier score above the expected one, ``churn_gap`` the churn rate above the expected one;
    their ``_z`` are in standard errors under the hypothesis that the probabilities are calibrated.
    """

    accuracy: float
    brier: float
    roc_auc: float | None
    churn_rate: float
    expected: Expected
    loss_excess: float
    loss_excess_z: float
    churn_gap: float
    churn_gap_z: float
    rows: int


def calibrate(scores: npt.ArrayLike, labels: npt.ArrayLike) -> Calibration:
    """Logistic recalibration (Cox 1958; Platt 1999), fitted by Newton's method.

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
    truth = np.asarray(labels, dtype=np.float64)
    design = np.column_stack([np.ones(len(truth)), _logit(np.asarray(scores, dtype=np.float64))])
    weights = np.array([0.0, 1.0])
    for _ in range(50):
        probability = _expit(design @ weights)
        spread = probability * (1 - probability)
        # a little ridge towards the scores as they are: one class only, or one score only, has no finite solution
        gradient = design.T @ (truth - probability) - 1e-3 * (weights - [0.0, 1.0])
        step = np.linalg.solve(design.T @ (design * spread[:, None]) + 1e-3 * np.eye(2), gradient)
        weights = weights + np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < 1e-9:
            break
    return Calibration(float(weights[0]), float(weights[1]), len(truth))


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


def realise(labels: npt.ArrayLike, scores: npt.ArrayLike, calibration: Calibration, threshold: float) -> Realised:
    """Figures of labelled rows, and whether they agree with the calibrated probabilities.

    ``loss_excess_z`` is Spiegelhalter's (1986) statistic: the squared errors beyond those that the probabilities
    themselves announce. Harder customers do not move it, a change of what scores mean does. ``churn_gap_z`` is
    calibration in the large, which a shifted base rate moves while the ranking, and so the AUC, stays. Both are
    widened for the finite rows that the calibration was learnt from.
    """
    truth, score = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    expected = expect(score, calibration, threshold)
    probability = calibration.apply(score)
    spread, rows = probability * (1 - probability), len(score)
    widening = np.sqrt(1 + rows / calibration.rows)
    loss_error = np.sqrt(((1 - 2 * score) ** 2 * spread).sum()) / rows * widening
    gap_error = np.sqrt(spread.sum()) / rows * widening
    brier, gap = float(((truth - score) ** 2).mean()), float(truth.mean() - probability.mean())
    excess = brier - expected.brier
    return Realised(
        accuracy=float(((score >= threshold) == (truth == 1)).mean()),
        brier=brier,
        roc_auc=rank_auc(truth, score)(np.ones(rows)) if 0 < truth.mean() < 1 else None,
        churn_rate=float(truth.mean()),
        expected=expected,
        loss_excess=excess,
        loss_excess_z=float(excess / loss_error) if loss_error else 0.0,
        churn_gap=gap,
        churn_gap_z=float(gap / gap_error) if gap_error else 0.0,
        rows=rows,
    )


def _logit(scores: Floats) -> Floats:
    clipped = np.clip(scores, 1e-6, 1 - 1e-6)
    return np.log(clipped) - np.log1p(-clipped)


def _expit(values: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-values)), dtype=np.float64)
