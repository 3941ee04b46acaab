"""Numbers that name customers, and those that look alike and describe them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from closedloop.core.features.identifiers import is_identifier

RNG = np.random.default_rng(5)
EPOCH = 1_700_000_000


def name(values: object, called: str = "measured") -> pd.Series:
    return pd.Series(values, name=called, dtype=float)


IDENTIFIERS = {
    "row numbers": name(np.arange(100)),
    "row numbers in another order": name(RNG.permutation(5_000)),
    "numbers of a counter with gaps": name(90_000 + np.cumsum(RNG.integers(1, 8, 2_000))),
    "some missing": name([None, *range(2_000)]),
    "one written twice": name([7, *range(500)]),
    "random numbers called an id": name(RNG.integers(1e9, 1e14, 300), "account_id"),
    **{
        f"called {called}": name(RNG.integers(1e9, 1e14, 300), called)
        for called in ("id", "ID", "customerId", "PhoneNumber", "policy no", "zip-code")
    },
}
OTHERS = {
    "whole amounts": name(RNG.integers(0, 200_000, 150)),
    "amounts with cents, all different": name(RNG.permutation(20_000) / 100),
    "seconds of signing up": name(np.sort(RNG.integers(EPOCH, EPOCH + 10**8, 5_000))),
    "days of signing up": name(EPOCH // 86_400 + RNG.integers(0, 900, 400)),
    "dates as numbers, all different": name(pd.date_range("2000-01-01", periods=400, freq="11D").strftime("%Y%m%d")),
    "ages": name(RNG.integers(18, 90, 5_000)),
    "counts called a number": name(RNG.integers(0, 40, 5_000), "order_number"),
    "a small table": name(np.arange(99)),
    "a small table with ids": name(np.arange(60), "customer_id"),
    "nothing": name([None] * 200),
    "one value": name(np.full(200, 7)),
    "bids, which end in id": name(RNG.integers(1e9, 1e14, 300), "highest bid"),
    "called paid": name(RNG.integers(1e9, 1e14, 300), "PAID"),
}


@pytest.mark.parametrize("values", IDENTIFIERS.values(), ids=IDENTIFIERS)
def test_an_identifier_is_found(values: pd.Series) -> None:
    assert is_identifier(values)


@pytest.mark.parametrize("values", OTHERS.values(), ids=OTHERS)
def test_what_describes_a_customer_is_none(values: pd.Series) -> None:
    assert not is_identifier(values)


def test_draws_from_a_range_of_their_own_size_are_none() -> None:
    """As days or points are: whole, from a narrow range, and all different only by chance."""
    drawn = (np.random.default_rng(seed).integers(0, 5 * rows, rows) for seed in range(200) for rows in (100, 400))
    assert not any(is_identifier(name(values)) for values in drawn)
