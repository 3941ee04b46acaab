"""Offers in the simulated shop: they keep a share of their customers, and change nothing else."""

from __future__ import annotations

import datetime as dt

import pandas as pd
import pytest

from closedloop.simulator.shop import Offers, SimulatorSpec, simulate

SPEC = SimulatorSpec(customers=3_000, seed=3, covariate_at=None, harmless_at=None, concept_at=None)
START, AT = dt.date(2023, 1, 1), dt.date(2023, 6, 1)
SPAN = {"start": START, "end": AT + dt.timedelta(days=30)}


def find_leavers(events: pd.DataFrame) -> pd.Series:
    """Of those who bought in the 60 days before the offers, who buys nothing in the 30 days after."""
    bought, at = events[events["event_type"] == "purchase"], pd.Timestamp(AT, tz="UTC")
    before = bought["time"].between(at - pd.Timedelta(days=60), at, inclusive="left")
    later = set(bought.loc[bought["time"] >= at, "customer_id"])
    return pd.Series({name: name not in later for name in sorted(set(bought.loc[before, "customer_id"]))})


def test_offers_keep_a_share_of_their_customers_and_change_nothing_else():
    alone = simulate(SPEC, **SPAN).events
    leavers = find_leavers(alone)
    offered = frozenset(leavers.index[::2])
    with_offers = simulate(SPEC, **SPAN, offers=[Offers(AT, offered, 0.5)]).events
    at = pd.Timestamp(AT, tz="UTC")
    earlier = [some[some["time"] < at].reset_index(drop=True) for some in (alone, with_offers)]
    pd.testing.assert_frame_equal(*earlier)
    after, mine = find_leavers(with_offers), leavers.index.isin(offered)
    assert (after[~mine] == leavers[~mine]).all()
    assert not (after & ~leavers).any()
    kept = 1 - after[mine].sum() / leavers[mine].sum()
    assert kept == pytest.approx(0.5, abs=0.12)


def test_who_accepts_does_not_depend_on_who_else_got_an_offer():
    leavers = find_leavers(simulate(SPEC, **SPAN).events)
    some = frozenset(leavers.index[:200])
    few, all_of_them = (
        find_leavers(simulate(SPEC, **SPAN, offers=[Offers(AT, who, 0.5)]).events)
        for who in (some, frozenset(leavers.index))
    )
    assert (few[sorted(some)] == all_of_them[sorted(some)]).all()
