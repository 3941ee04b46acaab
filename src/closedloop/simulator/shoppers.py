"""Shoppers of the `shop` simulator: the customers who sign up, and their events on each day."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from closedloop.simulator.regimes import Habits

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SEGMENTS = ("budget", "standard", "premium")
GENDERS = ("female", "male")
EVENT_TYPES = ("login", "purchase", "ticket")  # in alphabetical order: codes sort as the names do
ACTIVE, WINDING_DOWN, LAPSED = 0, 1, 2
DAY_SECONDS = 86_400
PURCHASES_PER_MONTH = 5.0  # typical, of an active customer in 30 days


@dataclass(frozen=True)
class SignupProfile:
    """Distribution of the attributes of the customers that sign up.

    Parameters
    ----------
    age_mean, age_sd : float
        Years; ages are cut off at 18 and 85.
    segment_shares : tuple of float
        Shares of budget, standard and premium; they add up to 1.
    income_factor : float
        Income relative to the usual income of the segment.
    """

    age_mean: float
    age_sd: float
    segment_shares: tuple[float, float, float]
    income_factor: float


USUAL = SignupProfile(age_mean=43.0, age_sd=13.0, segment_shares=(0.32, 0.46, 0.22), income_factor=1.0)
CAMPAIGN = SignupProfile(age_mean=25.0, age_sd=5.0, segment_shares=(0.72, 0.25, 0.03), income_factor=0.75)


@dataclass(frozen=True)
class Day:
    """The conditions of one day, the same for all shoppers.

    Parameters
    ----------
    number : int
        Days since the first simulated day.
    buying, visiting : float
        Seasonal factors of the purchase and login rates.
    price : float
        Price level, 1 before any inflation.
    habits : Habits
        The concept in force.
    """

    number: int
    buying: float
    visiting: float
    price: float
    habits: Habits


@dataclass(frozen=True)
class DayEvents:
    """Events of one day: positions of the shoppers, type codes, seconds of the day, amounts (NaN if none)."""

    who: Ints
    kind: Ints
    second: Ints
    amount: Floats


class Shoppers:
    """State of a cohort of customers, one array slot a customer, advanced day by day.

    Parameters
    ----------
    capacity : int
        Customers that will have signed up when the simulation ends; no draw depends on it.
    """

    def __init__(self, capacity: int) -> None:
        self.count = 0
        self.number = np.zeros(capacity, np.int64)
        self.age = np.zeros(capacity, np.int64)
        self.gender = np.zeros(capacity, np.int64)
        self.segment = np.zeros(capacity, np.int64)
        self.income = np.zeros(capacity)
        self.signup_day = np.zeros(capacity, np.int64)
        self.signup_second = np.zeros(capacity, np.int64)
        self.income_score = np.zeros(capacity)
        self.purchase_rate = np.zeros(capacity)
        self.login_rate = np.zeros(capacity)
        self.cycle_days = np.zeros(capacity)
        self.basket = np.zeros(capacity)
        self.satisfaction = np.zeros(capacity)
        self.trouble = np.zeros(capacity)
        self.phase = np.zeros(capacity, np.int64)
        self.last_purchase_day = np.zeros(capacity, np.int64)
        self.kept_until_day = np.full(capacity, np.iinfo(np.int64).min)

    def sign_up(
        self, rng: np.random.Generator, profile: SignupProfile, numbers: Ints, days: Ints, seconds: Ints
    ) -> None:
        """Add customers with the given numbers, sign-up days and seconds of the day (each of shape (n,))."""
        n = len(numbers)
        new = slice(self.count, self.count + n)
        self.number[new], self.signup_day[new], self.signup_second[new] = numbers, days, seconds
        z = rng.standard_normal((8, n))
        u = rng.random((2, n))
        self.age[new] = np.clip(np.round(profile.age_mean + profile.age_sd * z[0]), 18, 85)
        self.gender[new] = u[0] < 0.48
        segment = np.searchsorted(np.cumsum(profile.segment_shares)[:2], u[1], side="right")
        self.segment[new] = segment
        usual = np.array([26_000.0, 38_000.0, 60_000.0])[segment]
        self.income[new] = np.round(profile.income_factor * usual * np.exp(0.28 * z[1]), 0)
        self.income_score[new] = np.log(self.income[new] / 38_000.0)
        engagement = 0.6 * z[2]
        self.purchase_rate[new] = PURCHASES_PER_MONTH / 30.0 * np.exp(0.5 * engagement + 0.35 * z[3])
        self.login_rate[new] = 12.0 / 30.0 * np.exp(engagement + 0.2 * z[4])
        self.cycle_days[new] = np.clip(15.0 * np.exp(0.60 * z[5]), 5.0, 32.0)
        self.basket[new] = 35.0 * np.exp(0.25 * self.income_score[new] + 0.35 * z[6])
        self.satisfaction[new] = z[7]
        self.last_purchase_day[new] = days
        self.count += n

    def accept_offers(self, rng: np.random.Generator, numbers: Ints, save_rate: float, until_day: int) -> None:
        """Let a share of these customers return to their usual habits, and leave on no day before ``until_day``.

        A draw for every customer, whoever gets an offer: who accepts does not depend on the others.
        """
        n = self.count
        accepts = (rng.random(n) < save_rate) & np.isin(self.number[:n], numbers)
        self.phase[:n][accepts] = ACTIVE
        self.kept_until_day[:n][accepts] = until_day

    def live_day(self, rng: np.random.Generator, day: Day) -> DayEvents:
        """Advance every customer by one day and return what the shop recorded."""
        n = self.count
        # Draw all decisions for all customers, whatever their state, so that two simulations that differ in one regime
        # change use the same random numbers.
        u = rng.random((4, n))
        shock = rng.standard_normal(n)
        self._change_phase(u[0], shock, day)
        buys = u[1] < -np.expm1(-self._rate_purchases(day))
        logins = self._count_logins(u[2], day)
        ticket_rate = np.array([0.008, 0.016, 0.001])[self.phase[:n]] * np.exp(-0.5 * self.satisfaction[:n])
        tickets = u[3] < ticket_rate
        self.trouble[:n] = self.trouble[:n] * 0.95 + tickets
        self.satisfaction[:n] -= 0.25 * tickets
        self.last_purchase_day[:n][buys] = day.number
        return self._record(rng, day, np.flatnonzero(buys), logins, np.flatnonzero(tickets))

    def _change_phase(self, u: Floats, shock: Floats, day: Day) -> None:
        n = self.count
        phase = self.phase[:n]
        self.satisfaction[:n] = 0.985 * self.satisfaction[:n] + 0.16 * shock
        leave = (u < self._rate_leaving(day)) & (self.kept_until_day[:n] <= day.number)
        active, winding, lapsed = phase == ACTIVE, phase == WINDING_DOWN, phase == LAPSED
        phase[active & leave] = WINDING_DOWN
        phase[winding & (u < 1 / 22)] = LAPSED
        phase[winding & (u > 1 - 1 / 180)] = ACTIVE
        back = lapsed & (u < 1 / 280)
        phase[back] = ACTIVE
        self.satisfaction[:n][back] += 1.0

    def _rate_leaving(self, day: Day) -> Floats:
        n, habits = self.count, day.habits
        young, older = self.age[:n] < 30, self.age[:n] >= 50
        budget, premium = self.segment[:n] == 0, self.segment[:n] == 2
        tenure_days = day.number - self.signup_day[:n]
        score = (
            habits.young * young
            + habits.budget * budget
            + habits.premium * premium
            + habits.young_budget * (young & budget)
            + habits.older_premium * (older & premium)
            - 0.30 * self.income_score[:n]
            - 0.80 * self.satisfaction[:n]
            + 0.50 * np.minimum(self.trouble[:n], 3.0)
            + 0.55 * np.exp(-tenure_days / 45.0)
        )
        rate: Floats = 0.0025 * np.exp(score)
        return rate

    def _rate_purchases(self, day: Day) -> Floats:
        n = self.count
        factor = np.array(day.habits.purchase_factors)[self.phase[:n]] * day.buying
        if not day.habits.stock_up:
            steady: Floats = self.purchase_rate[:n] * factor
            return steady
        progress = (day.number - self.last_purchase_day[:n]) / self.cycle_days[:n]
        cyclic: Floats = factor * np.where(progress < 0.75, 0.01, 0.35)
        return cyclic

    def _count_logins(self, u: Floats, day: Day) -> Ints:
        n = self.count
        rate = self.login_rate[:n] * np.array(day.habits.login_factors)[self.phase[:n]] * day.visiting
        none = np.exp(-rate)
        one = none * (1 + rate)
        logins: Ints = (u > none).astype(np.int64) + (u > one) + (u > one + none * rate**2 / 2)
        return logins

    def _record(self, rng: np.random.Generator, day: Day, buyers: Ints, logins: Ints, askers: Ints) -> DayEvents:
        visitors = np.repeat(np.arange(self.count), logins)
        who = np.concatenate([visitors, buyers, askers])
        kind = np.repeat(np.arange(3), [len(visitors), len(buyers), len(askers)])
        amount = np.full(len(who), np.nan)
        scale = self.basket[buyers] * day.habits.basket_factor * day.price
        noise = rng.standard_normal(len(buyers))
        amount[kind == 1] = np.maximum(np.round(scale * np.exp(0.45 * noise), 2), 0.01)
        opens = np.where(self.signup_day[who] == day.number, self.signup_second[who], 0)
        second = opens + (rng.beta(2.5, 1.8, len(who)) * (DAY_SECONDS - opens)).astype(np.int64)
        return DayEvents(who, kind, np.minimum(second, DAY_SECONDS - 1), amount)
