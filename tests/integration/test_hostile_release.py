"""A release beside a hostile client of each scope: the decision is that of the honest customers, whatever it does.

The real store and the real decision; what the service would have logged is made up, customer by customer.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from closedloop.core.release.assignment import is_canary
from closedloop.core.release.decision import decide_step
from closedloop.core.release.entries import Rollout
from closedloop.core.release.guardrails import count_scores
from closedloop.core.release.policy import ReleasePolicy
from closedloop.core.release.types import StepDecision
from closedloop.records import Outcome, Prediction
from closedloop.release.evidence import Evidence
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from closedloop.store.release_queries import ReleaseQueries

NAME, HONEST, HOSTILE, REPORTER = "shop_churn", "600d600d", "0badc0de", "5e9051e5"
NOW = dt.datetime(2024, 6, 1, tzinfo=dt.UTC)
DAY, CLOSED = dt.timedelta(days=1), NOW - dt.timedelta(days=40)
CUSTOMERS, REVISION = 600, 7
POLICY = ReleasePolicy(requests_min=150, evidence="outcomes", outcomes_min=100)
Rows = list[Prediction | Outcome]


class World:
    """What honest customers did in the last canary step, and how a hostile client asks; ``slow``: by how many times."""

    def __init__(self, seed: int, *, slow: float, gain: float) -> None:
        self.rng = np.random.default_rng(seed)
        self.salt, self.slow, self.gain = f"secret {self.rng.integers(2**60)}", slow, gain
        self.failed: dict[str, float] = {}
        self.number = 0

    def predict(self, customer: str | None, **changes: Any) -> Prediction:
        """As the service answers and logs a request."""
        self.number += 1
        version = "2" if is_canary(self.salt, customer or f"r{self.number}", 0.5) else "1"
        latency = self.rng.normal(8.0, 0.5) * (self.slow if version == "2" else 1.0)
        values: dict[str, Any] = {
            "model_version": version,
            "variant": "canary" if version == "2" else "champion",
            "predicted_at": NOW + dt.timedelta(minutes=float(self.rng.uniform(2, 600))),
            "score": float(self.rng.beta(1, 3)),
            "latency_ms": latency,
            "customer_id": customer,
            "features_as_of": NOW,
            "client": HONEST,
            "revision": REVISION,
        }
        values |= changes
        fixed = {"request_id": "r", "model_name": NAME, "source": "http", "features": (1.0,), "decision": 0}
        return Prediction(f"{self.number:048x}", **fixed, **values)

    def list_honest(self) -> Rows:
        """Each customer asks once or twice in the step; what became of 300 of them was reported, as it was."""
        rows: Rows = [self.predict(f"C{n}") for n in range(CUSTOMERS) for _ in range(self.rng.integers(1, 3))]
        for number in range(300):
            outcome = int(self.rng.random() < 0.3)
            knows = {"1": 0.3, "2": 0.3 + self.gain * (0.3 if outcome else -0.1)}
            rows += self.report(f"C{number}", outcome, knows, reported_by=REPORTER)
        return rows

    def report(self, customer: str, outcome: int, scores: dict[str, float], *, reported_by: str) -> Rows:
        """A prediction of both models before the release's step, and what is said to have become of the customer."""
        at = {"predicted_at": CLOSED + DAY / 2, "features_as_of": CLOSED}
        first = self.predict(customer, model_version="1", variant="champion", score=scores["1"], **at)
        shadow = {"model_version": "2", "variant": "shadow", "answered_id": first.prediction_id}
        second = self.predict(customer, score=scores["2"], **shadow, **at)
        return [first, second, Outcome(first.prediction_id, outcome, CLOSED + 31 * DAY, reported_by)]


def flood_with_invented_ids(world: World) -> Rows:
    """Ids whose variant it has found out, with features of its own: to one version all of them, slow and certain."""
    version = str(world.rng.choice(["1", "2"]))
    forged = {"score": 0.99, "latency_ms": 900.0, "features_as_of": None, "client": HOSTILE, "model_version": version}
    return [world.predict(f"X{number}", **forged) for number in range(800)]


def name_one_customer_again_and_again(world: World) -> Rows:
    """A customer that it knows to be the challenger's, a thousand times in one batch."""
    mine = next(f"C{number}" for number in range(CUSTOMERS) if is_canary(world.salt, f"C{number}", 0.5))
    late = {"predicted_at": NOW + DAY, "latency_ms": 700.0, "score": 0.999, "client": HOSTILE}
    world.failed["2/canary"] = 1.0  # its requests fail a thousand times, and are one customer
    return [world.predict(mine, **late) for _ in range(1_000)]


def ask_first_for_the_certain_ones(world: World) -> Rows:
    """A third of the customers before anybody else, in slow lists, only those whom the model is sure of."""
    asked = world.rng.choice(CUSTOMERS, 200, replace=False)
    first = {"predicted_at": NOW + dt.timedelta(seconds=30), "client": HOSTILE}
    return [world.predict(f"C{n}", **first, score=0.97, latency_ms=float(world.rng.normal(60, 5))) for n in asked]


