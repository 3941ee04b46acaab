from __future__ import annotations

import numpy as np
import pytest

from closedloop.simulator.regimes import BROWSING, STOCKING_UP, Habits
from closedloop.simulator.shoppers import ACTIVE, CAMPAIGN, LAPSED, SEGMENTS, USUAL, Day, Shoppers, SignupProfile

LOGIN, PURCHASE = 0, 1


def sign_up(count: int, profile: SignupProfile = USUAL, second: int = 0) -> Shoppers:
    shoppers = Shoppers(count)
    numbers, days = np.arange(count), np.zeros(count, np.int64)
    shoppers.sign_up(np.random.default_rng(0), profile, numbers, days, np.full(count, second))
    return shoppers


def describe_day(number: int, habits: Habits = BROWSING) -> Day:
    return Day(number=number, buying=1.0, visiting=1.0, price=1.0, habits=habits)


@pytest.mark.parametrize("profile", [USUAL, CAMPAIGN])
def test_attributes_follow_the_profile(profile: SignupProfile) -> None:
    shoppers = sign_up(20_000, profile)
    shares = np.bincount(shoppers.segment, minlength=len(SEGMENTS)) / 20_000
    # Four standard errors of a share are at most 4 * sqrt(0.25 / 20,000) = 0.0142.
    np.testing.assert_allclose(shares, profile.segment_shares, atol=0.0142)
    assert abs(np.median(shoppers.age) - profile.age_mean) <= 1
    incomes = [np.median(shoppers.income[shoppers.segment == segment]) for segment in (0, 1)]
    np.testing.assert_allclose(incomes, profile.income_factor * np.array([26_000, 38_000]), rtol=0.03)


@pytest.mark.parametrize("second", [0, 86_399])
def test_events_of_the_first_day_come_after_the_sign_up(second: int) -> None:
    recorded = sign_up(5_000, second=second).live_day(np.random.default_rng(1), describe_day(0))
    assert len(recorded.second) > 1_000
    assert recorded.second.min() >= second
    assert recorded.second.max() <= 86_399


def test_logins_of_a_day_are_poisson_cut_off_at_three() -> None:
    shoppers = sign_up(40_000)
    shoppers.login_rate[:] = 1.0
    recorded = shoppers.live_day(np.random.default_rng(1), describe_day(400))
    alive = shoppers.phase == ACTIVE
    logins = np.bincount(recorded.who[recorded.kind == LOGIN], minlength=40_000)[alive]
    # Poisson(1): e^-1, e^-1, e^-1 / 2, and the rest; four standard errors are below 0.01.
    np.testing.assert_allclose(np.bincount(logins) / alive.sum(), [0.3679, 0.3679, 0.1839, 0.0803], atol=0.01)


def test_lapsed_customers_hardly_buy() -> None:
    shoppers = sign_up(40_000)
    shoppers.purchase_rate[:] = 0.2
    shoppers.phase[:20_000] = LAPSED
    recorded = shoppers.live_day(np.random.default_rng(1), describe_day(400))
    buyers = recorded.who[recorded.kind == PURCHASE]
    # 1 - e^-0.2 = 0.181 of the active ones; 0.004 of the lapsed, and the few that came back today.
    assert abs((buyers >= 20_000).sum() / 20_000 - 0.181) < 0.012
    assert (buyers < 20_000).sum() / 20_000 < 0.008


def test_stocking_up_waits_for_most_of_the_cycle() -> None:
    shoppers = sign_up(20_000)
    shoppers.cycle_days[:] = 20.0
    shoppers.last_purchase_day[:10_000] = 390
    shoppers.last_purchase_day[10_000:] = 380
    recorded = shoppers.live_day(np.random.default_rng(1), describe_day(400, STOCKING_UP))
    buyers = recorded.who[recorded.kind == PURCHASE]
    assert (buyers < 10_000).mean() < 0.06
    assert abs((buyers >= 10_000).sum() / 10_000 - 0.295) < 0.02  # 1 - e^-0.35
    assert (shoppers.last_purchase_day[buyers] == 400).all()
