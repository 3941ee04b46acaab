"""Profit of offers: sums by hand, a search over every list, and intervals by customer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from closedloop.core.evaluation.bootstrap import Bootstrap
from closedloop.core.evaluation.profit import (
    choose_offers,
    compare_profit,
    count_profit,
    expected_profit,
    measure_profit,
    read_kept,
    tabulate_capacity,
    tabulate_profit,
)
from closedloop.core.evaluation.value import CustomerValue, KeptCustomer
from closedloop.errors import DataError

VALUE = CustomerValue(kept=KeptCustomer(number=100), offer_cost=5, save_rate=0.2)
FEW = Bootstrap(seed=3, samples=100)


def draw_rows(rows: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores that are the true probabilities, and values."""
    generator = np.random.default_rng(seed)
    scores = generator.beta(1.0, 2.0, rows)
    return generator.random(rows) < scores, scores, generator.gamma(2.0, 60.0, rows)


def test_kept_is_read_from_feature_rows() -> None:
    rows = pd.DataFrame({"age": [40, None], "order_sum_30d": [10.0, 20.0], "visit_sum_30d": [1.0, np.nan]})
    assert read_kept(KeptCustomer(number=80), rows, ()).tolist() == [80, 80]
    assert read_kept(KeptCustomer(column="age", share=2), rows, ["age"]).tolist() == [80, 0]
    amount = KeptCustomer(amount_of_days=30, share=0.5)
    assert read_kept(amount, rows, ["order_sum_30d", "visit_sum_30d"]).tolist() == [5.5, 10]


def test_profit_is_that_of_the_sum_by_hand() -> None:
    # a churner is kept one time in five: 100 * .2 - 5 = 15; who stays costs the offer
    assert count_profit([1, 0], [100, 100], VALUE).tolist() == [15, -5]
    assert expected_profit([0.25, 0.5], [100, 200], VALUE).tolist() == [0, 15]


def test_one_value_a_row_is_required() -> None:
    with pytest.raises(DataError, match="kept: found"):
        expected_profit([0.5, 0.5], [100.0], VALUE)


def test_offers_go_to_the_best_of_each_cycle_and_never_below_zero() -> None:
    scores, kept = np.array([0.9, 0.5, 0.4, 0.1, 0.6]), np.full(5, 100.0)
    assert choose_offers(scores, kept, VALUE).tolist() == [True, True, True, False, True]
    two = VALUE.model_copy(update={"capacity": 2})
    assert choose_offers(scores, kept, two).tolist() == [True, False, False, False, True]
    assert choose_offers(scores, kept, two, [1, 2, 2, 2, 1]).tolist() == [True, True, True, False, True]
    assert choose_offers(scores, np.array([1.0, 1, 1, 1000, 1]), two).tolist() == [False, False, False, True, False]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8), st.integers(0, 300)), min_size=2, max_size=12))
def test_both_curves_are_those_of_every_list_counted_by_hand(rows: list[tuple[bool, int, int]]) -> None:
    labels, eighths, worth = (np.array(column) for column in zip(*rows, strict=True))
    scores, kept = eighths / 8, worth.astype(float)
    gains = [churned * 0.2 * value - 5 for churned, value in zip(labels, kept, strict=True)]
    table = tabulate_profit(labels, scores, kept, VALUE, FEW)
    for line in table.iloc[1:].itertuples():
        flagged = [gain for gain, score in zip(gains, scores, strict=True) if score >= line.threshold]
        assert line.profit == pytest.approx(sum(flagged) / len(rows))
        assert line.offered_share == len(flagged) / len(rows)
    assert sorted(table["threshold"].iloc[1:]) == sorted(set(scores))
    assert table["profit"].iloc[0] == table["offered_share"].iloc[0] == 0
    capacity = tabulate_capacity(labels, scores, kept, VALUE, FEW)
    best_first = sorted(range(len(rows)), key=lambda row: -(scores[row] * 0.2 * kept[row] - 5))
    for line in capacity.itertuples():
        assert line.profit == pytest.approx(sum(gains[row] for row in best_first[: line.offers]) / len(rows))


def test_curves_are_thinned_and_keep_both_ends() -> None:
    labels, scores, kept = draw_rows(3000)
    for table in (
        tabulate_profit(labels, scores, kept, VALUE, FEW),
        tabulate_capacity(labels, scores, kept, VALUE, FEW),
    ):
        assert len(table) == 100
        assert table["offered_share"].iloc[[0, -1]].tolist() == [0, 1]
        assert (table["low"] <= table["profit"]).all()
        assert (table["profit"] <= table["high"]).all()
        assert (table["high"] - table["low"]).iloc[-1] > 0


def test_intervals_of_repeated_customers_are_wider() -> None:
    labels, scores, kept = (np.repeat(one, 4) for one in draw_rows(300))
    offered, gains = choose_offers(scores, kept, VALUE), count_profit(labels, kept, VALUE)
    mean, rows = measure_profit(gains, offered, FEW)
    _, customers = measure_profit(gains, offered, Bootstrap(3, 100, customers=np.repeat(np.arange(300), 4)))
    assert mean == pytest.approx(gains[offered].sum() / 1200)
    assert customers.high - customers.low > 1.5 * (rows.high - rows.low)


def test_a_better_list_earns_more_paired_by_customer() -> None:
    labels, scores, kept = draw_rows(3000)
    gains, sharp = count_profit(labels, kept, VALUE), choose_offers(scores, kept, VALUE)
    blind = np.random.default_rng(5).permutation(sharp)
    found, swapped = compare_profit(gains, blind, sharp, FEW), compare_profit(gains, sharp, blind, FEW)
    assert found.interval.low > 0
    assert found.difference == pytest.approx(found.challenger - found.champion)
    assert swapped.difference == pytest.approx(-found.difference)
    same = compare_profit(gains, sharp, sharp, FEW)
    assert (same.difference, *same.interval) == (0, 0, 0)