def ask_slowly_beside_a_slow_challenger(world: World) -> Rows:
    """Both versions look slow, which would hide that one of them is."""
    asked = world.rng.choice(CUSTOMERS, 200, replace=False)
    first = {"predicted_at": NOW + dt.timedelta(seconds=30), "client": HOSTILE}
    return [world.predict(f"C{n}", **first, latency_ms=float(world.rng.normal(60, 5))) for n in asked]


def report_falsely(world: World) -> Rows:
    """Of 130 customers the reverse of what the challenger says; by its own word each of them."""
    rows: Rows = []
    for number in range(300, 430):
        says = int(world.rng.random() < 0.5)
        wrong = {"1": 0.3, "2": 0.05 if says else 0.6}
        rows += world.report(f"C{number}", says, wrong, reported_by=HOSTILE)
    return rows


def report_for_the_challenger(world: World) -> Rows:
    """What would promote a challenger that is no better."""
    rows: Rows = []
    for number in range(300, 430):
        says = int(world.rng.random() < 0.5)
        right = {"1": 0.3, "2": 0.9 if says else 0.02}
        rows += world.report(f"C{number}", says, right, reported_by=HOSTILE)
    return rows


def force_a_version(world: World) -> Rows:
    """An administrator's header: slow answers of the challenger to everybody."""
    forced = {"forced": True, "model_version": "2", "variant": "canary", "latency_ms": 900.0, "client": HOSTILE}
    early = {"predicted_at": NOW + dt.timedelta(seconds=10), "score": 0.99}
    return [world.predict(f"C{number}", **forced, **early) for number in range(CUSTOMERS)]


GOOD = {"slow": 1.0, "gain": 1.0}
ATTACKS: list[tuple[str, Callable[[World], Rows], dict[str, float], str]] = [
    ("predict", flood_with_invented_ids, GOOD, "advance"),
    ("predict", name_one_customer_again_and_again, GOOD, "advance"),
    ("predict", ask_first_for_the_certain_ones, GOOD, "advance"),
    ("predict", ask_slowly_beside_a_slow_challenger, {"slow": 3.0, "gain": 1.0}, "roll_back"),
    ("outcomes", report_falsely, GOOD, "advance"),
    ("outcomes", report_for_the_challenger, {"slow": 1.0, "gain": 0.0}, "hold"),
    ("admin", force_a_version, GOOD, "advance"),
]


class Failures:
    """The customers whose requests failed, as the metric counts them."""

    def __init__(self, failed: dict[str, float]) -> None:
        self._failed = failed

    def read_totals(self) -> dict[str, float]:
        return {}

    def read_since(self, before: dict[str, float], seconds: float, *, version: str) -> dict[str, float]:
        return self._failed


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    place: Path = tmp_path_factory.mktemp("store")
    with closing(Database(f"sqlite:///{place / 'operations.db'}")) as made:
        made.upgrade()
        yield made


def decide(database: Database, world: World, rows: Rows) -> StepDecision:
    """What the controller would decide at the end of a day, with these rows in the store."""
    with database.begin() as connection:
        for table in ("outcomes", "predictions"):
            connection.execute(sa.text(f"DELETE FROM {table}"))
    store = Predictions(database)
    assert store.insert(rows).refused == ()
    evidence = Evidence(ReleaseQueries(database), store, Failures(world.failed), "customer", 30)
    scores = count_scores(np.random.default_rng(0).beta(1, 3, 8_000))
    rollout = Rollout("2", "1", "canary_50", CLOSED, NOW, {}, scores)
    later = NOW + 2 * DAY
    return decide_step(POLICY, evidence.gather(NAME, rollout, revision=REVISION, now=later, as_of=later))


def test_a_worker_that_takes_a_step_up_late_rejects_no_good_version(database: Database) -> None:
    """For an hour it deals customers as the step before did, each of whom asks once."""
    world = World(0, **GOOD)
    before = {"model_version": "1", "variant": "champion", "revision": REVISION - 1}
    late = [world.predict(f"L{n}", predicted_at=NOW + dt.timedelta(hours=n / 400), **before) for n in range(400)]
    assert decide(database, world, world.list_honest() + late).verdict == "advance"


@pytest.mark.parametrize(
    "seeds", [range(2), pytest.param(range(2, 20), marks=pytest.mark.thorough)], ids=["two seeds", "eighteen others"]
)
@pytest.mark.parametrize(("scope", "attack", "truth", "expected"), ATTACKS, ids=[one[1].__name__ for one in ATTACKS])
def test_the_decision_is_that_of_the_honest_customers(
    database: Database,
    scope: str,
    attack: Callable[[World], Rows],
    truth: dict[str, float],
    expected: str,
    seeds: range,
) -> None:
    decided = []
    for seed in seeds:
        world = World(seed, **truth)
        honest = world.list_honest()
        if seed < 3:  # that the world is what it is said to be
            assert decide(database, world, honest).verdict == expected
        found = decide(database, world, honest + attack(world))
        decided.append(found.verdict if found.verdict == expected else found)
    assert decided == [expected] * len(seeds), f"scope {scope}"
