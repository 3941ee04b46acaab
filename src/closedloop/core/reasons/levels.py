"""One row's contributions, by one walk down and one walk up a tree ensemble; all trees are walked together.

`closedloop.core.reasons.shapley` says what a leaf contributes: for each column on its path, an integral over q of the
product of all its columns' factors, the column's own factor taken out. The walk down multiplies the factors, at each
point q of the quadrature; the walk up sums the products of the leaves below each node. A node's edge then adds what the
column's factor there changes ("Linear TreeSHAP", Yu et al. 2022, evaluates the same polynomials).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

import numpy as np

from closedloop.core.reasons.paths import Level


class Walk:
    """The edges of all trees, with what each does to the product and adds to its column by the row's outcome there.

    The outcome of an edge is 0 if the row fails its column's interval above the edge, 1 if it holds that one and fails
    the edge's own, which lies in it, and 2 if it holds both.

    Parameters
    ----------
    levels
        Of all trees, from the root's children down.
    slots
        The largest number of columns on a path.
    """

    def __init__(self, levels: Sequence[Level], slots: int) -> None:
        self._inner = [one.inner for one in levels]
        self._starts = np.cumsum([0, *(len(one.column) for one in levels)])
        edges = [np.concatenate(parts, axis=-1) for parts in zip(*(one[1:] for one in levels), strict=True)]
        self._column, self._above, self._own, value, before, after = edges
        self._value = value[:, None]
        self._room = threading.local()
        points, weights = np.polynomial.legendre.leggauss((slots + 1) // 2)
        known = (points + 1) / 2
        before, after = before[:, None], after[:, None]
        held, failed, held_above = known + (1 - known) * after, (1 - known) * after, known + (1 - known) * before
        # of each outcome, in shape (outcomes x edges, points)
        factors = (np.broadcast_to(after / before, held.shape), failed / held_above, held / held_above)
        self._factors = np.concatenate(factors)
        gain_above, gain, loss = (1 - before) / held_above, (1 - after) / held, -1 / (1 - known)
        self._gains = np.concatenate([np.zeros(held.shape), loss - gain_above, gain - gain_above]) * (weights / 2)

    def weigh(self, places: np.ndarray, is_missing: np.ndarray) -> np.ndarray:
        """Contributions (n_columns,) of one row by the bins of its values."""
        bins, missing = places.astype(np.int32)[self._column], is_missing[self._column]
        outcome = _hold(self._above, bins, missing).astype(np.intp) + _hold(self._own, bins, missing)
        chosen = outcome * len(bins) + np.arange(len(bins))
        products, gains = self._find_room()
        np.take(self._factors, chosen, axis=0, out=products, mode="clip")
        np.take(self._gains, chosen, axis=0, out=gains, mode="clip")
        levels = [products[start:end] for start, end in itertools.pairwise(self._starts)]
        for above, level, inner in zip(levels, levels[1:], self._inner[1:], strict=False):
            half = len(inner)
            level[:half] *= above[inner]
            level[half:] *= above[inner]
        products *= self._value
        for above, level, inner in reversed(list(zip(levels, levels[1:], self._inner[1:], strict=False))):
            above[inner] = level[: len(inner)] + level[len(inner) :]
        return np.bincount(self._column, np.einsum("np,np->n", gains, products), minlength=len(places))

    def _find_room(self) -> np.ndarray:
        """Two arrays of this thread: new ones would take longer than all that is done with them."""
        if not hasattr(self._room, "arrays"):
            self._room.arrays = np.empty((2, len(self._column), self._gains.shape[1]))
        return np.asarray(self._room.arrays)


def _hold(interval: np.ndarray, bins: np.ndarray, is_missing: np.ndarray) -> np.ndarray:
    """Whether bins are in (low, high], or missing where that is in: ``interval`` is (low, high, is missing in)."""
    low, high, is_missing_in = interval
    found: np.ndarray = (bins > low) & (bins <= high)
    if is_missing.any():
        found = np.where(is_missing, is_missing_in == 1, found)
    return found
