"""Regime changes of the `shop` simulator: dated changes of its customers, prices and behaviour."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

PRICE_FACTOR = 1.28
CAMPAIGN_DAYS = 45
CAMPAIGN_SHARE = 0.16
OFFERS_SAVE = 0.3  # of the customers who get an offer, whether or not they were to leave


@dataclass(frozen=True)
class Habits:
    """How customers behave while one concept holds; rates are relative to a customer's own normal.

    Parameters
    ----------
    stock_up : bool
        Buy on a cycle of weeks (few, large baskets) instead of at any time.
    basket_factor : float
        Size of a basket relative to the first concept's.
    purchase_factors, login_factors : tuple of float
        Rates of an active, a winding-down and a lapsed customer.
    young, budget, premium, young_budget, older_premium : float
        Log hazard ratios of starting to leave.
    """

    stock_up: bool
    basket_factor: float
    purchase_factors: tuple[float, float, float]
    login_factors: tuple[float, float, float]
    young: float
    budget: float
    premium: float
    young_budget: float
    older_premium: float


BROWSING = Habits(
    stock_up=False,
    basket_factor=1.0,
    purchase_factors=(1.0, 0.15, 0.02),
    login_factors=(1.0, 0.30, 0.06),
    young=0.30,
    budget=0.50,
    premium=-0.40,
    young_budget=0.35,
    older_premium=0.0,
)
STOCKING_UP = Habits(
    stock_up=True,
    basket_factor=2.6,
    purchase_factors=(1.0, 0.03, 0.01),
    login_factors=(0.38, 1.1, 0.05),
    young=-0.10,
    budget=-0.40,
    premium=0.70,
    young_budget=0.0,
    older_premium=0.50,
)


def describe_changes(
    covariate_at: dt.date | None, harmless_at: dt.date | None, concept_at: dt.date | None, *, end: dt.date
) -> list[dict[str, Any]]:
    """The changes in force before ``end``, oldest first, with the figures that define them; JSON-able.

    Kinds: ``covariate`` (other customers sign up), ``concept`` (the same behaviour means another risk of churn) and
    ``harmless`` (features change, churn does not). ``at`` is the first day on which a change is in force, UTC.

    Examples
    --------
    >>> found = describe_changes(None, dt.date(2024, 4, 15), dt.date(2024, 3, 1), end=dt.date(2025, 1, 1))
    >>> [change["kind"] for change in found]
    ['concept', 'harmless']
    """
    hazards = {"premium_log_hazard_before": BROWSING.premium, "premium_log_hazard_after": STOCKING_UP.premium}
    known: tuple[tuple[str, dt.date | None, str, dict[str, float]], ...] = (
        (
            "covariate",
            covariate_at,
            "a campaign signs up many young, low-income, budget customers",
            {"campaign_days": CAMPAIGN_DAYS, "extra_customers_share": CAMPAIGN_SHARE},
        ),
        ("harmless", harmless_at, "prices rise; what people do stays the same", {"price_factor": PRICE_FACTOR}),
        (
            "concept",
            concept_at,
            "customers stock up: few large baskets, few visits; premium leaves, budget stays",
            {"basket_factor": STOCKING_UP.basket_factor, **hazards},
        ),
    )
    changes = [
        {"kind": kind, "at": at.isoformat(), "what": what, "figures": figures}
        for kind, at, what, figures in known
        if at is not None and at < end
    ]
    return sorted(changes, key=lambda change: (str(change["at"]), str(change["kind"])))
