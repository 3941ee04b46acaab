"""Many rows' contributions, by tables: neighbouring leaves of a tree, with what they add for each outcome that was met.

A table's outcome ("cell") says for each of its columns between which of the leaves' thresholds a value lies. Rows share
cells, and cells share what a leaf contributes, which depends on the leaf's own columns alone: so few sums are computed,
and a row only looks them up.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from closedloop.core.reasons.paths import OPEN, UNUSED, Bins, Paths

CELLS_MAX = 16_384  # of a table: its places fit a processor's cache
BLOCK_ROWS, BLOCK_TABLES = 1_024, 128  # whose cells are found together
MISSING = -1  # in place of a threshold
BLOCK_PATTERNS = 4_096  # whose contributions are found together, in a processor's cache
KEPT_BYTES_MAX = (
    128 * 1024**2
)  # of leaf patterns: the default model has 50 MB of them, a deep forest a gigabyte and more


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
    kept_bytes_max
        Of the leaves' patterns, which only save time; beyond it all are forgotten.
    """

    def __init__(
        self, paths: Paths, bins: Bins, nullable: frozenset[int], *, kept_bytes_max: int = KEPT_BYTES_MAX
    ) -> None:
        self.nullable = nullable
        self._paths, self._bins, self._lock = paths, bins, threading.Lock()
        # a leaf with many columns may have a large table, whose cells are wider numbers
        tables = [_Table(paths, leaves, nullable) for leaves in _split_leaves(paths, nullable)]
        tables.sort(key=lambda table: table.cells)
        blocks = (tables[first : first + BLOCK_TABLES] for first in range(0, len(tables), BLOCK_TABLES))
        self._blocks = [(some, _list_steps(some)) for some in blocks]
        self.kept_bytes, self._kept_bytes_max = 0, kept_bytes_max

    def weigh(self, places: np.ndarray) -> np.ndarray:
        """Contributions (n_columns, n) of rows by the bins of their values, in that shape."""
        total = np.zeros(places.shape)
        for tables, steps in self._blocks:
            found = self._find_cells(tables, steps, places)
            self._meet(tables, found)
            for table, cells in zip(tables, found, strict=True):
                table.add(cells, total)
        return total

    def _meet(self, tables: Sequence[_Table], found: np.ndarray) -> None:
        """Compute what is not known yet of these cells: the patterns of all tables together, in few calls."""
        with self._lock:
            before = sum(table.kept_bytes for table in tables)
            found_new = [(table, table.list_new(cells)) for table, cells in zip(tables, found, strict=True)]
            new = [(table, its) for table, its in found_new if its is not None]
            if not new:
                return
            leaf = np.concatenate([table.first_leaf + its.leaf for table, its in new])
            bits = np.concatenate([its.unknown - table.starts[its.leaf] for table, its in new])
            ends = np.cumsum([len(its.leaf) for _, its in new])
            contributions = np.split(weigh_leaves(self._paths, leaf, bits), ends[:-1])
            for (table, its), known in zip(new, contributions, strict=True):
                table.learn(its, known)
            self.kept_bytes += sum(table.kept_bytes for table in tables) - before
            if self.kept_bytes > self._kept_bytes_max:
                for table in itertools.chain.from_iterable(some for some, _ in self._blocks):
                    table.forget()
                self.kept_bytes = 0

    def _find_cells(self, tables: Sequence[_Table], steps: Mapping[int, np.ndarray], places: np.ndarray) -> np.ndarray:
        """The cell of each row in each table, in shape (tables, n)."""
        kind = np.int16 if tables[-1].cells <= np.iinfo(np.int16).max else np.int32
        codes = {column: self._code(its, column, len(tables), kind) for column, its in steps.items()}
        found = np.empty((len(tables), places.shape[1]), dtype=kind)
        for first in range(0, places.shape[1], BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            cells = np.zeros((len(found[0, block]), len(tables)), dtype=kind)
            for column, code in codes.items():
                cells += code.take(places[column, block], axis=0)
            found[:, block] = cells.T
        return found

    def _code(self, steps: np.ndarray, column: int, tables: int, kind: type) -> np.ndarray:
        """The number that each bin of a column adds to the cells of the tables, shape (bins, tables)."""
        missing = self._bins.missing(column)
        place, end, move = steps
        code: np.ndarray = np.zeros((missing + 1, tables), dtype=kind)
        is_end = end != MISSING
        code[end[is_end] + 1, place[is_end]] = move[is_end]
        np.cumsum(code, axis=0, out=code)
        if column in self.nullable:
            code[missing] = 0
            code[missing, place[~is_end]] = move[~is_end]
        return code


def _list_steps(tables: Sequence[_Table]) -> dict[int, np.ndarray]:
    """By column: place of a table, threshold (or `MISSING`), and by how much its cell moves there; shape (3, n)."""
    steps: dict[int, list[tuple[int, int, int]]] = {}
    for place, table in enumerate(tables):
        for column, axis in table.axes.items():
            its = steps.setdefault(column, [])
            its += ((place, end, move) for end, move in zip(axis.ends, axis.moves, strict=True))
            its.append((place, MISSING, axis.missing))
    return {column: np.array(its).T for column, its in sorted(steps.items())}


class _Axis(NamedTuple):
    """A column of a table: its thresholds in order, by how much the cell moves at each, and where it is if missing.

    ``outcomes`` says how many the leaves tell apart, and ``step`` by how much one of them moves the cell.
    """

    ends: Sequence[int]
    moves: Sequence[int]
    missing: int
    outcomes: int
    step: int


class _NewCells(NamedTuple):
    """Cells of a table that are not known yet, and the patterns of their leaves: shape (n, leaves).

    ``unknown`` are the patterns that are not known yet either, and ``leaf`` the leaf of each.
    """

    cells: np.ndarray
    patterns: np.ndarray
    unknown: np.ndarray
    leaf: np.ndarray


class _Table:
    """Neighbouring leaves of a tree."""

    def __init__(self, paths: Paths, leaves: slice, nullable: frozenset[int]) -> None:
        self.first_leaf = leaves.start
        column = paths.column[leaves]
        # of a leaf's patterns: a bit for each slot, which says whether it holds
        self.starts = np.cumsum([0, *(1 << (column != UNUSED).sum(axis=1))])
        used: dict[int, list[tuple[int, ...]]] = {}  # of a column: leaf, slot, low, high, is missing in
        parts = (part[leaves].tolist() for part in paths[:4])
        for leaf, slots in enumerate(zip(*parts, strict=True)):
            for slot, (name, *interval) in enumerate(zip(*slots, strict=True)):
                if name != UNUSED:
                    used.setdefault(name, []).append((leaf, slot, *interval))
        self._position = np.full(column.shape, len(used))
        self.axes: dict[int, _Axis] = {}
        self._bits: list[np.ndarray] = []
        self.cells = 1
        for name in sorted(used):
            self._add_axis(name, used[name], len(column), is_nullable=name in nullable)
        self._met = np.full(self.cells, -1, dtype=np.int32), np.empty((len(self.axes), 0))
        self.forget()

    def forget(self) -> None:
        """Free what is known of patterns; the cells that were met stay."""
        self._ranks = np.empty(0, dtype=np.int32)
        self._known = np.empty((0, len(self.axes) + 1))  # of patterns; the last column is of slots without one

    @property
    def kept_bytes(self) -> int:
        """The memory of the patterns that are known."""
        return self._ranks.nbytes + self._known.nbytes

    def _add_axis(self, column: int, used: Sequence[tuple[int, ...]], leaves: int, *, is_nullable: bool) -> None:
        """Tell values of a column apart by whether they hold in each leaf; lists, as most have a few entries."""
        for leaf, slot, *_ in used:
            self._position[leaf, slot] = len(self.axes)
        ends = sorted({end for _, _, *interval, _ in used for end in interval} - {UNUSED, OPEN})
        # one bin of each outcome
        rows = [
            [(low < one <= high) << slot for _, slot, low, high, _ in used] for one in (0, *(end + 1 for end in ends))
        ]
        if is_nullable:
            rows.append([is_missing_in << slot for _, slot, *_, is_missing_in in used])
        known: dict[tuple[int, ...], int] = {}
        outcome = [known.setdefault(tuple(row), len(known)) * self.cells for row in rows]
        bits = np.zeros((len(known), leaves), dtype=np.intp)
        bits[:, [leaf for leaf, *_ in used]] = list(known)
        self._bits.append(bits)
        moves = [after - before for before, after in itertools.pairwise(outcome[: len(ends) + 1])]
        self.axes[column] = _Axis(ends, moves, outcome[-1], len(known), self.cells)
        self.cells *= len(known)

    def add(self, cells: np.ndarray, total: np.ndarray) -> None:
        """Add the contributions of rows to ``total``, shape (n_columns, n), by their cells, which were met."""
        place, known = self._met
        rows = place.take(cells).astype(np.intp)
        for column, contributions in zip(self.axes, known, strict=True):
            total[column] += contributions.take(rows)

    def list_new(self, cells: np.ndarray) -> _NewCells | None:
        """The cells among these that are not known yet; None where all are."""
        is_new = self._met[0].take(cells) < 0
        if not is_new.any():
            return None
        is_met = np.zeros(self.cells, dtype=bool)
        is_met[cells[is_new]] = True
        new = np.flatnonzero(is_met)
        patterns = np.repeat(self.starts[None, :-1], len(new), axis=0)
        for axis, bits in zip(self.axes.values(), self._bits, strict=True):
            patterns += bits.take(new // axis.step % axis.outcomes, axis=0)
        if not len(self._ranks):
            self._ranks = np.full(self.starts[-1], -1, dtype=np.int32)
        is_met = np.zeros(len(self._ranks), dtype=bool)
        is_met[patterns] = True
        unknown = np.flatnonzero(is_met & (self._ranks < 0))
        return _NewCells(new, patterns, unknown, np.searchsorted(self.starts, unknown, side="right") - 1)

    def learn(self, new: _NewCells, contributions: np.ndarray) -> None:
        """Keep the contributions (n, slots) of new patterns, and their sums, which are those of the new cells."""
        more = np.zeros((len(new.leaf), self._known.shape[1]))
        position = self._position[new.leaf]
        more[np.arange(len(more))[:, None], position] = contributions[:, : position.shape[1]]
        self._ranks[new.unknown] = len(self._known) + np.arange(len(more), dtype=np.int32)
        self._known = np.concatenate([self._known, more])
        total = self._known.take(self._ranks.take(new.patterns[:, 0]), axis=0)
        for leaf in range(1, new.patterns.shape[1]):
            total += self._known.take(self._ranks.take(new.patterns[:, leaf]), axis=0)
        place, known = self._met
        place = place.copy()
        place[new.cells] = known.shape[1] + np.arange(len(total), dtype=np.int32)
        # replaced as one, so that a thread never sees a place without its contributions
        self._met = place, np.concatenate([known, total[:, :-1].T], axis=1)


@cache
def _list_points(slots: int) -> list[tuple[float, float]]:
    """The points and weights by which an integral over a product of so many columns' factors is exact."""
    points, weights = np.polynomial.legendre.leggauss((slots + 1) // 2)
    return list(zip(((points + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


def weigh_leaves(paths: Paths, leaf: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Contributions (n, slots) of leaves by whether each of their slots holds, a bit for each."""
    total = np.zeros((len(leaf), paths.column.shape[1]))
    counts = paths.count_slots()[leaf]
    for count in np.unique(counts):  # fewer columns need fewer points
        alike = np.flatnonzero(counts == count)
        for first in range(0, len(alike), BLOCK_PATTERNS):
            some = alike[first : first + BLOCK_PATTERNS]
            holds = bits[some] >> np.arange(count)[:, None] & 1 == 1
            ratio = np.ascontiguousarray(paths.ratio[leaf[some], :count].T)
            total[some, :count] = weigh_patterns(ratio, paths.value[leaf[some]], holds).T
    return total


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
