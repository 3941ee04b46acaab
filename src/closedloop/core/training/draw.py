"""Training rows within a bound: the same draw on every machine, with weights by which it stands for all rows."""

from __future__ import annotations

import numpy as np
import pandas as pd

from closedloop.core.training.splits import hash_shares
from closedloop.core.training.weights import WEIGHT

CELL = ["event_timestamp", "churned"]


def draw_rows(rows: pd.DataFrame, rows_max: int, *, salt: str) -> pd.DataFrame:
    """At most ``rows_max`` rows in their order, those with the smallest hashes; all of them if there are no more.

    The hash is of customer and snapshot: a whole customer would bring a dozen rows that resemble each other, and leave
    as many other customers out. A row stays in the draw when rows are added, unless the bound pushes it out.

    Parameters
    ----------
    rows
        ``customer_id``, ``event_timestamp`` and ``churned``; ``repeats``, if there, counts a row as so many, and
        ``row_weight``, of an earlier draw, as so much.

    Returns
    -------
    DataFrame
        The rows with ``row_weight`` (float64): within a snapshot and a class the weights add up to the rows that were
        there, and altogether to all of them, also where a class of a snapshot was not drawn at all.

    Examples
    --------
    >>> day = pd.Timestamp("2024-01-01", tz="UTC")
    >>> rows = pd.DataFrame({"customer_id": list("abcd"), "event_timestamp": day, "churned": [True, False] * 2})
    >>> draw_rows(rows, 2, salt="7")[["customer_id", "row_weight"]].values.tolist()
    [['b', 2.0], ['d', 2.0]]
    """
    repeats = rows["repeats"].to_numpy() if "repeats" in rows else np.ones(len(rows), dtype=np.int64)
    weights = (rows[WEIGHT].to_numpy() if WEIGHT in rows else 1.0) * repeats.astype(np.float64)
    taken = np.ones(len(rows), dtype=bool)
    if repeats.sum() > rows_max:
        days = rows["event_timestamp"].astype("datetime64[us, UTC]").astype(np.int64)
        keys = (f"{one}\x1f{day}" for one, day in zip(rows["customer_id"], days, strict=True))
        shares = hash_shares(keys, f"rows {salt}")
        order = np.lexsort((rows["customer_id"].to_numpy(dtype=str), shares))
        taken[order] = np.cumsum(repeats[order]) <= rows_max
    cells = rows.groupby(CELL, sort=False).ngroup().to_numpy()
    whole, drawn = np.bincount(cells, weights), np.bincount(cells[taken], weights[taken], minlength=cells.max() + 1)
    found = (weights / repeats * whole[cells] / np.where(drawn > 0, drawn, 1)[cells])[taken]
    scale = weights.sum() / (found * repeats[taken]).sum()
    return rows[taken].assign(**{WEIGHT: found * scale})
