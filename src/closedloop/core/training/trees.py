"""The thresholds and covers of fitted trees, as ONNX stores them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline


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
    if hasattr(model, "_predictors"):
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


def _list_thresholds(model: Any) -> list[np.ndarray]:
    """Views of all tree thresholds inside a fitted classifier; none for a linear one."""
    if hasattr(model, "calibrated_classifiers_"):
        return [
            found for inner in model.calibrated_classifiers_ for found in _list_thresholds(inner.estimator.estimator)
        ]
    if hasattr(model, "_predictors"):
        return [tree.nodes["num_threshold"] for iteration in model._predictors for tree in iteration]
    return [tree.tree_.threshold for tree in np.ravel(getattr(model, "estimators_", []))]
