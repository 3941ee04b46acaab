"""How the log loss developed while the model was fitted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from closedloop.core.training.weights import list_fit_weights

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

POINTS = 30
ROWS_MAX = 20_000


def trace_training(
    pipeline: Pipeline,
    train: pd.DataFrame,
    train_labels: np.ndarray,
    validation: pd.DataFrame,
    validation_labels: np.ndarray,
) -> pd.DataFrame:
    """Log loss (nats) on train and validation rows after part of the fit.

    Boosting: after each of up to 30 numbers of trees; forest: over its first trees; a linear model: fitted again on
    growing shares of the rows, the oldest first.

    Returns
    -------
    DataFrame
        step (int64: trees, or rows for a linear model), train_log_loss, validation_log_loss (float64).
    """
    from sklearn.metrics import log_loss

    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(len(train), min(ROWS_MAX, len(train)), replace=False))
    labels = {"train_log_loss": train_labels[chosen], "validation_log_loss": validation_labels}
    frames = {"train_log_loss": train.iloc[chosen], "validation_log_loss": validation}
    if hasattr(pipeline[-1], "staged_predict_proba") or hasattr(pipeline[-1], "estimators_"):
        steps, scores = [], {}
        for name, frame in frames.items():
            stages = _list_stages(pipeline[-1], pipeline[:-1].transform(frame))
            steps = _thin(len(stages))
            scores[name] = [stages[step] for step in steps]
        curve: dict[str, Any] = {"step": [step + 1 for step in steps]}
        for name, values in scores.items():
            curve[name] = [float(log_loss(labels[name], value, labels=[False, True])) for value in values]
        return pd.DataFrame(curve)
    return _refit_on_shares(pipeline, train, train_labels, frames, labels)


def _list_stages(model: Any, matrix: np.ndarray) -> list[np.ndarray]:
    if hasattr(model, "staged_predict_proba"):
        return [probabilities[:, 1] for probabilities in model.staged_predict_proba(matrix)]
    votes = np.cumsum([tree.predict_proba(matrix)[:, 1] for tree in model.estimators_], axis=0)
    return [total / (count + 1) for count, total in enumerate(votes)]


def _refit_on_shares(
    pipeline: Pipeline,
    train: pd.DataFrame,
    train_labels: np.ndarray,
    frames: dict[str, pd.DataFrame],
    labels: dict[str, np.ndarray],
) -> pd.DataFrame:
    from sklearn.base import clone
    from sklearn.metrics import log_loss

    curve = []
    for share in np.linspace(0.1, 1.0, 8):
        rows = int(np.ceil(share * len(train)))
        if len(np.unique(train_labels[:rows])) < 2:
            continue
        some = train.iloc[:rows]
        fitted = clone(pipeline).fit(some, train_labels[:rows], **list_fit_weights(pipeline, some))
        losses = {
            name: float(log_loss(labels[name], fitted.predict_proba(frame)[:, 1], labels=[False, True]))
            for name, frame in frames.items()
        }
        curve.append({"step": rows, **losses})
    return pd.DataFrame(curve)


def _thin(count: int) -> list[int]:
    return sorted({int(step) for step in np.linspace(0, count - 1, min(POINTS, count)).round()})
