"""Weights of the classes, which move every score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# by the hyper-parameter's name, the values that weigh nothing
NEUTRAL: Mapping[str, tuple[Any, ...]] = {"class_weight": (None,), "scale_pos_weight": (None, 1)}


def has_class_weights(hyper_parameters: Mapping[str, Any]) -> bool:
    """Whether these hyper-parameters weigh one class more than the other.

    >>> has_class_weights({"class_weight": "balanced"}), has_class_weights({"scale_pos_weight": 1.0})
    (True, False)
    """
    return any(hyper_parameters.get(name) not in neutral for name, neutral in NEUTRAL.items())
