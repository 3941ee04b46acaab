"""The thresholds and covers of fitted trees, as ONNX stores them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from closedloop.core.reasons.paths import TreeNodes


class GrownTrees(Protocol):
    """The method that a classifier of another library offers beside scikit-learn's, so that its export is exact.

    Its raw score is the log-odds of churn: ``intercept`` and one leaf of each tree. It may have scikit-learn's
    ``staged_predict_proba``, which the learning curve shows.
    """

    @property
    def intercept(self) -> float:
        """The raw score before the first tree."""

    def decision_function(self, matrix: np.ndarray) -> np.ndarray:
        """Raw scores (n,) of float32 rows, by which calibration and reasons go."""

    def list_nodes(self) -> TreeNodes:
        """All trees, with thresholds that float32 can hold."""


def round_thresholds(pipeline: Pipeline) -> Pipeline:
    """A copy of a fitted pipeline whose tree thresholds are float32 values; no decision changes.

    ONNX stores thresholds t as float32 and tests x <= t there. Inputs x are float32 as well: with floor32(t)
    the largest float32 <= t, x <= t if and only if x <= floor32(t). Rounding to nearest may go up instead: a
    split's midpoint between two adjacent floats a < b can become b, and all rows at b change sides.
    skl2onnx 1.20 does that to histogram gradient boosting; for the other trees it rounds down as here.
    """
    rounded = copy.deepcopy(pipeline)
    for thresholds in _list_thresholds(rounded[-1]):
        thresholds[...] = floor_float32(thresholds)
    return rounded


def list_covers(model: Any) -> np.ndarray:
    """The weight of the training rows that each node of a fitted classifier's trees has seen; empty for a linear one.

    Nodes stand in the trees' own order, one tree after another, as skl2onnx writes them.
    """
    if hasattr(model, "list_nodes"):
        trees = [model.list_nodes().cover]
    elif hasattr(model, "_predictors"):
        trees = [tree.nodes["count"] for iteration in model._predictors for tree in iteration]
    else:
        trees = [tree.tree_.weighted_n_node_samples for tree in np.ravel(getattr(model, "estimators_", []))]
    return np.concatenate(trees).astype(np.float64) if trees else np.empty(0)


def floor_float32(values: np.ndarray) -> np.ndarray:
    """The largest float32 not above each value (float64 in and out); infinities stay.

    >>> float(floor_float32(np.array([16777217.0]))[0])
    16777216.0
    """
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
        lower = np.nextafter(nearest, np.float32(-np.inf))
    return np.where(nearest > values, lower, nearest).astype(np.float64)


def place_children(names: pd.Series, children: pd.Series) -> np.ndarray:
    """The places of nodes' children in a table of nodes, by their names; 0 for a leaf, which has none.

    >>> place_children(pd.Series(["a", "b", "c"]), pd.Series(["c", None, None])).tolist()
    [2, 0, 0]
    """
    places = pd.Series(np.arange(len(names)), index=names.to_numpy())
    return children.map(places).fillna(0).to_numpy(dtype=np.int64)


def list_probabilities(log_odds: np.ndarray) -> np.ndarray:
    """Probabilities of staying and of churn, (n, 2).

    >>> list_probabilities(np.array([0.0])).tolist()
    [[0.5, 0.5]]
    """
    churned = 1 / (1 + np.exp(-log_odds))
    return np.stack([1 - churned, churned], axis=1)


def check_by_fitting(model: Any, refused: type[Exception]) -> None:
    """Grow one tree on a few rows, for libraries that check hyper-parameters only as they fit.

    Parameters
    ----------
    model
        Unfitted, with ``n_estimators``; it stays as it is.
    refused
        What the library raises.

    Raises
    ------
    ValueError
        Saying what the library does not allow.
    """
    from sklearn.base import clone

    trees = model.get_params()["n_estimators"]
    if isinstance(trees, bool) or not isinstance(trees, int) or trees < 1:
        raise ValueError(f"n_estimators must be a whole number from 1, found {trees!r}")
    rows = np.arange(80, dtype=np.float32).reshape(40, 2) % 7
    try:
        clone(model).set_params(n_estimators=1).fit(rows, np.arange(40) % 2 == 1)
    except (refused, TypeError) as error:
        raise ValueError(str(error).strip().splitlines()[-1]) from error


def _list_thresholds(model: Any) -> list[np.ndarray]:
    """Views of all tree thresholds inside a fitted classifier; none for a linear one."""
    if hasattr(model, "calibrated_classifiers_"):
        return [
            found for inner in model.calibrated_classifiers_ for found in _list_thresholds(inner.estimator.estimator)
        ]
    if hasattr(model, "_predictors"):
        return [tree.nodes["num_threshold"] for iteration in model._predictors for tree in iteration]
    return [tree.tree_.threshold for tree in np.ravel(getattr(model, "estimators_", []))]
