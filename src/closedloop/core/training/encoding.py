"""A frame as the matrix that a graph takes; MLflow's models carry this file, so it needs numpy and pandas alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from closedloop.errors import DataError, count_noun


def encode_columns(
    frame: pd.DataFrame, *, columns: Sequence[str], categories: Mapping[str, Sequence[str]]
) -> np.ndarray:
    """`encode_frame` on plain values, which the pipeline's "encode" step can hold and store."""
    packed = np.empty((len(frame), len(columns)), dtype=np.float32)
    for position, name in enumerate(columns):
        if name in categories:
            values = read_column(frame, name).to_numpy(dtype=object)
            index: Any = pd.Index(list(categories[name]), dtype="object")
            packed[:, position] = index.get_indexer(values)  # -1 where it is not found
        else:
            packed[:, position] = read_numbers(frame, name)
    return packed


def read_column(frame: pd.DataFrame, name: str) -> pd.Series:
    """A column that must be there."""
    if name not in frame.columns:
        raise DataError(f"column {name} is missing, found: {', '.join(map(str, frame.columns))}")
    return frame[name]


def read_numbers(frame: pd.DataFrame, name: str) -> np.ndarray:
    """A numeric column as float64, NaN where a value is missing; float32 must be able to hold it."""
    try:
        values = read_column(frame, name).to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise DataError(f"column {name}: a numeric feature holds numbers ({error})") from error
    too_large = np.abs(values) > np.finfo(np.float32).max
    if too_large.any():
        raise DataError(
            f"column {name}: {values[too_large][0]} in {count_noun(too_large.sum(), 'row')}, "
            "allowed: what float32 can hold"
        )
    return values
