"""The leaves of a tree ensemble, each with what a row must hold in every column on its path to reach it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

UNUSED, OPEN = -1, 1 << 30  # a slot without a column, and an interval without an upper end
_SORTED_DEPTH = 64  # beyond it leaves keep the order of their levels, which only costs time


class TreeNodes(NamedTuple):
    """The nodes of all trees, shape (n,) each, one tree after another and its root first.

    A row goes to ``yes`` where its value in ``column`` is at most ``threshold`` (float32), else to ``no``; a missing
    value goes to ``yes`` where ``is_missing_yes``. ``cover`` is the weight of the training rows that a node has seen;
    ``value`` is what a leaf adds to the raw score.
    """

    tree: np.ndarray
    column: np.ndarray
    threshold: np.ndarray
    yes: np.ndarray
    no: np.ndarray
    is_leaf: np.ndarray
    is_missing_yes: np.ndarray
    cover: np.ndarray
    value: np.ndarray


class Paths(NamedTuple):
    """The leaves, neighbours in a tree side by side, with a slot for each column on the way: shape (leaves, slots).

    A row satisfies a slot where the bin of its value (`Bins`) is in (``low``, ``high``], or ``is_missing_in`` if it is
    missing. ``ratio`` is the share of the training rows that take the slot's branches. ``tree`` and ``value`` have
    shape (leaves,).
    """

    column: np.ndarray
    low: np.ndarray
    high: np.ndarray
    is_missing_in: np.ndarray
    ratio: np.ndarray
    tree: np.ndarray
    value: np.ndarray

    def take(self, leaves: np.ndarray, slots: int) -> Paths:
        """Some leaves, and the first slots of them."""
        return Paths._make([*(part[leaves, :slots] for part in self[:5]), self.tree[leaves], self.value[leaves]])

    def count_slots(self) -> np.ndarray:
        """How many columns are on the way to each leaf."""
        return np.asarray((self.column != UNUSED).sum(axis=1))


class Level(NamedTuple):
    """The edges of all trees to the nodes of one level: first every inner node's "yes", then every one's "no".

    ``inner`` are the places of those inner nodes among the nodes above, shape (n / 2,). ``above`` and ``own`` are what
    the edge's column must hold before and after the edge: low, high, is missing in (see `Paths`), shape (3, n). The
    rest has shape (n,): ``before`` and ``after`` are the ratios of the two; ``value`` is a leaf's, else 0.
    """

    inner: np.ndarray
    column: np.ndarray
    above: np.ndarray
    own: np.ndarray
    value: np.ndarray
    before: np.ndarray
    after: np.ndarray


class Bins:
    """Values as places among the ensemble's thresholds: all that its trees can tell apart."""

    def __init__(self, nodes: TreeNodes, n_columns: int) -> None:
        inner = ~nodes.is_leaf
        self.thresholds = [np.unique(nodes.threshold[inner & (nodes.column == place)]) for place in range(n_columns)]

    def place(self, matrix: np.ndarray) -> np.ndarray:
        """Bins of float32 rows (n, n_columns), in shape (n_columns, n); the last bin of a column is "missing"."""
        found = np.empty((len(self.thresholds), len(matrix)), dtype=np.intp)
        for column, thresholds in enumerate(self.thresholds):
            values = matrix[:, column]
            found[column] = np.searchsorted(thresholds, values, side="left")
            found[column][np.isnan(values)] = self.missing(column)
        return found

    def missing(self, column: int) -> int:
        """The bin of a missing value."""
        return len(self.thresholds[column]) + 1


class _Front(NamedTuple):
    """The nodes of one level with their paths; ``turns`` has a bit for each level, 1 where the path goes to "no"."""

    node: np.ndarray
    turns: np.ndarray
    column: np.ndarray
    low: np.ndarray
    high: np.ndarray
    is_missing_in: np.ndarray
    ratio: np.ndarray

    def take(self, which: np.ndarray) -> _Front:
        return _Front(*(part[which] for part in self))

    def widen(self, slots: int) -> _Front:
        """The same with this many slots, the new ones unused."""
        extra = slots - self.column.shape[1]
        blank = (UNUSED, UNUSED, OPEN, True, 1.0)
        parts = zip(self[2:], blank, strict=True)
        wide = (np.pad(part, ((0, 0), (0, extra)), constant_values=fill) for part, fill in parts)
        return _Front(self.node, self.turns, *wide)


