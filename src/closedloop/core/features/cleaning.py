"""Which rows of a source are dropped, and for which reasons."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd

from closedloop.rules import find_code

MISSING_WORDS = frozenset({"\\n", "null", "(null)", "nil", "na", "n/a", "#n/a", "<na>", "nan", "?"})
MISSING_ID, CANCELLATION, DUPLICATE = "missing_id", "cancellation", "duplicate"

NOTHING_SEEN = np.array([], dtype="uint64")


@dataclass(frozen=True)
class CleaningRules:
    """The rules for rows to drop: see ``dataset.Cleaning``."""

    drop_missing_id: bool = True
    cancellation_column: str | None = None
    cancellation_prefix: str = ""
    require_positive: tuple[str, ...] = ()
    require_value: tuple[str, ...] = ()


def is_blank(values: pd.Series) -> pd.Series:
    """Which values are missing: null, empty or white space only."""
    return values.isna() | (values.astype("string").str.strip() == "").fillna(False).astype(bool)


def count_missing_words(values: pd.Series) -> dict[str, int]:
    """How often a column of text holds words that other programs write for a missing value, as they stand there.

    >>> count_missing_words(pd.Series(["NULL", "basic", "?", "NULL", None]))
    {'NULL': 2, '?': 1}
    """
    different = values.dropna()
    hits = different[different.str.casefold().isin(MISSING_WORDS)]
    return {str(word): int(count) for word, count in hits.value_counts().items()}


def find_broken_rules(
    rows: pd.DataFrame,
    rules: CleaningRules,
    ids: pd.Series,
    numbers: dict[str, pd.Series],
    *,
    hashes: np.ndarray | None = None,
    seen: np.ndarray = NOTHING_SEEN,
) -> pd.DataFrame:
    """Which rule hits which row; every rule looks at every row, so that overlaps show.

    Parameters
    ----------
    rows
        Source rows as text, index 0..n-1.
    ids
        Those of the rows, None where one is missing.
    numbers
        The columns of ``require_positive`` as numbers.
    hashes
        Of these rows, from `hash_rows`; None: duplicates stay.
    seen
        Hashes of all rows before these, from `add_hashes`.

    Returns
    -------
    DataFrame
        One boolean column a rule, in the order in which reasons are attributed; same index as ``rows``.
    """
    broken: dict[str, pd.Series] = {}
    if rules.drop_missing_id:
        broken[MISSING_ID] = ids.isna()
    if rules.cancellation_column is not None:
        text = rows[rules.cancellation_column].astype("string").str.startswith(rules.cancellation_prefix)
        broken[CANCELLATION] = text.fillna(False).astype(bool)
    for column in rules.require_positive:
        broken[f"{column}_not_positive"] = ~(numbers[column] > 0)
    for column in rules.require_value:
        broken[f"{column}_blank"] = is_blank(rows[column])
    if hashes is not None:
        earlier = pd.Series(_contains(seen, hashes), index=rows.index)
        broken[DUPLICATE] = earlier | pd.Series(hashes, index=rows.index).duplicated()
    return pd.DataFrame(broken, index=rows.index)


def hash_rows(rows: pd.DataFrame) -> np.ndarray:
    """64-bit hash of each whole row, shape (n,); two different rows among 10 million collide with p = 3e-6.

    Neither the order of the columns counts nor their types: files of one source may differ in both.
    """
    names = sorted(map(str, rows.columns))
    spelt = pd.DataFrame({name: _spell(rows[name]) for name in names}, index=rows.index)
    salt = int.from_bytes(hashlib.sha256("\x1f".join(names).encode()).digest()[:8], "little")
    hashes: np.ndarray = pd.util.hash_pandas_object(spelt, index=False).to_numpy() ^ np.uint64(salt)
    return hashes


def _spell(values: pd.Series) -> pd.Series:
    """Values as text, spelt as ids and codes are whatever the type of their column; None where one is missing."""
    try:
        codes, different = pd.factorize(values)
    except TypeError:  # lists and mappings
        return values.astype("string").astype(object).mask(values.isna(), None)
    spelt = [find_code(value) or str(value) for value in different]
    return pd.Series(np.array([*spelt, None], dtype=object)[codes], index=values.index)


def add_hashes(seen: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """``seen`` and these hashes, ascending: merged, since sorting anew for each of many files is slow."""
    return np.sort(np.concatenate([seen, np.sort(hashes)]), kind="stable")


def _contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    places = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    found: np.ndarray = ordered[places] == values
    return found


def count_broken_rules(broken: pd.DataFrame) -> list[dict[str, object]]:
    """One entry a rule: how many rows it hits, how many for this reason first, and which other rules hit the same.

    >>> count_broken_rules(pd.DataFrame({"a": [True, True, False], "b": [True, False, True]}))[1]
    {'rule': 'b', 'rows': 2, 'first_reason': 1, 'also': {'a': 1}}
    """
    entries: list[dict[str, object]] = []
    earlier = pd.Series(False, index=broken.index)
    for rule in broken.columns:
        hit = broken[rule]
        also = {other: int((hit & broken[other]).sum()) for other in broken.columns if other != rule}
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
