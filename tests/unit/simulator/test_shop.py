from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from closedloop.errors import ConfigError
from closedloop.simulator.shop import Simulation, SimulatorSpec, simulate

START = dt.date(2023, 1, 1)
END = dt.date(2023, 7, 20)
SMALL = SimulatorSpec(
    customers=1_500,
    covariate_at=dt.date(2023, 3, 1),
    harmless_at=dt.date(2023, 4, 15),
    concept_at=dt.date(2023, 6, 1),
)


@pytest.fixture(scope="module")
def shop() -> Simulation:
    return simulate(SMALL, start=START, end=END)


@pytest.fixture(scope="module")
def two_years() -> Simulation:
    return simulate(SimulatorSpec(customers=4_000), start=START, end=dt.date(2025, 1, 1))


def midnight(date: dt.date) -> pd.Timestamp:
    return pd.Timestamp(date, tz="UTC")


def cut(simulation: Simulation, date: dt.date) -> tuple[pd.DataFrame, pd.DataFrame]:
    customers, events = simulation.customers, simulation.events
    return (
        customers[customers["signup_at"] < midnight(date)].reset_index(drop=True),
        events[events["time"] < midnight(date)].reset_index(drop=True),
    )


def assert_same(one: tuple[pd.DataFrame, pd.DataFrame], other: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    pd.testing.assert_frame_equal(one[0], other[0], check_exact=True)
    pd.testing.assert_frame_equal(one[1], other[1], check_exact=True)


def digest(simulation: Simulation) -> str:
    frames = (simulation.customers, simulation.events)
    return hashlib.sha256("".join(frame.to_csv() for frame in frames).encode()).hexdigest()


def label_churn(events: pd.DataFrame, snapshot: pd.Timestamp) -> pd.Series:
    """Label, straight from the definition, the customers that bought in the 60 days before."""
    purchases = events[events["event_type"] == "purchase"]
    ago_days = (snapshot - purchases["time"]).dt.total_seconds() / 86_400
    population = purchases.loc[(ago_days > 0) & (ago_days <= 60), "customer_id"].unique()
    buyers = purchases.loc[(ago_days <= 0) & (ago_days > -30), "customer_id"].unique()
    return pd.Series(~np.isin(population, buyers), index=population)


def rank_auc(scores: pd.Series, positive: pd.Series) -> float:
    """Return the probability that a positive outranks a negative (Mann-Whitney), ties counting half."""
    n = int(positive.sum())
    excess = scores.rank()[positive].sum() - n * (n + 1) / 2
    return float(excess / (n * (len(positive) - n)))


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(shop: Simulation) -> None:
    assert digest(simulate(SMALL, start=START, end=END)) == digest(shop)
    assert digest(simulate(dataclasses.replace(SMALL, seed=8), start=START, end=END)) != digest(shop)


@settings(max_examples=8, deadline=None)
@given(days=st.integers(min_value=1, max_value=199))
def test_a_longer_run_only_appends(days: int) -> None:
    spec = dataclasses.replace(SMALL, customers=300)
    date = START + dt.timedelta(days=days)
    shorter = simulate(spec, start=START, end=date)
    longer = simulate(spec, start=START, end=END)
    assert_same((shorter.customers, shorter.events), cut(longer, date))


def test_columns_and_types(shop: Simulation) -> None:
    assert {column: str(dtype) for column, dtype in shop.customers.dtypes.items()} == {
        "customer_id": "object",
        "age": "int64",
        "gender": "object",
        "income": "float64",
        "segment": "object",
        "signup_at": "datetime64[us, UTC]",
    }
    assert {column: str(dtype) for column, dtype in shop.events.dtypes.items()} == {
        "customer_id": "object",
        "event_type": "object",
        "time": "datetime64[us, UTC]",
        "amount": "float64",
    }
    assert set(shop.customers["gender"]) == {"female", "male"}
    assert set(shop.customers["segment"]) == {"budget", "standard", "premium"}
    assert set(shop.events["event_type"]) == {"purchase", "login", "ticket"}
    assert shop.customers["customer_id"].iloc[[0, 123]].tolist() == ["C000000", "C000123"]
    assert shop.customers["age"].between(18, 85).all()
    assert (shop.customers["income"] > 0).all()


def test_only_purchases_carry_an_amount(shop: Simulation) -> None:
    purchases = shop.events["event_type"] == "purchase"
    assert (shop.events.loc[purchases, "amount"] > 0).all()
    assert shop.events.loc[~purchases, "amount"].isna().all()


def test_rows_are_sorted_and_customers_unique(shop: Simulation) -> None:
    ordered = shop.events.sort_values(["time", "customer_id", "event_type"], kind="stable")
    assert ordered.index.is_monotonic_increasing
    assert shop.customers["customer_id"].is_monotonic_increasing
    assert shop.customers["customer_id"].is_unique


def test_events_lie_inside_the_span_and_after_the_sign_up(shop: Simulation) -> None:
    signup_at = shop.events["customer_id"].map(shop.customers.set_index("customer_id")["signup_at"])
    assert signup_at.notna().all()
    assert (shop.events["time"] >= signup_at).all()
    assert shop.events["time"].min() >= midnight(START)
    assert shop.events["time"].max() < midnight(END)
    assert shop.customers["signup_at"].max() < midnight(END)


@pytest.mark.parametrize("field", ["covariate_at", "harmless_at", "concept_at"])
def test_a_regime_change_leaves_its_past_as_it_was(shop: Simulation, field: str) -> None:
    without = simulate(dataclasses.replace(SMALL, **{field: None}), start=START, end=END)
    date = getattr(SMALL, field)
    assert_same(cut(without, date), cut(shop, date))
    week = date + dt.timedelta(days=7)
    assert not cut(without, week)[1].equals(cut(shop, week)[1])


def test_the_harmless_change_multiplies_amounts_and_nothing_else(shop: Simulation) -> None:
    without = simulate(dataclasses.replace(SMALL, harmless_at=None), start=START, end=END)
    pd.testing.assert_frame_equal(shop.customers, without.customers)
    pd.testing.assert_frame_equal(
        shop.events.drop(columns="amount"), without.events.drop(columns="amount"), check_exact=True
    )
    assert SMALL.harmless_at is not None
    later = (shop.events["time"] >= midnight(SMALL.harmless_at)) & shop.events["amount"].notna()
    # Both amounts are rounded to a cent: 0.005 of the new one and 1.28 * 0.005 of the old one.
    assert (shop.events["amount"] - 1.28 * without.events["amount"])[later].abs().max() < 0.0115


def test_the_campaign_brings_young_poor_budget_customers(shop: Simulation) -> None:
    without = simulate(dataclasses.replace(SMALL, covariate_at=None), start=START, end=END).customers
    assert SMALL.covariate_at is not None
    assert len(shop.customers) - len(without) == 240  # 16 % of 1,500
    new, usual = (
        frame[frame["signup_at"].between(midnight(SMALL.covariate_at), midnight(dt.date(2023, 4, 14)))]
        for frame in (shop.customers, without)
    )
    assert new["age"].median() < usual["age"].median() - 8
    assert new["income"].median() < 0.8 * usual["income"].median()
    assert (new["segment"] == "budget").mean() > (usual["segment"] == "budget").mean() + 0.2


def test_the_concept_change_makes_baskets_rare_and_large_and_leaves_sign_ups_alone(shop: Simulation) -> None:
    without = simulate(dataclasses.replace(SMALL, concept_at=None), start=START, end=END)
    pd.testing.assert_frame_equal(shop.customers, without.customers)
    assert SMALL.concept_at is not None
    after, usual = (
        frame.loc[frame["time"] >= midnight(SMALL.concept_at), "amount"].dropna()
        for frame in (shop.events, without.events)
    )
    assert len(after) < 0.75 * len(usual)
    assert after.mean() > 2 * usual.mean()


def test_as_many_customers_as_asked_for_sign_up_in_a_full_run(two_years: Simulation) -> None:
    assert len(two_years.customers) == 4_000
    by_year = two_years.customers["signup_at"].dt.year.value_counts()
    assert by_year[2024] > by_year[2023]


def test_churn_stays_in_its_band_at_every_snapshot(two_years: Simulation) -> None:
    snapshots = pd.date_range("2023-04-12", "2024-12-02", freq="30D", tz="UTC")
    rates = {snapshot: label_churn(two_years.events, snapshot).mean() for snapshot in snapshots}
    assert len(rates) == 21
    assert {snapshot: rate for snapshot, rate in rates.items() if not 0.15 <= rate <= 0.30} == {}


@pytest.mark.parametrize(
    ("snapshot", "low", "high"),
    [("2024-01-07", 0.72, 0.90), ("2024-05-06", 0.72, 0.90), ("2024-09-03", 0.50, 0.70)],
)
def test_few_logins_announce_churn_until_the_concept_changes(
    two_years: Simulation, snapshot: str, low: float, high: float
) -> None:
    at, events = pd.Timestamp(snapshot, tz="UTC"), two_years.events
    churned = label_churn(events, at)
    recent = events["time"].between(at - pd.Timedelta(days=7), at, inclusive="left")
    logins = events.loc[recent & (events["event_type"] == "login"), "customer_id"].value_counts()
    assert low < rank_auc(-logins.reindex(churned.index, fill_value=0), churned) < high


def test_lapsed_customers_come_back(two_years: Simulation) -> None:
    purchases = two_years.events[two_years.events["event_type"] == "purchase"]
    pauses = purchases.groupby("customer_id")["time"].diff() / pd.Timedelta(days=1)
    assert (pauses > 90).sum() > 100


def test_truth_is_json_and_lists_what_has_happened_oldest_first(shop: Simulation) -> None:
    changes = json.loads(json.dumps(shop.truth))["regime_changes"]
    assert [(change["kind"], change["at"]) for change in changes] == [
        ("covariate", "2023-03-01"),
        ("harmless", "2023-04-15"),
        ("concept", "2023-06-01"),
    ]
    earlier = simulate(SMALL, start=START, end=dt.date(2023, 4, 15))
    assert [change["kind"] for change in earlier.truth["regime_changes"]] == ["covariate"]


@pytest.mark.parametrize("end", [START, START - dt.timedelta(days=1)])
def test_an_end_that_is_not_after_the_start_is_refused(end: dt.date) -> None:
    with pytest.raises(ConfigError, match=rf"simulator\.end is {end}"):
        simulate(SMALL, start=START, end=end)


def test_more_customers_than_ids_are_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"simulator\.customers is 900000, which makes \d{7} by 2026"):
        simulate(SimulatorSpec(customers=900_000), start=START, end=dt.date(2026, 1, 1))


def test_one_customer_for_one_day_is_enough() -> None:
    shop = simulate(SimulatorSpec(customers=1), start=START, end=dt.date(2023, 1, 2))
    assert shop.events["time"].dtype == "datetime64[us, UTC]"
    assert len(shop.customers) <= 1
