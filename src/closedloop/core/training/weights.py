"""Weights of the classes, which move every score, and of rows, which stand for those that were not drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from sklearn.pipeline import Pipeline

WEIGHT = "row_weight"

# by the hyper-parameter's name, the values that weigh nothing
NEUTRAL: Mapping[str, tuple[Any, ...]] = {"class_weight": (None,), "scale_pos_weight": (None, 1)}


def has_class_weights(hyper_parameters: Mapping[str, Any]) -> bool:
    """Whether these hyper-parameters weigh one class more than the other.

    >>> has_class_weights({"class_weight": "balanced"}), has_class_weights({"scale_pos_weight": 1.0})
    (True, False)
    """
    return any(hyper_parameters.get(name) not in neutral for name, neutral in NEUTRAL.items())


def list_fit_weights(pipeline: Pipeline, rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """The arguments of ``pipeline.fit`` besides rows and labels: the weights of a draw for each step that knows them.

    Their mean is 1, so that regularisation goes by the rows that are there. A classifier that takes no weights is
    fitted without: a draw is even, and differs from all rows by chance alone.
    """
    from sklearn.utils.validation import has_fit_parameter

    if WEIGHT not in rows:
        return {}
    weights = (rows[WEIGHT] / rows[WEIGHT].mean()).to_numpy()
    return {
        f"{name}__sample_weight": weights
        for name, step in pipeline.steps
        if has_fit_parameter(getattr(step, "estimator", step), "sample_weight") and name in ("select", "model")
    }
