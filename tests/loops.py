"""A loop that has been running: an operations store with a release, checks, retrainings, predictions and outcomes."""

from __future__ import annotations

import datetime as dt
from typing import Any

from closedloop.core.release.entries import Deployment, Entry, Rollout
from closedloop.records import Outcome, Prediction
from closedloop.store.checks import Check, Checks, Retraining, name_check
from closedloop.store.database import Database
from closedloop.store.journal import Journal
from closedloop.store.predictions import Predictions

NAME = "shop_churn"
DAY = dt.timedelta(days=1)
HORIZON_DAYS = 30
EVIDENCE: dict[str, Any] = {
    "drift": {
        "breach": True,
        "drifted": ["purchase_count_30d"],
        "beyond_limits": [],
        "features": {
            "purchase_count_30d": {"effect": 0.25, "p_value": 1e-9},
            "age": {"effect": 0.02, "p_value": 0.4},
            "score": {"effect": 0.08, "p_value": 0.01},
        },
    },
    "estimate": {"accuracy": 0.81, "breach": True, "drop": 0.04, "reference": {"accuracy": 0.85}},
    "realised": {"accuracy": 0.8, "brier": 0.15, "breach": False, "reasons": [], "expected": {"brier": 0.14}},
    "money": {"customers": 2_000, "at_stake": 60_000.4, "offers": 310, "expected_profit": 2_500.6},
    "outcomes_until": "2024-01-01T00:00:00+00:00",
    "judged_at": "2024-03-01T00:00:00+00:00",
    "reasons": ["drift in the newest check: purchase_count_30d (0.25)"],
}


def predict(number: int, at: dt.datetime, **changes: Any) -> Prediction:
    """A prediction of a customer of its own, with features of the midnight before."""
    midnight = at.replace(hour=0, minute=0, second=0, microsecond=0)
    values: dict[str, Any] = {
        "prediction_id": f"{number:048x}",
        "request_id": f"r{number}",
        "model_name": NAME,
        "model_version": "3",
        "variant": "champion",
        "source": "http",
        "predicted_at": at,
        "features": (1.0,),
        "score": 0.7,
        "decision": 1,
        "latency_ms": 1.0,
        "customer_id": f"C{number}",
        "features_as_of": midnight,
    }
    return Prediction(**(values | changes))


def check(as_of: dt.datetime, **changes: Any) -> Check:
    """A check of version 3 that found drift."""
    values: dict[str, Any] = {
        "check_id": name_check(NAME, as_of),
        "model_name": NAME,
        "model_version": "3",
        "as_of": as_of,
        "since": as_of - DAY,
        "until": as_of,
        "predictions": 2_000,
        "outcomes": 900,
        "verdict": "alert",
        "evidence": EVIDENCE,
        "recorded_at": as_of + dt.timedelta(hours=9),
    }
    return Check(**(values | changes))


def fill(url: str, now: dt.datetime, *, outcomes: int = 150) -> None:
    """Version 3 serves since 40 days, 4 is in its canary; 200 closed predictions, most with an outcome, 3 of 4 right.

    The last check was this morning and alerts; a retraining of 50 days ago gave version 4, a later one failed.
    """
    database = Database(url)
    database.upgrade()
    store, journal, checks = Predictions(database), Journal(database), Checks(database)
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    link = None
    row = Deployment(NAME, 1, "2", "salt", now - 60 * DAY)
    moves: list[tuple[str, int, Deployment, Rollout | None]] = [
        ("promote", 60, row, None),
        ("promote", 40, Deployment(NAME, 2, "3", "salt", now - 40 * DAY), None),
        (
            "canary_5",
            2,
            Deployment(NAME, 3, "3", "salt", now - 2 * DAY, "4", "canary", 0.05),
            Rollout("4", "3", "canary_5", now - 3 * DAY, now - 2 * DAY),
        ),
    ]
    for action, days, row, rollout in moves:
        link = journal.append_entry(Entry(action, "a test", now - days * DAY, "for a test", row, rollout), after=link)
    closed = [predict(number, today - 35 * DAY) for number in range(200)]
    fresh = [predict(number, now - dt.timedelta(hours=1)) for number in range(1_000, 1_010)]
    known = [Outcome(one.prediction_id, int(n % 4 > 0), now) for n, one in enumerate(closed[:outcomes])]
    store.insert([*closed, *fresh, *known])
    ended = Retraining("earlier", NAME, "monitor", "drift", now - 50 * DAY, now - 50 * DAY, state="registered")
    failed = Retraining("newest", NAME, "monitor", "outcomes", now - 5 * DAY, now - 5 * DAY, state="failed")
    for one in (ended, failed):
        checks.request_retraining(one)
    checks.record_check(check(today - DAY, verdict="none"))
    checks.record_check(check(today, recorded_at=now - dt.timedelta(hours=3)))
    database.close()
