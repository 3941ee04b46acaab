"""Tables of contributions keep what they have computed of leaves, up to a limit of memory."""

from __future__ import annotations

import numpy as np

from closedloop.core.reasons.paths import Bins, TreeNodes, list_paths
from closedloop.core.reasons.tables import Tables

COLUMNS, DEPTH, TREES = 12, 6, 12


def grow_trees() -> TreeNodes:
    """Complete trees that split by random columns and thresholds; a node's children follow their whole level."""
    draw = np.random.default_rng(3)
    size = 2 ** (DEPTH + 1) - 1
    node = np.tile(np.arange(size), TREES)
    tree = np.repeat(np.arange(TREES), size)
    is_leaf = node >= 2**DEPTH - 1
    return TreeNodes(
        tree=tree,
        column=draw.integers(0, COLUMNS, len(node)),
        threshold=draw.normal(size=len(node)).astype(np.float32),
        yes=np.where(is_leaf, 0, tree * size + 2 * node + 1),
        no=np.where(is_leaf, 0, tree * size + 2 * node + 2),
        is_leaf=is_leaf,
        is_missing_yes=np.zeros(len(node), dtype=bool),
        cover=2.0 ** (DEPTH - np.floor(np.log2(node + 1))),
        value=np.where(is_leaf, draw.normal(size=len(node)), 0.0),
    )


def test_patterns_of_leaves_are_kept_up_to_a_limit_and_change_no_contribution() -> None:
    nodes = grow_trees()
    bins = Bins(nodes, COLUMNS)
    paths, _ = list_paths(nodes, bins)
    keeping, forgetting = (Tables(paths, bins, frozenset(), kept_bytes_max=limit) for limit in (2**40, 10_000))
    draw = np.random.default_rng(4)
    for _ in range(3):
        places = bins.place(draw.normal(size=(400, COLUMNS)).astype(np.float32))
        np.testing.assert_allclose(keeping.weigh(places), forgetting.weigh(places), rtol=0, atol=1e-12)
    assert keeping.kept_bytes > 1_000_000
    assert forgetting.kept_bytes <= 10_000
