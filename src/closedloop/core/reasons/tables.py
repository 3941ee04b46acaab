"""Many rows' contributions, by tables: neighbouring leaves of a tree, with what they add for each outcome that was met.

A table's outcome ("cell") says for each of its columns between which of the leaves' thresholds a value lies. Rows share
cells, and cells share what a leaf contributes, which depends on the leaf's own columns alone: so few sums are computed,
and a row only looks them up.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from closedloop.core.reasons.paths import OPEN, UNUSED, Bins, Paths

CELLS_MAX = 16_384  # of a table: its places fit a processor's cache
BLOCK_ROWS, BLOCK_TABLES = 1_024, 256  # whose cells are found together


class Tables:
    """All leaves of an ensemble.

    Parameters
    ----------
    paths
        The leaves.
    bins
        Of the columns.
    nullable
        The columns that may be missing; a missing value elsewhere is not seen.
    """

    def __init__(self, paths: Paths, bins: Bins, nullable: frozenset[int]) -> None:
        self.nullable = nullable
        self._bins = bins
        # a leaf with many columns may have a large table, whose cells are wider numbers
        tables = [_Table(paths, leaves, nullable) for leaves in _split_leaves(paths, nullable)]
        self._tables = sorted(tables, key=lambda table: table.cells)

    def weigh(self, places: np.ndarray) -> np.ndarray:
        """Contributions (n_columns, n) of rows by the bins of their values, in that shape."""
        total = np.zeros(places.shape)
        for first in range(0, len(self._tables), BLOCK_TABLES):
            tables = self._tables[first : first + BLOCK_TABLES]
            for table, cells in zip(tables, self._find_cells(tables, places), strict=True):
                table.add(cells, total)
        return total

    def _find_cells(self, tables: Sequence[_Table], places: np.ndarray) -> np.ndarray:
        """The cell of each row in each table, in shape (tables, n)."""
        kind = np.int16 if tables[-1].cells <= np.iinfo(np.int16).max else np.int32
        codes = [self._code(tables, column, kind) for column in range(len(places))]
        found = np.empty((len(tables), places.shape[1]), dtype=kind)
        for first in range(0, places.shape[1], BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            cells = np.zeros((len(found[0, block]), len(tables)), dtype=kind)
            for column, code in enumerate(codes):
                if code is not None:
                    cells += code.take(places[column, block], axis=0)
            found[:, block] = cells.T
        return found

    def _code(self, tables: Sequence[_Table], column: int, kind: type) -> np.ndarray | None:
        """The number that each bin of a column adds to the tables' cells, shape (bins, tables); None: nothing."""
        missing = self._bins.missing(column)
        code: np.ndarray = np.zeros((missing + 1, len(tables)), dtype=kind)
        for place, table in enumerate(tables):
            if (axis := table.axes.get(column)) is not None:
                code[axis.ends + 1, place] = axis.moves
        if not code.any() and column not in self.nullable:
            return None
        np.cumsum(code, axis=0, out=code)
        if column in self.nullable:
            axes = (table.axes.get(column) for table in tables)
            code[missing] = [0 if axis is None else axis.missing for axis in axes]
        return code


class _Axis(NamedTuple):
    """A column of a table: its thresholds in order, by how much the cell moves at each, and where it is if missing.

    ``outcomes`` says how many the leaves tell apart, and ``step`` by how much one of them moves the cell.
    """

    ends: np.ndarray
    moves: np.ndarray
    missing: int
    outcomes: int
    step: int


