from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from closedloop.core.evaluation.column_leaks import rank_columns, rank_pairs


def draw_table(rows: int, rate: float, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Labels, and columns of every kind of leak beside columns that say nothing."""
    draw = np.random.default_rng(seed)
    churned = draw.random(rows) < rate
    opened = draw.normal(size=rows)
    coin = draw.integers(0, 2, rows).astype(bool)
    frame = pd.DataFrame(
        {
            "near": np.where(draw.random(rows) < 0.985, churned, ~churned).astype(str),
            "only_where_missing": np.where(churned, np.nan, 1.0),
            "one_value": np.where(churned, 0.0, draw.normal(size=rows)),
            "noise": draw.normal(size=rows),
            "id": [f"c{number}" for number in range(rows)],
            "constant": 1.0,
            "empty": np.nan,
            "opened": opened,
            "closed": opened + np.where(churned, 0.01, -0.01) * draw.random(rows),
            "coin": coin.astype(str),
            "turned": (coin ^ churned).astype(str),
        }
    )
    return frame, churned


NUMERIC = ["only_where_missing", "one_value", "noise", "constant", "empty", "opened", "closed"]
CATEGORICAL = ["near", "id", "coin", "turned"]
LEAKS = {"near", "only_where_missing", "one_value"}


@pytest.mark.parametrize(("rows", "rate"), [(6000, 0.2), (6000, 0.02), (1000, 0.5), (300, 0.3)])
def test_a_column_that_is_the_label_is_found_whatever_its_shape_and_no_other(rows: int, rate: float) -> None:
    frame, churned = draw_table(rows, rate)
    found = rank_columns(frame, NUMERIC, CATEGORICAL, churned, seed=1)
    assert {name for name, auc in found.items() if auc >= 0.95} == LEAKS
    assert all(auc < 0.65 for name, auc in found.items() if name not in LEAKS)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_two_columns_that_are_the_label_together_are_found() -> None:
    frame, churned = draw_table(3000, 0.3)
    found = rank_pairs(frame, ["noise", "opened", "closed"], ["coin", "turned", "id"], churned, seed=1)
    strong = {frozenset(pair) for pair, auc in found.items() if auc >= 0.99}
    assert strong == {frozenset({"opened", "closed"}), frozenset({"coin", "turned"})}


def test_with_less_than_five_rows_of_a_class_nothing_is_said() -> None:
    frame, churned = draw_table(300, 0.3)
    churned[np.flatnonzero(churned)[4:]] = False
    assert rank_columns(frame, NUMERIC, CATEGORICAL, churned, seed=1) == {}
    assert rank_pairs(frame, NUMERIC, CATEGORICAL, churned, seed=1) == {}


def test_arguments_stay_as_they_are_and_the_seed_decides() -> None:
    frame, churned = draw_table(500, 0.3)
    before = frame.copy()
    first = rank_columns(frame, NUMERIC, CATEGORICAL, churned, seed=1)
    pd.testing.assert_frame_equal(frame, before)
    assert rank_columns(frame, NUMERIC, CATEGORICAL, churned, seed=1) == first
