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
from collections.abc import Iterator, Sequence

import numpy as np

from closedloop.core.reasons.paths import OPEN, UNUSED, Bins, Paths, TreeNodes, list_paths

CELLS_MAX = 8192  # of a table: its places fit a processor's cache
TABLE_ROWS_MIN = 2000  # fewer rows than that are quicker without tables
TABLE_LEAVES_MAX, TABLE_SLOTS_MAX = 20_000, 20  # beyond them tables would take gigabytes


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
        self._paths = list_paths(nodes, self._bins)
        self.base = float(intercept + (self._paths.value * self._paths.ratio.prod(axis=1)).sum())
        counts = self._paths.count_slots()
        self._alike = [
            _Leaves(self._paths.take(np.flatnonzero(counts == slots), slots)) for slots in np.unique(counts[counts > 0])
        ]
        self._tables: list[_Table] | None = None
        self._lock = threading.Lock()

    def weigh(self, matrix: np.ndarray) -> np.ndarray:
        """Contributions, float64 (n, n_columns), of float32 rows of that shape.

        Many rows go through tables of the outcomes that have been met, which are kept for the next rows, unless the
        ensemble is too large for that; it may be called from any number of threads at once.
        """
        places = self._bins.place(matrix)
        total = np.zeros((self._n_columns, len(matrix)))
        leaves, slots = self._paths.column.shape
        if len(matrix) < TABLE_ROWS_MIN or leaves > TABLE_LEAVES_MAX or slots > TABLE_SLOTS_MAX:
            is_missing = places == np.array([[self._bins.missing(one)] for one in range(self._n_columns)])
            for row in range(len(matrix)):
                for leaves in self._alike:
                    total[:, row] += leaves.weigh_row(places[:, row], is_missing[:, row])
            return total.T
        for table in self._prepare_tables():
            table.add(places, total)
        return total.T

    def _prepare_tables(self) -> list[_Table]:
        with self._lock:
            if self._tables is None:
                groups = _split_leaves(self._paths)
                self._tables = [_Table(self._paths, leaves, self._bins) for leaves in groups]
            return self._tables


