"""Regime changes of the `shop` simulator: the dated ways in which its world stops being what it was."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

PRICE_FACTOR = 1.28
CAMPAIGN_DAYS = 45
CAMPAIGN_SHARE = 0.16


@dataclass(frozen=True)
class RegimeChange:
    """One dated change of the simulated world.

    Parameters
    ----------
    kind : str
        `covariate` (who the customers are), `concept` (what their behaviour means) or `harmless`
        (figures move, nothing that bears on churn does).
    at : datetime.date
        First day on which the change is in force, UTC.
    what : str
        One-line description.
    """

    kind: str
    at: dt.date
    what: str


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


def list_changes(
    covariate_at: dt.date | None, harmless_at: dt.date | None, concept_at: dt.date | None
) -> tuple[RegimeChange, ...]:
    """List the changes that have a date, oldest first.

    Examples
    --------
    >>> [change.kind for change in list_changes(None, dt.date(2024, 4, 15), dt.date(2024, 3, 1))]
    ['concept', 'harmless']
    """
    whats = (
        ("covariate", covariate_at, "a campaign signs up many young, low-income, budget customers"),
        ("harmless", harmless_at, "prices rise; what people do stays the same"),
        (
            "concept",
            concept_at,
            "customers stock up: few large baskets, few visits; premium leaves, budget stays",
        ),
    )
    changes = [RegimeChange(kind, at, what) for kind, at, what in whats if at is not None]
    return tuple(sorted(changes, key=lambda change: (change.at, change.kind)))


def describe_changes(changes: tuple[RegimeChange, ...], *, end: dt.date) -> list[dict[str, Any]]:
    """Describe, as JSON-able dicts, the changes in force before `end`, with the figures that define them."""
    figures: dict[str, dict[str, float]] = {
        "covariate": {"campaign_days": CAMPAIGN_DAYS, "extra_customers_share": CAMPAIGN_SHARE},
        "harmless": {"price_factor": PRICE_FACTOR},
        "concept": {
            "basket_factor": STOCKING_UP.basket_factor,
            "premium_log_hazard_before": BROWSING.premium,
            "premium_log_hazard_after": STOCKING_UP.premium,
        },
    }
    return [
        {
            "kind": change.kind,
            "at": change.at.isoformat(),
            "what": change.what,
            "figures": figures[change.kind],
        }
        for change in changes
        if change.at < end
    ]
