"""What the offers to the test rows bring: capacity of a cycle, figures by hand, and the gate's three answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.config.dataset import DatasetConfig, load_dataset
from closedloop.config.params import Params, parse_params
from closedloop.config.yaml import read_yaml
from closedloop.core.evaluation.bootstrap import Bootstrap
from closedloop.core.evaluation.value import CustomerValue, KeptCustomer
from closedloop.stages.parts.money import Stake, judge_profit, measure_money, read_stake

ROOT = Path(__file__).parents[4]
SHOP = load_dataset("shop", ROOT / "configs/datasets").model_copy(update={"value": None})
VALUE = CustomerValue(kept=KeptCustomer(amount_of_days=90, share=0.5), offer_cost=5, save_rate=0.2, capacity=10)
VALUED = SHOP.model_copy(update={"value": VALUE})
FEW = Bootstrap(seed=3, samples=100)
SCORES = np.array([0.9, 0.8, 0.7, 0.1])


def read(dataset: DatasetConfig = VALUED, **changes: Any) -> Stake | None:
    days = pd.to_datetime(["2024-01-01", "2024-01-01", "2024-02-01", "2024-02-01"])
    columns = {"event_timestamp": days, "churned": [True, False, True, False], "purchase_sum_90d": [200.0] * 4}
    return read_stake(make_params(**changes), dataset, pd.DataFrame(columns))


def make_params(**changes: Any) -> Params:
    return parse_params({**read_yaml(ROOT / "params.yaml"), **changes}, "a test")


@pytest.mark.parametrize(
    ("split", "capacity"),
    [({"by": "time"}, 10), ({"by": "customer"}, 2), ({"by": "customer", "test_fraction": 0.01}, 1)],
)
def test_held_out_customers_have_their_share_of_the_capacity(split: dict[str, Any], capacity: int) -> None:
    stake = read(split=split)
    assert stake is not None
    assert stake.value.capacity == capacity
    assert stake.kept.tolist() == [100] * 4
    assert stake.gains.tolist() == [15, -5, 15, -5]


def test_without_a_value_nothing_is_at_stake() -> None:
    assert read(SHOP) is None
    assert judge_profit(None, SCORES, SCORES, FEW) == []


def test_figures_are_sums_by_hand_and_each_snapshot_is_a_cycle() -> None:
    one = SHOP.model_copy(update={"value": VALUE.model_copy(update={"capacity": 1})})
    stake = read(one)
    assert stake is not None
    assert stake.choose(SCORES).tolist() == [True, False, True, False]
    money = measure_money(stake, SCORES, 0.75, FEW)
    assert money.figures == {"profit": 7.5, "profit_at_threshold": 2.5, "profit_of_all": 5, "offered_share": 0.5}
    assert (money.offers, money.capacity) == (2, 1)
    assert money.interval.low <= 7.5 <= money.interval.high


def test_the_gate_compares_offers_on_the_same_rows() -> None:
    stake = read()
    assert stake is not None
    many = Stake(stake.value.model_copy(update={"capacity": None}), *(np.tile(part, 100) for part in stake[1:]))
    right, wrong = np.tile([0.9, 0.1, 0.9, 0.1], 100), np.tile([0.1, 0.9, 0.1, 0.9], 100)
    [lost], [won] = judge_profit(many, wrong, right, FEW), judge_profit(many, right, wrong, FEW)
    assert (lost.name, lost.passed, won.passed) == ("profit", False, True)
    assert "-2.5 a customer against the champion's 7.5" in lost.sentence()
    [alone] = judge_profit(many, right, None, FEW, "there is no champion yet")
    assert (alone.passed, alone.blocking) == (True, False)
