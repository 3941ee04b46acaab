"""The `shop` data simulator: two years of a shop's customers and events, with dated regime changes."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from closedloop.errors import ConfigError
from closedloop.simulator.regimes import (
    BROWSING,
    CAMPAIGN_DAYS,
    CAMPAIGN_SHARE,
    PRICE_FACTOR,
    STOCKING_UP,
    describe_changes,
)
from closedloop.simulator.shoppers import (
    CAMPAIGN,
    DAY_SECONDS,
    EVENT_TYPES,
    GENDERS,
    SEGMENTS,
    USUAL,
    Day,
    DayEvents,
    Floats,
    Ints,
    Shoppers,
    SignupProfile,
)

RUN_DAYS = 731  # the length of a run by whose end `SimulatorSpec.customers` have signed up
WARM_UP_DAYS = 180  # simulated before `start` but not recorded: the shop is older than `start`
FOUNDERS_SHARE = 0.25  # customers that exist when the warm-up begins
FOUNDERS_AGE_DAYS = 540
MAX_CUSTOMERS = 1_000_000  # ids have six digits, so that they sort as their numbers do


@dataclass(frozen=True)
class SimulatorSpec:
    """The parameters of a simulation.

    Parameters
    ----------
    customers : int
        Customers that have signed up when a run of 731 days ends, the campaign's included: 16 % of
        them come with the campaign (and are missing if `covariate_at` is None or not yet reached), the
        others sign up before `start` (about a third of them) and then at a growing rate. From 1 up;
        a longer run signs up more, a million at most.
    seed : int
        Seed of all random streams, not negative.
    covariate_at, harmless_at, concept_at : datetime.date or None
        First day of each regime change; None: it does not happen.
    """

    customers: int = 24_000
    seed: int = 7
    covariate_at: dt.date | None = dt.date(2024, 2, 1)
    harmless_at: dt.date | None = dt.date(2024, 4, 1)
    concept_at: dt.date | None = dt.date(2024, 6, 1)


@dataclass(frozen=True)
class Offers:
    """Offers to customers on one day: a share of them keeps buying as usual for some days, whatever was to come.

    Parameters
    ----------
    at : datetime.date
        The day, before whose events the offers are made.
    customers : frozenset of str
        Ids; one who has not signed up by then gets none.
    save_rate : float
        Share of them who accept, from 0 to 1.
    keeps_days : int
        For how long they do not leave.
    """

    at: dt.date
    customers: frozenset[str]
    save_rate: float
    keeps_days: int = 30


@dataclass(frozen=True)
class Simulation:
    """A shop's records.

    Parameters
    ----------
    customers : pandas.DataFrame
        One row a customer signed up before the end, sorted by `customer_id` (str): `age` (int64, years),
        `gender` (str), `income` (float64, a year), `segment` (str), `signup_at` (datetime64[us, UTC]).
    events : pandas.DataFrame
        `customer_id` (str), `event_type` (str: login, purchase, ticket), `time` (datetime64[us, UTC]),
        `amount` (float64, NaN except for purchases); sorted by time, customer and type.
    truth : dict
        JSON-able: the regime changes in force before the end. For scoring detectors; no workflow reads it.
    """

    customers: pd.DataFrame
    events: pd.DataFrame
    truth: dict[str, Any]


def simulate(spec: SimulatorSpec, *, start: dt.date, end: dt.date, offers: Sequence[Offers] = ()) -> Simulation:
    """Simulate the shop from `start` (included) to `end` (excluded), both UTC midnights.

    Every day has its own random stream, so that a longer run only appends: the rows before `end` are the
    same whatever `end` is, and a regime change leaves everything before its date as it was.

    Parameters
    ----------
    spec : SimulatorSpec
        The parameters of the simulation.
    start, end : datetime.date
        Span of the events. Customers may have signed up before `start`.
    offers : sequence of Offers
        What was done with customers. It changes nothing before its day; what those who got none do on a day stays as
        it was, but for the time of the day and the amount.

    Returns
    -------
    Simulation
        Customers, events and the truth about the regime changes.

    Raises
    ------
    ConfigError
        If `end` is not after `start`, or there are more customers than ids.

    Examples
    --------
    >>> spec = SimulatorSpec(customers=100)
    >>> shop = simulate(spec, start=dt.date(2023, 1, 1), end=dt.date(2023, 2, 1))
    >>> shop.events["event_type"].unique().tolist()
    ['login', 'purchase', 'ticket']
    """
    if end <= start:
        raise ConfigError(f"simulator.end is {end}; allowed is a day after the start, {start}")
    cohorts = _open_cohorts(spec, start, end)
    number = 0
    chunks: list[_Chunk] = []
    for offset in range(-WARM_UP_DAYS, (end - start).days):
        date = start + dt.timedelta(days=offset)
        day = _describe_day(spec, date, offset)
        for position, cohort in enumerate(cohorts):
            # The date keys the stream, not the length of the run. The campaign's customers are a cohort of their own,
            # so that the draws of all others are the same with and without it.
            rng = np.random.default_rng((spec.seed, date.toordinal(), position))
            number = cohort.admit(rng, offset, number)
            if cohort.shoppers.count:
                _make_offers(spec, offers, cohort.shoppers, date, offset, position)
                recorded = cohort.shoppers.live_day(rng, day)
                if offset >= 0:
                    chunks.append(_Chunk(offset, cohort.shoppers.number[recorded.who], recorded))
    return Simulation(
        customers=_tabulate_customers([cohort.shoppers for cohort in cohorts], start),
        events=_tabulate_events(chunks, start),
        truth={"regime_changes": describe_changes(spec.covariate_at, spec.harmless_at, spec.concept_at, end=end)},
    )


def _make_offers(
    spec: SimulatorSpec, offers: Sequence[Offers], shoppers: Shoppers, date: dt.date, offset: int, position: int
) -> None:
    for place, one in enumerate(offers):
        if one.at == date:
            rng = np.random.default_rng((spec.seed, date.toordinal(), position, place + 1))  # of its own: others' stay
            numbers = np.array([int(name[1:]) for name in sorted(one.customers)], np.int64)
            shoppers.accept_offers(rng, numbers, one.save_rate, offset + one.keeps_days)


@dataclass(frozen=True)
class _Cohort:
    shoppers: Shoppers
    profile: SignupProfile
    signups: Ints  # a day, from the first warm-up day on; founders count to the first

    def admit(self, rng: np.random.Generator, offset: int, number: int) -> int:
        n = int(self.signups[offset + WARM_UP_DAYS])
        if n == 0:
            return number
        days = np.full(n, offset)
        if offset == -WARM_UP_DAYS:
            days -= rng.integers(1, FOUNDERS_AGE_DAYS, n)
        days.sort()
        seconds = rng.integers(0, DAY_SECONDS, n)
        self.shoppers.sign_up(rng, self.profile, np.arange(number, number + n), days, seconds)
        return number + n


@dataclass(frozen=True)
class _Chunk:
    offset: int
    number: Ints
    recorded: DayEvents


def _open_cohorts(spec: SimulatorSpec, start: dt.date, end: dt.date) -> list[_Cohort]:
    days = WARM_UP_DAYS + (end - start).days
    plans = (
        (USUAL, _plan_usual_signups(spec, days)),
        (CAMPAIGN, _plan_campaign_signups(spec, start, days)),
    )
    total = sum(int(signups.sum()) for _, signups in plans)
    if total > MAX_CUSTOMERS:
        raise ConfigError(
            f"simulator.customers is {spec.customers}, which makes {total} by {end}; allowed is {MAX_CUSTOMERS} in all"
        )
    return [_Cohort(Shoppers(int(signups.sum())), profile, signups) for profile, signups in plans]


def _plan_usual_signups(spec: SimulatorSpec, days: int) -> Ints:
    usual = spec.customers - round(CAMPAIGN_SHARE * spec.customers)
    founders = round(FOUNDERS_SHARE * usual)
    run_days = WARM_UP_DAYS + RUN_DAYS
    # The curve is laid out for a whole run even if a shorter one is asked for: it must not depend on `end`.
    pace = 1.0 + np.arange(max(days, run_days)) / RUN_DAYS
    signups = _to_daily((usual - founders) * np.cumsum(pace)[:days] / pace[:run_days].sum())
    signups[0] += founders
    return signups


def _plan_campaign_signups(spec: SimulatorSpec, start: dt.date, days: int) -> Ints:
    if spec.covariate_at is None:
        return np.zeros(days, np.int64)
    first = WARM_UP_DAYS + (spec.covariate_at - start).days
    progress = np.clip((np.arange(days) - first + 1) / CAMPAIGN_DAYS, 0.0, 1.0)
    return _to_daily(round(CAMPAIGN_SHARE * spec.customers) * progress)


def _to_daily(due: Floats) -> Ints:
    # A whole number computed in floating point may be too small by a rounding error.
    return np.diff(np.floor(due + 1e-6), prepend=0.0).astype(np.int64)


def _describe_day(spec: SimulatorSpec, date: dt.date, offset: int) -> Day:
    weekday = date.weekday()
    season = math.cos(2 * math.pi * (date.timetuple().tm_yday - 345) / 365.25)  # highest in mid-December
    buying = (0.92, 0.88, 0.90, 0.95, 1.10, 1.20, 1.05)[weekday] * (1 + 0.10 * season)
    visiting = (1.02, 1.0, 1.0, 1.0, 0.95, 0.98, 1.05)[weekday] * (1 + 0.05 * season)
    inflated = spec.harmless_at is not None and date >= spec.harmless_at
    changed = spec.concept_at is not None and date >= spec.concept_at
    return Day(
        number=offset,
        buying=buying,
        visiting=visiting,
        price=PRICE_FACTOR if inflated else 1.0,
        habits=STOCKING_UP if changed else BROWSING,
    )


def _name_customers(count: int) -> NDArray[np.object_]:
    return np.array([f"C{number:06d}" for number in range(count)], dtype=object)


def _to_times(days: Ints, seconds: Ints, start: dt.date) -> pd.DatetimeIndex:
    stamps = np.datetime64(start, "s") + (days * DAY_SECONDS + seconds).astype("timedelta64[s]")
    return pd.DatetimeIndex(stamps.astype("datetime64[us]")).tz_localize("UTC")


def _tabulate_customers(cohorts: list[Shoppers], start: dt.date) -> pd.DataFrame:
    def gather(field: str) -> NDArray[Any]:
        return np.concatenate([getattr(shoppers, field) for shoppers in cohorts])

    order = np.argsort(gather("number"))
    return pd.DataFrame(
        {
            "customer_id": _name_customers(len(order)),
            "age": gather("age")[order],
            "gender": np.array(GENDERS, dtype=object)[gather("gender")[order]],
            "income": gather("income")[order],
            "segment": np.array(SEGMENTS, dtype=object)[gather("segment")[order]],
            "signup_at": _to_times(gather("signup_day")[order], gather("signup_second")[order], start),
        }
    )


def _tabulate_events(chunks: list[_Chunk], start: dt.date) -> pd.DataFrame:
    def gather(arrays: list[NDArray[Any]], dtype: type) -> NDArray[Any]:
        return np.concatenate([np.empty(0, dtype), *arrays])

    number = gather([chunk.number for chunk in chunks], np.int64)
    kind = gather([chunk.recorded.kind for chunk in chunks], np.int64)
    second = gather([chunk.recorded.second for chunk in chunks], np.int64)
    amount = gather([chunk.recorded.amount for chunk in chunks], np.float64)
    sizes = [len(chunk.number) for chunk in chunks]
    day = np.repeat(np.array([chunk.offset for chunk in chunks], np.int64), sizes)
    order = np.lexsort((amount, kind, number, day * DAY_SECONDS + second))
    return pd.DataFrame(
        {
            "customer_id": _name_customers(int(number.max(initial=-1)) + 1)[number[order]],
            "event_type": np.array(EVENT_TYPES, dtype=object)[kind[order]],
            "time": _to_times(day[order], second[order], start),
            "amount": amount[order],
        }
    )
