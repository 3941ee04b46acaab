"""Shares of a feature's small picture add up to one in both samples, whatever the values are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from closedloop.core.monitoring.shapes import BINS, MISSING, OTHER, tabulate_shape

NUMBERS = pd.Series(np.linspace(0, 100, 1_001))


@pytest.mark.parametrize(
    ("reference", "window"),
    [
        (NUMBERS, NUMBERS + 40),
        (NUMBERS, pd.Series([5.0])),
        (NUMBERS, pd.Series([np.nan, np.nan, 7.0])),
        (pd.Series([1.0, 1.0]), pd.Series([1.0, 1e9])),
        (pd.Series([np.nan]), pd.Series([np.nan])),
        (pd.Series(list("abcdefghijklm")), pd.Series(["a", None, "new"])),
        (pd.Series(["missing", None]), pd.Series(["other", "(other)"])),
        (pd.Series([0.5, 0.7]), pd.Series([], dtype=float)),
    ],
)
def test_shares_add_up(reference: pd.Series, window: pd.Series) -> None:
    bars = tabulate_shape(reference, window)
    assert sum(bar["reference"] for bar in bars) == pytest.approx(1, abs=0.002)
    assert sum(bar["window"] for bar in bars) == pytest.approx(1 if len(window) else 0, abs=0.002)


def test_a_shift_moves_the_shares_and_unknown_categories_are_others() -> None:
    bars = tabulate_shape(NUMBERS, NUMBERS + 100)
    assert len(bars) == BINS
    assert bars[0]["window"] < 0.01 < bars[0]["reference"]
    assert bars[-1]["reference"] < 0.01 < bars[-1]["window"]
    plans = tabulate_shape(pd.Series(["a"] * 9 + ["b"]), pd.Series(["b", None, *"cdefghijk"]))
    assert [bar["name"] for bar in plans[:2]] == ["a", "b"]
    assert [bar["name"] for bar in plans[-2:]] == [OTHER, MISSING]


def test_missing_numbers_have_a_bar_of_their_own() -> None:
    bars = tabulate_shape(pd.Series([1.0, 2.0, 3.0]), pd.Series([np.nan, 1.0]))
    assert bars[-1] == {"name": MISSING, "reference": 0.0, "window": 0.5}
