"""The shares behind a small picture of a feature: reference rows beside the rows of a window."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

BINS, CATEGORIES_SHOWN = 10, 8
OTHER, MISSING = "(other)", "(missing)"


def tabulate_shape(reference: pd.Series, window: pd.Series) -> list[dict[str, Any]]:
    """Shares of both in the same bins: numbers in ten of equal width, texts by category; missing values are the last.

    The outer bins of numbers take what lies beyond the middle 98% of both. Categories are the largest eight, and
    ``(other)``.

    Returns
    -------
    list of dict
        ``name`` of the bin, and ``reference`` and ``window``: its shares in [0, 1]. No missing value, no bin of them.

    Examples
    --------
    >>> tabulate_shape(pd.Series(["a", "b"]), pd.Series(["a", "a"]))[1]
    {'name': 'b', 'reference': 0.5, 'window': 0.0}
    """
    both = pd.concat([reference, window], ignore_index=True)
    numeric = pd.api.types.is_numeric_dtype(both) and both.notna().any()
    names, places = _place_numbers(both.astype(float)) if numeric else _place_texts(both)
    parts = places[: len(reference)], places[len(reference) :]
    shares = [np.bincount(part, minlength=len(names)) / max(len(part), 1) for part in parts]
    used = shares[0] + shares[1] > 0
    return [
        {"name": name, "reference": round(float(before), 4), "window": round(float(now), 4)}
        for name, before, now, kept in zip(names, *shares, used, strict=True)
        if kept or name not in (OTHER, MISSING)
    ]


def _place_numbers(values: pd.Series) -> tuple[list[str], npt.NDArray[np.intp]]:
    low, high = values.quantile(0.01), values.quantile(0.99)
    edges = np.linspace(low, high, BINS + 1) if high > low else np.array([low, low])
    names = [f"{left:.3g} to {right:.3g}" for left, right in itertools.pairwise(edges)]
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(names) - 1)
    return [*names, MISSING], np.where(values.isna(), len(names), places)


def _place_texts(values: pd.Series) -> tuple[list[str], npt.NDArray[np.intp]]:
    names = [str(name) for name in values.value_counts().head(CATEGORIES_SHOWN).index]
    places = pd.Categorical(values.astype(str), categories=names).codes.astype(np.intp)
    places = np.where(places < 0, len(names), places)
    return [*names, OTHER, MISSING], np.where(values.isna(), len(names) + 1, places)
