"""The importance of features: the mean size of each feature's contributions, and their direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Direction = Literal["raises", "lowers", "both", "by category"]
CLEAR_CORRELATION = 0.3


class Importance(NamedTuple):
    """A feature's mean absolute contribution, and what a higher value does to the raw score."""

    feature: str
    mean: float
    direction: Direction


def rank_importance(
    names: Sequence[str], contributions: np.ndarray, matrix: np.ndarray, categorical: Sequence[str]
) -> list[Importance]:
    """Every feature, the largest mean first and ties by name.

    Parameters
    ----------
    names
        Of the features.
    contributions, matrix
        Contributions and packed values of the same rows: (n, n_features).
    categorical
        The features whose values have no order.

    Returns
    -------
    list of Importance
        The direction is "both" where the ranks of values and contributions are correlated by less than .3.

    Examples
    --------
    >>> values = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    >>> rank_importance(["visits", "age"], np.array([[0.25, 0.0], [0.0, 0.0], [-0.5, 0.1]]), values, [])[0]
    Importance(feature='visits', mean=0.25, direction='lowers')
    """
    found = []
    for place, name in enumerate(names):
        mean = float(np.abs(contributions[:, place]).mean())
        direction: Direction = "by category"
        if name not in categorical:
            direction = _find_direction(matrix[:, place], contributions[:, place])
        found.append(Importance(name, mean, direction))
    return sorted(found, key=lambda one: (-one.mean, one.feature))


def _find_direction(values: np.ndarray, contributions: np.ndarray) -> Direction:
    known = ~np.isnan(values)
    ranks = [_rank(part[known]) for part in (values, contributions)]
    if any(not len(one) or one.min() == one.max() for one in ranks):
        return "both"
    correlation = float(np.corrcoef(np.stack(ranks))[0, 1])
    if abs(correlation) < CLEAR_CORRELATION:
        return "both"
    return "raises" if correlation > 0 else "lowers"


def _rank(values: np.ndarray) -> np.ndarray:
    """Ranks, the same for equal values."""
    return np.asarray(np.unique(values, return_inverse=True)[1].reshape(-1), dtype=np.float64)
