"""What is at stake in a release: fixed by the reference rows, and paired by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from closedloop.core.evaluation.value import CustomerValue, KeptCustomer
from closedloop.core.release.entries import OfferTerms
from closedloop.core.release.sequential import LOSS_GAP_MAX
from closedloop.release.money import find_unit, fix_stake, pair_profits

VALUE = CustomerValue(kept=KeptCustomer(column="income"), offer_cost=5, save_rate=0.2, capacity=1)


def test_the_limit_is_that_of_nearly_all_reference_rows() -> None:
    reference = pd.DataFrame({"score": 0.1, "income": [*[100.0] * 200, 1e6]})
    stake = fix_stake(VALUE, reference, [3])
    assert stake is not None
    assert (stake.places, stake.limit) == ((3,), pytest.approx(15))
    assert find_unit(stake) == pytest.approx(15 / LOSS_GAP_MAX)
    number = VALUE.model_copy(update={"kept": KeptCustomer(number=400)})
    assert fix_stake(number, reference[["score"]], []) == OfferTerms(number.model_dump(), (), 75.0)


def test_without_anything_to_win_or_lose_nothing_is_at_stake() -> None:
    free = VALUE.model_copy(update={"offer_cost": 0.0})
    assert fix_stake(free, pd.DataFrame({"score": [0.1], "income": [0.0]}), [0]) is None
    assert find_unit(None) == 0


def test_profits_are_paired_without_a_capacity() -> None:
    stake = OfferTerms(VALUE.model_dump(), (0,), 15.0)
    paired = pd.DataFrame(
        {
            "score": [0.9, 0.9, 0.1, 0.9],
            "score_of_version": [0.9, 0.1, 0.9, 0.1],
            "outcome": [1, 1, 0, 0],
            "kept": [100.0, 100.0, 100.0, 0.0],
        }
    )
    found = pair_profits(stake, paired)
    # both offer to the first; the version offers to no second, who left; it offers to the third, who stayed; the last
    # is worth nothing, and gets no offer
    assert (found.customers, found.total) == (4, pytest.approx((15 + 5) * LOSS_GAP_MAX / 15))
    assert np.isfinite(found.better).all()
