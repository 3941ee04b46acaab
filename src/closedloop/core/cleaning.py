"""Source rows to canonical tables: which rows go, for which reasons, and what the rest mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

MISSING_ID, CANCELLATION, DUPLICATE = "missing_id", "cancellation", "duplicate"


@dataclass(frozen=True)
class CleaningRules:
    """What to drop: see ``dataset.Cleaning``."""

    entity_id: str
    drop_missing_id: bool = True
    drop_duplicates: bool = False
    cancellation_column: str | None = None
    cancellation_prefix: str = ""
    require_positive: tuple[str, ...] = ()


def is_blank(values: pd.Series) -> pd.Series:
    """Which values are missing: null, empty or white space only."""
    return values.isna() | (values.astype("string").str.strip() == "").fillna(False).astype(bool)


def normalise_ids(values: pd.Series) -> pd.Series:
    """Ids as text; a whole number that a spreadsheet wrote as ``17850.0`` becomes ``17850``.

    >>> normalise_ids(pd.Series(["17850.0", " A1 ", None])).tolist()
    ['17850', 'A1', None]
    """
    text = values.astype("string").str.strip().str.replace(r"^(\d+)\.0$", r"\1", regex=True)
    return text.astype(object).where(~is_blank(values), None)


def find_dirt(
    rows: pd.DataFrame, rules: CleaningRules, numbers: dict[str, pd.Series], seen: np.ndarray
) -> pd.DataFrame:
    """Which rule hits which row; every rule looks at every row, so that overlaps show.

    Parameters
    ----------
    rows
        Source rows as text, index 0..n-1.
    numbers
        The columns of ``require_positive`` as numbers.
    seen
        Hashes of all rows before these, from ``add_hashes``.

    Returns
    -------
    DataFrame
        One boolean column a rule, in the order in which reasons are attributed; same index as ``rows``.
    """
    dirt: dict[str, pd.Series] = {}
    if rules.drop_missing_id:
        dirt[MISSING_ID] = is_blank(rows[rules.entity_id])
    if rules.cancellation_column is not None:
        text = rows[rules.cancellation_column].astype("string").str.startswith(rules.cancellation_prefix)
        dirt[CANCELLATION] = text.fillna(False).astype(bool)
    for column in rules.require_positive:
        dirt[f"{column}_not_positive"] = ~(numbers[column] > 0)
    if rules.drop_duplicates:
        hashes = hash_rows(rows)
        dirt[DUPLICATE] = (
            pd.Series(_contains(seen, hashes), index=rows.index) | pd.Series(hashes, index=rows.index).duplicated()
        )
    return pd.DataFrame(dirt, index=rows.index)


def hash_rows(rows: pd.DataFrame) -> np.ndarray:
    """64-bit hash of each whole row, shape (n,); two different rows among 10 million collide with p = 3e-6."""
    return pd.util.hash_pandas_object(rows, index=False).to_numpy()


def add_hashes(seen: np.ndarray, rows: pd.DataFrame) -> np.ndarray:
    """``seen`` and the hashes of these rows, ascending: merged, since sorting anew for each of many files is slow."""
    return np.sort(np.concatenate([seen, np.sort(hash_rows(rows))]), kind="stable")


def _contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    places = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    found: np.ndarray = ordered[places] == values
    return found


def count_dirt(dirt: pd.DataFrame) -> list[dict[str, object]]:
    """One entry a rule: how many rows it hits, how many for this reason first, and which other rules hit the same.

    >>> count_dirt(pd.DataFrame({"a": [True, True, False], "b": [True, False, True]}))[1]
    {'rule': 'b', 'rows': 2, 'first_reason': 1, 'also': {'a': 1}}
    """
    entries: list[dict[str, object]] = []
    earlier = pd.Series(False, index=dirt.index)
    for rule in dirt.columns:
        hit = dirt[rule]
        also = {other: int((hit & dirt[other]).sum()) for other in dirt.columns if other != rule}
        entries.append(
            {
                "rule": rule,
                "rows": int(hit.sum()),
                "first_reason": int((hit & ~earlier).sum()),
                "also": {other: count for other, count in also.items() if count},
            }
        )
        earlier = earlier | hit
    return entries