def list_paths(nodes: TreeNodes, bins: Bins) -> tuple[Paths, list[Level]]:
    """Follow every path from the roots to the leaves, all trees a level at a time; also returns the levels below."""
    place = np.zeros(len(nodes.tree), dtype=np.int64)  # of a node's threshold among its column's
    for column, thresholds in enumerate(bins.thresholds):
        here = ~nodes.is_leaf & (nodes.column == column)
        place[here] = np.searchsorted(thresholds, nodes.threshold[here])
    roots = np.flatnonzero(np.r_[True, nodes.tree[1:] != nodes.tree[:-1]])
    none = np.empty((len(roots), 0))
    whole = none.astype(np.int64)
    front = _Front(roots, np.zeros(len(roots), np.uint64), whole, whole, whole, none.astype(bool), none)
    found: list[_Front] = []
    edges: list[Level] = []
    for depth in range(len(nodes.tree)):
        is_leaf = nodes.is_leaf[front.node]
        found.append(front.take(is_leaf))
        if is_leaf.all():
            break
        front, level = _descend(nodes, place, front.take(~is_leaf), depth)
        edges.append(level._replace(inner=np.flatnonzero(~is_leaf)))
    slots = max(1, *(level.column.shape[1] for level in found))
    levels = [level.widen(slots) for level in found]
    node, turns, *parts = (np.concatenate(each) for each in zip(*levels, strict=True))
    order = np.lexsort((turns, nodes.tree[node]))
    leaves = Paths._make([*(part[order] for part in parts), nodes.tree[node][order], nodes.value[node][order]])
    return leaves, edges


def _descend(nodes: TreeNodes, place: np.ndarray, front: _Front, depth: int) -> tuple[_Front, Level]:
    """The children of these nodes, and the edges to them."""
    column = nodes.column[front.node]
    same = front.column == column[:, None]
    used = (front.column != UNUSED).sum(axis=1)
    slot = np.where(same.any(axis=1), np.argmax(np.c_[same, np.ones(len(same), bool)], axis=1), used)
    front = front.widen(max(front.column.shape[1], int(slot.max()) + 1))
    at = np.arange(len(slot)), slot
    front.column[at] = column
    above = [part[at] for part in front[3:]]
    children = []
    for is_yes in (True, False):
        child = (nodes.yes if is_yes else nodes.no)[front.node]
        parts = [part.copy() for part in front]
        low, high, is_missing_in, ratio = parts[3:]
        if is_yes:
            high[at] = np.minimum(high[at], place[front.node])
        else:
            low[at] = np.maximum(low[at], place[front.node])
            if depth < _SORTED_DEPTH:
                parts[1] |= np.uint64(1 << (_SORTED_DEPTH - 1 - depth))
        is_missing_in[at] &= nodes.is_missing_yes[front.node] == is_yes
        ratio[at] *= nodes.cover[child] / nodes.cover[front.node]
        children.append(_Front(child, *parts[1:]))
    below = _Front(*(np.concatenate(each) for each in zip(*children, strict=True)))
    own = [part[np.arange(len(below.node)), np.tile(slot, 2)] for part in below[3:]]
    level = Level(
        inner=np.empty(0, dtype=np.intp),
        column=np.tile(column, 2),
        above=np.tile(np.stack(above[:3]).astype(np.int32), 2),
        own=np.stack(own[:3]).astype(np.int32),
        value=np.where(nodes.is_leaf[below.node], nodes.value[below.node], 0.0),
        before=np.tile(above[3], 2),
        after=own[3],
    )
    return below, level