class _Leaves:
    """Leaves, and what their slots contribute for each outcome; arrays have shape (points, slots, 1, leaves)."""

    def __init__(self, paths: Paths) -> None:
        self._column, self._low, self._high, self._is_missing_in, ratio = (part.T.copy() for part in paths[:5])
        points, weights = np.polynomial.legendre.leggauss((paths.column.shape[1] + 1) // 2)
        known = ((points + 1) / 2)[:, None, None, None]
        self._failed = (1 - known) * ratio[:, None]
        self._held = known + self._failed
        weights = weights[:, None, None, None] / 2 * paths.value
        self._gain = weights * (1 - ratio[:, None]) / self._held
        self._loss = -(weights / (1 - known))[:, 0]

    def weigh(self, holds: np.ndarray) -> np.ndarray:
        """Contributions (slots, n, leaves) by whether each slot holds, bool of that shape."""
        gain, loss = np.zeros(holds.shape), np.zeros(holds.shape[1:])
        for held, failed, gains, losses in zip(self._held, self._failed, self._gain, self._loss, strict=True):
            product = np.where(holds, held, failed).prod(axis=0)
            gain += product * gains
            loss += product * losses
        return np.where(holds, gain, loss)

    def weigh_row(self, places: np.ndarray, is_missing: np.ndarray) -> np.ndarray:
        """Contributions (n_columns,) of one row whose slots are all used."""
        bins = places[self._column]
        holds = np.where(is_missing[self._column], self._is_missing_in, (bins > self._low) & (bins <= self._high))
        found = self.weigh(holds[:, None])[:, 0]
        return np.bincount(self._column.ravel(), found.ravel(), minlength=len(places))


class _Table:
    """Neighbouring leaves of a tree, with the contributions of every outcome ("cell") of their slots that was met."""

    def __init__(self, paths: Paths, leaves: np.ndarray, bins: Bins) -> None:
        slots = int(paths.count_slots()[leaves].max())
        self._paths = paths.take(leaves, slots)
        self._leaves = _Leaves(self._paths)
        self._columns = np.unique(self._paths.column[self._paths.column != UNUSED])
        self._codes: list[np.ndarray] = []  # of a column's bins; they sum to the cell
        self._outcomes: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []
        self.cells = 1
        for column in self._columns:
            leaf, slot = np.nonzero(self._paths.column == column)
            outcomes, code = _list_outcomes(self._paths, leaf, slot, bins.missing(column))
            self._codes.append(code.astype(np.int32) * np.int32(self.cells))
            self._outcomes.append((leaf, slot, outcomes, self.cells))
            self.cells *= outcomes.shape[1]
        # replaced as one, so that a thread never sees a place without its contributions
        self._met = np.full(self.cells, -1, dtype=np.int32), np.empty((len(self._columns), 0))
        self._lock = threading.Lock()

    def add(self, places: np.ndarray, total: np.ndarray) -> None:
        """Add the contributions of rows to ``total``, shape (n_columns, n), by the bins of their values."""
        cells = np.zeros(places.shape[1], dtype=np.int32)
        for column, codes in zip(self._columns, self._codes, strict=True):
            cells += codes.take(places[column])
        place, known = self._met
        rows = place.take(cells)
        if (rows < 0).any():
            place, known = self._meet(cells)
            rows = place.take(cells)
        for column, contributions in zip(self._columns, known, strict=True):
            total[column] += contributions.take(rows)

    def _meet(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            place, known = self._met
            is_new = np.zeros(self.cells, dtype=bool)
            is_new[cells] = True
            new = np.flatnonzero(is_new & (place < 0))
            if len(new):
                place = place.copy()
                place[new] = known.shape[1] + np.arange(len(new), dtype=np.int32)
                self._met = place, np.concatenate([known, self._weigh(new)], axis=1)
            return self._met

    def _weigh(self, cells: np.ndarray) -> np.ndarray:
        """Contributions (columns, n) of cells."""
        leaves, slots = self._paths.column.shape
        holds = np.ones((slots, len(cells), leaves), dtype=bool)
        for leaf, slot, outcomes, step in self._outcomes:
            holds[slot, :, leaf] = outcomes[:, cells // step % outcomes.shape[1]]
        found = self._leaves.weigh(holds)
        parts = [found[slot, :, leaf].sum(axis=0) for leaf, slot, *_ in self._outcomes]
        return np.stack(parts)


def _list_outcomes(paths: Paths, leaf: np.ndarray, slot: np.ndarray, missing: int) -> tuple[np.ndarray, np.ndarray]:
    """Which slots of one column can hold together, bool (slots, outcomes), and the outcome of each of its bins."""
    bins = np.arange(missing + 1)
    held: np.ndarray = (bins > paths.low[leaf, slot][:, None]) & (bins <= paths.high[leaf, slot][:, None])
    held[:, missing] = paths.is_missing_in[leaf, slot]
    begins = np.r_[True, (held[:, 1:] != held[:, :-1]).any(axis=0)]
    known: dict[bytes, int] = {}
    found = [known.setdefault(held[:, place].tobytes(), len(known)) for place in np.flatnonzero(begins)]
    outcomes = np.frombuffer(b"".join(known), dtype=bool).reshape(len(known), -1).T
    return outcomes, np.array(found)[np.cumsum(begins) - 1]


def _split_leaves(paths: Paths) -> Iterator[np.ndarray]:
    """Groups of neighbouring leaves of one tree, each with at most `CELLS_MAX` outcomes where it has two leaves."""
    group: list[int] = []
    ends: dict[int, set[int]] = {}
    rows = zip(paths.column.tolist(), paths.low.tolist(), paths.high.tolist(), strict=True)
    for leaf, (columns, lows, highs) in enumerate(rows):
        own = _list_ends(columns, lows, highs)
        if not own:
            continue  # a tree that is a single leaf
        both = {column: own.get(column, set()) | ends.get(column, set()) for column in own.keys() | ends.keys()}
        outcomes = np.prod([len(each) + 1.0 for each in both.values()])
        if group and (paths.tree[leaf] != paths.tree[group[-1]] or outcomes > CELLS_MAX):
            yield np.array(group)
            group, both = [], own
        group.append(leaf)
        ends = both
    if group:
        yield np.array(group)


def _list_ends(columns: Sequence[int], lows: Sequence[int], highs: Sequence[int]) -> dict[int, set[int]]:
    """The ends of a leaf's intervals, by column."""
    slots = zip(columns, lows, highs, strict=True)
    return {
        column: {end for end in (low, high) if end not in (UNUSED, OPEN)}
        for column, low, high in slots
        if column != UNUSED
    }
