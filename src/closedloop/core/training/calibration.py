"""A fitted pipeline's scores: calibrated where that helps, and cut into decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from closedloop.core.evaluation.metrics import list_log_losses
from closedloop.core.training.estimators import score
from closedloop.core.training.splits import hash_shares
from closedloop.core.training.weights import has_class_weights
from closedloop.errors import DataError, count_noun

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline


def calibrate_pipeline(
    pipeline: Pipeline, frame: pd.DataFrame, labels: np.ndarray, ids: Sequence[str]
) -> tuple[Pipeline, str]:
    """Platt scaling of a fitted pipeline, where it lowers the log loss on held-out validation rows.

    Half of the customers (by a stable hash) fit the sigmoid, the other half compares it with the raw scores.
    If its mean gain there exceeds two standard errors, it is taken and fitted again on all rows. Isotonic is
    not offered: its graph takes the nearest knot where scikit-learn interpolates (skl2onnx 1.20).
    Platt (1999), "Probabilistic outputs for support vector machines".

    A classifier with class weights is always calibrated: its raw scores are not probabilities of these customers, but
    of others among whom the rare class is as frequent as its weight says.

    Parameters
    ----------
    frame, labels, ids
        Validation rows that the pipeline was not trained on, labels (bool, shape (n,)) and customer ids.

    Returns
    -------
    Pipeline, str
        The one to use, and a note of the held-out log losses that chose it.

    Raises
    ------
    DataError
        If class weights ask for a calibration, and a class has fewer than 5 validation rows.
    """
    truth = np.asarray(labels).astype(bool)
    if has_class_weights(pipeline[-1].get_params()):
        fewest = min(truth.sum(), len(truth) - truth.sum())
        if fewest < 5:
            raise DataError(
                f"class weights need a calibration: a class has {count_noun(fewest, 'validation row')}, 5 are needed; "
                "give more validation rows, or take class_weight and scale_pos_weight out of model.params"
            )
        note = f"sigmoid scores: class weights move the raw ones ({count_noun(len(truth), 'row')})"
        return fit_sigmoid(pipeline, frame, truth), note
    fitting = hash_shares(ids, "calibration") < 0.5
    counts = [int((truth[half] == value).sum()) for half in (fitting, ~fitting) for value in (True, False)]
    if min(counts) < 5:
        note = f"raw scores: half of the validation rows has {count_noun(min(counts), 'row')} of a class, 5 needed"
        return pipeline, note
    held_out = frame.loc[~fitting]
    sigmoid = fit_sigmoid(pipeline, frame.loc[fitting], truth[fitting])
    raw, scaled = (list_log_losses(truth[~fitting], score(each, held_out)) for each in (pipeline, sigmoid))
    gain = raw - scaled
    method = "sigmoid" if gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain)) else "raw"
    losses = {"raw": float(raw.mean()), "sigmoid": float(scaled.mean())}
    figures = ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items())
    note = f"{method} scores: held-out log loss {figures} ({count_noun(len(gain), 'row')})"
    chosen = fit_sigmoid(pipeline, frame, truth) if method == "sigmoid" else pipeline
    return chosen, note


def recalibrate_pipeline(pipeline: Pipeline, frame: pd.DataFrame, labels: np.ndarray) -> tuple[Pipeline, Pipeline]:
    """The same model with a new intercept and slope of its log odds, fitted on rows whose outcomes are newer.

    Two parameters follow a moved base rate after a few hundred rows; what customers do differently they cannot follow.

    Returns
    -------
    Pipeline, Pipeline
        The model without any calibration, and the recalibrated one.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator
    from sklearn.pipeline import Pipeline

    model = pipeline[-1]
    if isinstance(model, CalibratedClassifierCV):
        model = model.calibrated_classifiers_[0].estimator
    if isinstance(model, FrozenEstimator):
        model = model.estimator
    base = Pipeline([*pipeline.steps[:-1], ("model", model)])
    return base, fit_sigmoid(base, frame, np.asarray(labels).astype(bool))


def choose_threshold(
    labels: np.ndarray, scores: np.ndarray, rule: float | str, gains: np.ndarray | None = None
) -> float:
    """The decision threshold in [0, 1]: a score at or above it is a churner.

    Parameters
    ----------
    labels, scores
        Validation rows of both classes: bool, and probabilities in [0, 1]; shape (n,).
    rule
        A number in (0, 1), which is returned; or the figure to maximise, "accuracy", "f1" or "profit". Of equally good
        thresholds the one nearest to 0.5 wins. It lies between two scores, where float32 noise moves no row.
    gains
        What an offer to each row brings (`closedloop.core.evaluation.profit.count_profit`), shape (n,); for "profit".

    Examples
    --------
    >>> choose_threshold(np.array([False, False, True]), np.array([0.1, 0.2, 0.4]), "f1")
    0.30000000000000004
    """
    if not isinstance(rule, str):
        return rule
    truth = np.asarray(labels).astype(bool)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order].astype(np.float64)
    flagged = np.arange(len(ranked) + 1)
    hits = np.concatenate([[0], np.cumsum(truth[order])])
    if gains is not None:
        figure = np.concatenate([[0.0], np.cumsum(gains[order])])
    elif rule == "accuracy":
        figure = (hits + (len(truth) - truth.sum()) - (flagged - hits)) / len(truth)
    else:
        figure = 2 * hits / (flagged + truth.sum())
    upper, lower = np.concatenate([[1.0], ranked]), np.concatenate([ranked, [0.0]])
    middle = (upper + lower) / 2
    thresholds = np.where(middle > lower, middle, upper)
    usable = upper > lower
    usable[-1] = True
    best = np.flatnonzero(usable & (figure == figure[usable].max()))
    return float(thresholds[best[np.argmin(np.abs(thresholds[best] - 0.5))]])


def fit_sigmoid(pipeline: Pipeline, frame: pd.DataFrame, truth: np.ndarray) -> Pipeline:
    """Return a fitted pipeline whose scores are calibrated by a sigmoid (Platt 1999) on rows that did not fit it.

    Parameters
    ----------
    frame : DataFrame, shape (n, features)
    truth : bool array, shape (n,)
        True for churned; both classes must occur.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator
    from sklearn.pipeline import Pipeline

    calibrated = CalibratedClassifierCV(FrozenEstimator(pipeline[-1]), method="sigmoid")
    calibrated.fit(pipeline[:-1].transform(frame), truth.astype(pipeline[-1].classes_.dtype))
    return Pipeline([*pipeline.steps[:-1], ("model", calibrated)])
