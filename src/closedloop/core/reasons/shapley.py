"""Exact Shapley values of a raw score: of tree ensembles by their paths, of linear models in closed form.

The value of a set of known columns is what the tree expects where the others are unknown: at a split of an unknown
column it follows both branches, weighted by the training rows that each has seen ("path-dependent" TreeSHAP; Lundberg
et al. 2020, "From local explanations to global understanding with explainable AI for trees"). For one leaf this is a
product: each column on the way gives 1 or 0 where it is known (the row satisfies it or not), and its ratio r where it
is not. The Shapley value of such a game is an integral along the diagonal of its multilinear extension (Owen 1972,
"Multilinear extensions of games"):

    phi_i = value * integral over q in (0, 1) of (o_i - r_i) * product over j != i of (q * o_j + (1 - q) * r_j)

The integrand is a polynomial, so that Gauss-Legendre quadrature with half as many points as columns is exact.
"""

from __future__ import annotations

import threading

import numpy as np

from closedloop.core.reasons.levels import Walk
from closedloop.core.reasons.paths import Bins, TreeNodes, list_paths
from closedloop.core.reasons.tables import Tables

TABLE_ROWS_MIN = 2000  # fewer rows than that are quicker without tables
TABLE_LEAVES_MAX, TABLE_SLOTS_MAX = 50_000, 20  # beyond them tables would take gigabytes


class LinearShapley:
    """Of ``intercept + row @ coefficients``: a column adds its coefficient times its distance from its mean."""

    def __init__(self, coefficients: np.ndarray, intercept: float, means: np.ndarray) -> None:
        self._coefficients, self._means = coefficients.astype(np.float64), means.astype(np.float64)
        self.base = float(intercept + self._means @ self._coefficients)

    def weigh(self, matrix: np.ndarray) -> np.ndarray:
        """As `TreeShapley.weigh`."""
        return np.asarray((matrix - self._means) * self._coefficients, dtype=np.float64)


class TreeShapley:
    """Of a tree ensemble: ``base`` and a row's contributions sum to its raw score.

    Parameters
    ----------
    nodes
        Of all trees.
    n_columns
        How many columns a row has.
    intercept
        What is added to the sum of the trees.
    """

    def __init__(self, nodes: TreeNodes, n_columns: int, intercept: float) -> None:
        self._n_columns = n_columns
        self._bins = Bins(nodes, n_columns)
        self._paths, levels = list_paths(nodes, self._bins)
        # None: each tree is a single leaf
        self._walk = Walk(levels, self._paths.column.shape[1]) if levels else None
        self.base = float(intercept + (self._paths.value * self._paths.ratio.prod(axis=1)).sum())
        self._tables: Tables | None = None
        self._lock = threading.Lock()

    def weigh(self, matrix: np.ndarray) -> np.ndarray:
        """Contributions, float64 (n, n_columns), of float32 rows of that shape.

        Many rows go through tables of the outcomes that have been met, which are kept for the next rows, unless the
        ensemble is too large for that; it may be called from any number of threads at once.
        """
        places = self._bins.place(matrix)
        is_missing = places == np.array([[self._bins.missing(one)] for one in range(self._n_columns)])
        leaves, slots = self._paths.column.shape
        if len(matrix) < TABLE_ROWS_MIN or leaves > TABLE_LEAVES_MAX or slots > TABLE_SLOTS_MAX:
            total, walk = np.zeros(matrix.shape), self._walk
            if walk is not None:
                for row in range(len(matrix)):
                    total[row] = walk.weigh(places[:, row], is_missing[:, row])
            return total
        nullable = frozenset(np.flatnonzero(is_missing.any(axis=1)).tolist())
        return self._prepare_tables(nullable).weigh(places).T

    def _prepare_tables(self, nullable: frozenset[int]) -> Tables:
        with self._lock:
            known = frozenset() if self._tables is None else self._tables.nullable
            if self._tables is None or not nullable <= known:
                self._tables = Tables(self._paths, self._bins, known | nullable)
            return self._tables