class _Table:
    """Neighbouring leaves of a tree."""

    def __init__(self, paths: Paths, leaves: slice, nullable: frozenset[int]) -> None:
        self._paths = Paths._make(part[leaves] for part in paths)
        slots = int(self._paths.count_slots().max())
        self._paths = self._paths.take(np.arange(len(self._paths.tree)), slots)
        self._slots = np.arange(slots)
        self._starts = np.cumsum([0, *(1 << self._paths.count_slots())])  # of a leaf's patterns: a bit for each slot
        column = self._paths.column
        self.axes: dict[int, _Axis] = {}
        self._bits: list[np.ndarray] = []
        self.cells = 1
        names = sorted({*column.ravel().tolist()} - {UNUSED})
        self._position = np.full(column.shape, len(names))
        for place, name in enumerate(names):
            leaf, slot = np.nonzero(column == name)
            self._position[leaf, slot] = place
            low, high, is_missing_in = (part[leaf, slot] for part in self._paths[1:4])
            ends = np.array(sorted({*low.tolist(), *high.tolist()} - {UNUSED, OPEN}), dtype=np.intp)
            bins = np.array([0, *(ends + 1)])[:, None]  # one of each outcome
            holds = (bins > low) & (bins <= high)
            if name in nullable:
                holds = np.concatenate([holds, is_missing_in[None]])
            known: dict[bytes, int] = {}
            outcome = np.array([known.setdefault(one.tobytes(), len(known)) for one in holds])
            bits = np.zeros((len(known), len(column)), dtype=np.intp)
            bits[outcome[:, None], leaf] = holds << slot
            self._bits.append(bits)
            moves = np.diff(outcome[: len(bins)]) * self.cells
            self.axes[name] = _Axis(ends, moves, int(outcome[-1]) * self.cells, len(known), self.cells)
            self.cells *= len(known)
        # replaced as one, so that a thread never sees a place without its contributions
        self._met = np.full(self.cells, -1, dtype=np.int32), np.empty((len(self.axes), 0))
        self._lock = threading.Lock()

    def add(self, cells: np.ndarray, total: np.ndarray) -> None:
        """Add the contributions of rows to ``total``, shape (n_columns, n), by their cells."""
        place, known = self._met
        rows = place.take(cells)
        if (rows < 0).any():
            place, known = self._meet(cells)
            rows = place.take(cells)
        rows = rows.astype(np.intp)
        for column, contributions in zip(self.axes, known, strict=True):
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
                self._met = place, np.concatenate([known, self._weigh(new).T], axis=1)
            return self._met

    def _weigh(self, cells: np.ndarray) -> np.ndarray:
        """Contributions (n, columns) of cells."""
        patterns = np.repeat(self._starts[None, :-1], len(cells), axis=0)
        for axis, bits in zip(self.axes.values(), self._bits, strict=True):
            patterns += bits.take(cells // axis.step % axis.outcomes, axis=0)
        is_met = np.zeros(self._starts[-1], dtype=bool)
        is_met[patterns] = True
        met = np.flatnonzero(is_met)
        leaf = np.searchsorted(self._starts, met, side="right") - 1
        paths = self._paths.take(leaf, self._paths.column.shape[1])
        holds = ((met - self._starts[leaf])[:, None] >> self._slots & 1 == 1) | (paths.column == UNUSED)
        known = np.zeros((len(met), len(self.axes) + 1))  # the last one is of slots without a column
        ratio, held = (np.ascontiguousarray(part.T) for part in (paths.ratio, holds))
        known[np.arange(len(met))[:, None], self._position[leaf]] = weigh_patterns(ratio, paths.value, held).T
        ranks = np.empty(self._starts[-1], dtype=np.intp)
        ranks[met] = np.arange(len(met))
        total = known.take(ranks.take(patterns[:, 0]), axis=0)
        for place in range(1, patterns.shape[1]):
            total += known.take(ranks.take(patterns[:, place]), axis=0)
        return total[:, :-1]


@cache
def _list_points(slots: int) -> list[tuple[float, float]]:
    """The points and weights by which an integral over a product of so many columns' factors is exact."""
    points, weights = np.polynomial.legendre.leggauss((slots + 1) // 2)
    return list(zip(((points + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


def weigh_patterns(ratio: np.ndarray, value: np.ndarray, holds: np.ndarray) -> np.ndarray:
    """Contributions (slots, n) of n leaves by whether each of their slots holds, bool (slots, n)."""
    gain, loss, held = np.zeros(ratio.shape), np.zeros(value.shape), holds.astype(np.float64)
    for known, weight in _list_points(len(ratio)):
        factors = (1 - known) * ratio + known * held
        product = factors.prod(axis=0) * (weight * value)
        gain += product * (1 - ratio) / factors
        loss -= product / (1 - known)
    return np.where(holds, gain, loss)


def _split_leaves(paths: Paths, nullable: frozenset[int]) -> Iterator[slice]:
    """Groups of neighbouring leaves of one tree, each with at most `CELLS_MAX` outcomes where it has two leaves."""
    first, cells, tree = 0, 1.0, -1
    ends: dict[int, set[int]] = {}
    rows = zip(*(part.tolist() for part in (paths.column, paths.low, paths.high, paths.tree)), strict=True)
    for leaf, (columns, lows, highs, its_tree) in enumerate(rows):
        slots = [slot for slot in zip(columns, lows, highs, strict=True) if slot[0] != UNUSED]
        larger = cells
        for column, low, high in slots:
            have, others = ends.get(column, ()), 1 + (column in nullable)
            more = (low != UNUSED and low not in have) + (high != OPEN and high not in have)
            larger *= (len(have) + more + others) / (len(have) + others if have else 1)
        if its_tree != tree or larger > CELLS_MAX:
            if ends:
                yield slice(first, leaf)
            first, cells, tree, ends = leaf, 1.0, its_tree, {}
            larger = math.prod((low != UNUSED) + (high != OPEN) + 1.0 + (one in nullable) for one, low, high in slots)
        for column, low, high in slots:
            ends.setdefault(column, set()).update({low, high} - {UNUSED, OPEN})
        cells = larger
    if ends:
        yield slice(first, len(paths.tree))
