"""How far single columns, and pairs of columns, rank the label: a column that does so alone mostly is the label."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

NameT = TypeVar("NameT", bound=Hashable)
ROWS_MAX, PAIR_ROWS_MAX = 20_000, 5_000
BINS, PAIR_BINS = 50, 12
FOLDS = 5
ROWS_A_BIN = 20
PAIR_COLUMNS_MAX = 60


def rank_columns(
    frame: pd.DataFrame, numeric: Sequence[str], categorical: Sequence[str], labels: npt.ArrayLike, *, seed: int
) -> dict[str, float]:
    """Cross-fitted ROC AUC of each column alone, the highest first.

    A column is cut into at most 50 bins of equally many rows (numeric) or into its categories, missing values being
    one more, and each of these is scored by the churn rate that it has in the other four of five folds (scikit-learn's
    `TargetEncoder`). So a leak is seen whatever its shape, also where it is that a value is missing, and an identifier
    is not taken for one. At most 20,000 rows are used; of a class with less than 5 rows nothing can be said.

    Examples
    --------
    >>> labels = np.tile([0, 1], 200)
    >>> frame = pd.DataFrame({"leak": np.where(labels, "yes", "no"), "one": 1.0})
    >>> rank_columns(frame, ["one"], ["leak"], labels, seed=1)
    {'leak': 1.0, 'one': 0.5}
    """
    rows = _draw_rows(len(frame), ROWS_MAX, seed)
    codes = _code_columns(frame.iloc[rows], numeric, categorical, BINS)
    return _rank(codes, np.asarray(labels)[rows].astype(np.int8), seed)


def rank_pairs(
    frame: pd.DataFrame, numeric: Sequence[str], categorical: Sequence[str], labels: npt.ArrayLike, *, seed: int
) -> dict[tuple[str, str], float]:
    """Cross-fitted ROC AUC of each pair of columns, the highest first.

    A pair is scored by the cells of both columns' bins, and two numeric columns by their difference too; the better of
    the two counts. At most 5,000 rows and 60 columns are used.
    """
    rows = _draw_rows(len(frame), PAIR_ROWS_MAX, seed)
    frame, truth = frame.iloc[rows], np.asarray(labels)[rows].astype(np.int8)
    names = list(_rank(_code_columns(frame, numeric, categorical, BINS), truth, seed))[:PAIR_COLUMNS_MAX]
    codes = _code_columns(frame, [n for n in numeric if n in names], [n for n in categorical if n in names], PAIR_BINS)
    cells: dict[tuple[str, str, str], np.ndarray] = {}
    for one, other in combinations(names, 2):
        cells[one, other, "cells"] = codes[one] * (codes[other].max() + 2) + codes[other]
        if one in numeric and other in numeric:
            cells[one, other, "difference"] = _code_numbers(frame[one].astype(float) - frame[other].astype(float), BINS)
    found: dict[tuple[str, str], float] = {}
    for (one, other, _), auc in _rank(cells, truth, seed).items():
        found.setdefault((one, other), auc)  # the highest comes first
    return found


def _draw_rows(rows: int, most: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).permutation(rows)[:most])


def _code_columns(
    frame: pd.DataFrame, numeric: Sequence[str], categorical: Sequence[str], bins: int
) -> dict[str, np.ndarray]:
    codes = {name: _code_numbers(frame[name].astype(float), bins) for name in numeric}
    return codes | {name: pd.factorize(frame[name])[0] for name in categorical}


def _code_numbers(values: pd.Series, bins: int) -> np.ndarray:
    """The bin of each value, -1 where it is missing."""
    most = max(2, min(bins, len(values) // ROWS_A_BIN))
    known = np.isfinite(values.to_numpy())
    if not known.any():
        return np.full(len(values), -1)
    # a value that many rows have is an edge, and so a bin of its own
    edges = np.unique(np.quantile(values[known], np.linspace(0, 1, most + 1)))
    return np.where(known, np.searchsorted(edges, values), -1)


def _rank(codes: Mapping[NameT, np.ndarray], truth: np.ndarray, seed: int) -> dict[NameT, float]:
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import TargetEncoder

    if not codes or min(truth.sum(), len(truth) - truth.sum()) < FOLDS:
        return {}
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    encoder = TargetEncoder(target_type="binary", cv=folds)
    scores = encoder.fit_transform(np.column_stack(list(codes.values())), truth)
    aucs = {name: float(roc_auc_score(truth, scores[:, place])) for place, name in enumerate(codes)}
    return dict(sorted(aucs.items(), key=lambda entry: -entry[1]))
