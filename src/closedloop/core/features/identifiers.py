"""Columns of numbers that name customers instead of describing them, as ids and row numbers do."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

ROWS_MIN = 100  # of fewer customers all may differ by chance
UNIQUE_SHARE = 0.99
# As many numbers drawn at random from a range this many times their count hold repetitions: 100 numbers about ten.
RANGE_PER_VALUE = 5
NAME = re.compile(r"(?:^|[\W_])(?i:id|key|no|nr|number|code)$|[a-z](?:Id|ID|Key|No|Nr|Number|Code)$")


def is_identifier(values: pd.Series) -> bool:
    """Whether numbers name customers: whole, different for nearly all, and named or dense as ids are.

    Amounts and times differ for nearly all customers too, but are no neighbours of each other.

    Examples
    --------
    >>> [is_identifier(pd.Series(range(first, 2 * first), name="n", dtype=float)) for first in (50, 1_000)]
    [False, True]
    """
    known = values.dropna().to_numpy(dtype=float)
    if len(known) < ROWS_MIN or not (known == np.floor(known)).all():
        return False
    unique = len(np.unique(known))
    if unique < UNIQUE_SHARE * len(known):
        return False
    is_dense = float(known.max() - known.min()) < RANGE_PER_VALUE * len(known)
    return is_dense or NAME.search(str(values.name)) is not None
