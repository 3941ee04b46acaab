"""The customers of a campaign and its hold-out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.core.actions.arms import HELD_OUT, TREATED, choose_customers
from closedloop.errors import DataError


def make_people(count: int = 1_000, **columns: Any) -> pd.DataFrame:
    chances = np.random.default_rng(5).random(count)
    people = pd.DataFrame({"customer_id": [f"C{number}" for number in range(count)], "probability": chances})
    return people.assign(**{"expected_value": np.nan, **columns})


def test_the_best_are_chosen_and_a_fixed_number_of_them_is_left_alone():
    people = make_people()
    chosen = choose_customers(people, capacity=90, holdout=0.1, salt="s")
    assert chosen["arm"].value_counts().to_dict() == {TREATED: 90, HELD_OUT: 10}
    best = people.nlargest(100, "probability")["customer_id"]
    assert chosen["customer_id"].tolist() == best.tolist()
    assert chosen["place"].tolist() == list(range(1, 101))


def test_the_hold_out_is_the_same_whatever_the_order_of_the_rows_and_another_with_another_salt():
    people = make_people()

    def draw(frame: pd.DataFrame, salt: str) -> set[str]:
        chosen = choose_customers(frame, capacity=90, holdout=0.1, salt=salt)
        return set(chosen.loc[chosen["arm"] == HELD_OUT, "customer_id"])

    assert draw(people, "s") == draw(people.sample(frac=1, random_state=1), "s")
    assert draw(people, "s") != draw(people, "t")


def test_the_hold_out_is_drawn_from_the_whole_list():
    """By the best or the worst of the chosen the arms would differ before anything was done."""
    drawn = [choose_customers(make_people(), capacity=450, holdout=0.1, salt=str(salt)) for salt in range(40)]
    places = pd.concat([one.loc[one["arm"] == HELD_OUT, "place"] for one in drawn])
    assert places.mean() == pytest.approx(250.5, abs=4 * 144.3 / len(places) ** 0.5)


def test_by_expected_value_only_who_is_worth_an_offer_is_chosen():
    worth = np.where(np.arange(1_000) < 30, np.arange(1_000) + 1.0, -1.0)
    chosen = choose_customers(make_people(expected_value=worth), capacity=500, holdout=0.2, salt="s")
    assert chosen["customer_id"].tolist() == [f"C{number}" for number in range(29, -1, -1)]
    assert chosen["arm"].value_counts().to_dict() == {TREATED: 24, HELD_OUT: 6}
    with pytest.raises(DataError, match="none of 1,000 customers has an expected value above 0"):
        choose_customers(make_people(expected_value=-1.0), capacity=5, holdout=0.2, salt="s")
    with pytest.raises(DataError, match="there is no customer to choose: all who are active are in campaigns"):
        choose_customers(make_people().head(0), capacity=5, holdout=0.2, salt="s")


@pytest.mark.parametrize(("people", "capacity", "holdout"), [(7, 7, 0.1), (11, 10, 0.1), (3, 2, 0.5), (10, 10, 0.0)])
def test_never_more_than_the_capacity_is_treated(people, capacity, holdout):
    chosen = choose_customers(make_people(people), capacity=capacity, holdout=holdout, salt="s")
    assert (chosen["arm"] == TREATED).sum() <= capacity
