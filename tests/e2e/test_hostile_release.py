"""A release by the running service beside a hostile client of each scope: the decision is the honest customers'.

Service, spool, drain, store, metrics and controller are the real ones. Each seed begins the last canary step anew:
another revision of the row, another salt, other customers. How fast the service answers depends on the machine, so that
no latency is judged here (`tests/integration/test_hostile_release.py` judges them).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import itertools
import json
import os
import random
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from closedloop.bootstrap import build_release_evidence, build_releases, load_run
from closedloop.core.release.entries import Rollout
from closedloop.core.release.policy import ReleasePolicy
from closedloop.core.release.types import StepDecision
from closedloop.release.controller import judge, read_reference
from closedloop.release.moves import Challenger, Move
from tests.http_service import HttpService, run_service, wait_until
from tests.model_folders import ROWS, write_online_rows
from tests.releases import register_versions

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(1800)]

NAME = "shop_churn"
SEEDS = 20
HONEST, ODD = 430, 300  # customers that the honest client asks for, and others, of whom the model is sure
CERTAIN = {"visits_30d": 35.0, "age": 20.0, "plan": "plus"}
TOKENS = {
    "honest": ["predict"],
    "reporter": ["outcomes"],
    "hostile": ["predict"],
    "liar": ["outcomes"],
    "boss": ["admin"],
}
OFFLINE = ReleasePolicy(requests_min=100, latency_slack_ms=60_000)
OUTCOMES = OFFLINE.model_copy(update={"evidence": "outcomes", "outcomes_min": 100})
Answers = list[dict[str, Any]]


class Live:
    """A running service of versions 1 and 2, and the controller of its releases."""

    def __init__(self, root: Path, service: HttpService) -> None:
        self.root, self.service = root, service
        run = load_run(root / "params.yaml", root=root)
        self.releases, self.evidence = build_releases(run), build_release_evidence(run)
        self.answers: Answers = []
        self.outcomes = 0

    def begin(self, seed: int) -> None:
        """The last canary step, as of an hour ago, dealt anew by a salt that follows from the seed."""
        self.move(seed)
        self.wait_for_revision()

    def move(
        self, seed: int, challenger: Challenger = ("2", "canary", 0.5), errors: dict[str, float] | None = None
    ) -> None:
        """Write the entry and the row, which the service is still to take up."""
        began, releases = dt.datetime.now(dt.UTC), self.releases  # so that no outcome of an earlier seed counts
        now = began - dt.timedelta(hours=1)
        self.seed, self.random = seed, random.Random(seed)  # noqa: S311
        errors = self.evidence.errors.read_totals() if errors is None else errors
        scores = read_reference(releases.tracking, "2", None, ())[0]
        rollout = Rollout("2", "1", "canary_50", began, now, errors, scores)
        move = Move("canary_50", "a test", "a seed", now, "1", challenger, rollout, deal_anew=True)
        dataclasses.replace(releases, draw_salt=lambda: f"salt {seed}").move(releases.read_state(), move)

    def wait_for_revision(self) -> None:
        """Until the worker has taken up the newest row."""
        revision = self.releases.read_state().row.revision  # type: ignore[union-attr]

        def read() -> bool:
            return bool(self.call("boss", "GET", "/model/info")["revision"] == revision)

        wait_until(read, f"revision {revision}")

    def call(self, token: str, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """One request of a client."""
        client = HttpService(self.root, port=self.service.port, metrics_port=self.service.metrics_port)
        client.headers = {"Authorization": f"Bearer {token}", **headers}
        status, answer = client.call(method, path, body)
        assert status < 300, answer
        return answer

    def ask(self, token: str, bodies: list[dict[str, Any]], **headers: str) -> Answers:
        """A list of customers in one request; the answers, all of which must be good."""
        found = self.call(token, "POST", "/predict/batch", bodies, **headers)["predictions"]
        assert not [one for one in found if "error" in one]
        self.answers += [] if headers else found
        return list(found)

    def list_customers(self, kind: str, count: int) -> list[dict[str, Any]]:
        """Customers of this seed, whom the online store knows."""
        return [{"customer_id": f"{self.seed}-{kind}{number}"} for number in range(count)]

    def ask_honestly(self) -> Answers:
        """Each customer once, in a request of its own."""
        return [self.ask("honest", [one])[0] for one in self.list_customers("C", HONEST)]

    def report(self, token: str, answers: Answers, outcome: Callable[[], int]) -> None:
        """What became of the customers whom both versions scored."""
        told = [one for one in answers if one["variant"] == "champion"]
        self.call(
            token, "POST", "/outcomes", [{"prediction_id": o["prediction_id"], "outcome": outcome()} for o in told]
        )
        self.outcomes += len(told)

    def decide(self, policy: ReleasePolicy) -> StepDecision:
        """What the controller decides once all is stored, at a time when the outcomes are closed."""
        ids = {one["prediction_id"] for one in self.answers}
        shadows = {one["prediction_id"] for one in self.answers if one["variant"] == "champion"}

        def is_stored() -> bool:
            with contextlib.closing(sqlite3.connect(self.root / "state/operations.db")) as store:
                stored = {row[0] for row in store.execute("SELECT prediction_id FROM predictions")}
                answered = {row[0] for row in store.execute("SELECT answered_id FROM predictions")}
                outcomes = store.execute("SELECT count(*) FROM outcomes").fetchone()[0]
            return ids <= stored and shadows <= answered and outcomes == self.outcomes

        wait_until(is_stored, "all answers and outcomes in the store")
        now, state = dt.datetime.now(dt.UTC), self.releases.read_state()
        judged = judge(self.releases, self.evidence, policy, state, now=now, as_of=now + dt.timedelta(days=40))
        assert judged is not None
        return judged[1]


@pytest.fixture(scope="module")
def live(make_project: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    root: Path = make_project(folder / "project").root
    register_versions(root, {"1": 0.0, "2": 1.0})
    today = dt.datetime.now(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    seeds = range(-1, 2 * SEEDS)
    rows = {f"{seed}-C{number}": ROWS[number % 3] for seed in seeds for number in range(HONEST)}
    rows |= {f"{seed}-X{number}": CERTAIN for seed in seeds for number in range(ODD)}
    write_online_rows(folder / "online.db", NAME, dict.fromkeys(rows, today), rows)
    online = {"online_store": {"type": "sqlite", "path": str(folder / "online.db")}}
    variables = {"CLOSEDLOOP_FEATURES__OVERRIDES": json.dumps(online), "CLOSEDLOOP_SERVING__TOKENS": json.dumps(TOKENS)}
    variables |= {"CLOSEDLOOP_SERVING__RANGE_MARGIN": "2", "CLOSEDLOOP_SERVING__OUTCOMES_PER_MINUTE": "100000"}
    with run_service(root, **variables) as service, pytest.MonkeyPatch.context() as patched:
        patched.setenv("CLOSEDLOOP_SERVING__METRICS_PORT", str(service.metrics_port))
        service.read_metric("spool_depth_bytes")  # the agent, which shows the metrics, is there
        yield Live(root, service)


def ask_for_invented_customers(live: Live) -> None:
    """With features of its own, of whom the model is sure; then again for those that the challenger answered."""
    invented = [{"customer_id": f"{live.seed}-I{number}", "features": CERTAIN} for number in range(700)]
    found = live.ask("hostile", invented)
    again = [one for one, answer in zip(invented, found, strict=True) if answer["variant"] == "canary"]
    live.ask("hostile", again * 2)


def ask_for_one_customer_a_thousand_times(live: Live) -> None:
    """Of each version one, of whom the model is sure."""
    for _ in range(2):
        live.ask("hostile", [live.random.choice(live.list_customers("X", ODD))] * 1_000)


def ask_for_customers_of_its_choice(live: Live) -> None:
    """Known ones, of whom the model is sure: less than half of all, and before anybody else."""
    live.ask("hostile", live.list_customers("X", ODD))


def force_the_challenger_on_all(live: Live) -> None:
    """By the header that only an administrator may send."""
    headers = {"X-Model-Version": "2"}
    live.ask("boss", live.list_customers("C", HONEST), **headers)
    live.ask("boss", live.list_customers("X", ODD), **headers)


ATTACKS = [
    ask_for_invented_customers,
    ask_for_one_customer_a_thousand_times,
    ask_for_customers_of_its_choice,
    force_the_challenger_on_all,
]
SOME_OR_ALL = pytest.mark.parametrize(
    "seeds", [range(2), pytest.param(range(2, SEEDS), marks=pytest.mark.long)], ids=["two seeds", "the others"]
)


@SOME_OR_ALL
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_client_that_asks_decides_a_release(live: Live, attack: Callable[[Live], None], seeds: range) -> None:
    for seed in seeds:
        live.begin(seed)
        attack(live)
        live.ask_honestly()
        attack(live)
        assert live.decide(OFFLINE).verdict == "advance", seed


@SOME_OR_ALL
@pytest.mark.parametrize(("churned", "lie", "expected"), [(19, 0, "advance"), (12, 1, "hold")])
def test_no_client_that_reports_decides_a_release(
    live: Live, churned: int, lie: int, expected: str, seeds: range
) -> None:
    """The new version gives higher scores: if 19 of 20 churned it is proved better, if 12 did nothing is proved."""
    for seed in seeds:
        live.begin(seed + (SEEDS if expected == "hold" else 0))  # customers of whom nothing is known yet
        answers = live.ask_honestly()
        told = itertools.cycle([1] * churned + [0] * (20 - churned))
        live.report("reporter", answers[:250], told.__next__)
        honest = live.decide(OUTCOMES)
        assert honest.verdict == expected, honest
        live.report("liar", answers[250:], lambda: lie)
        found = live.decide(OUTCOMES)
        assert found.verdict == expected, found


def test_a_worker_that_takes_a_step_up_late_rejects_no_good_version(live: Live) -> None:
    """The agent, which brings rows to the worker, is held; until it goes on all are the champion's, as in shadow."""
    live.move(-1, ("2", "shadow", 0.0))
    live.wait_for_revision()
    errors = live.evidence.errors.read_totals()  # of the agent's page
    (agent,) = live.service.find_children("serve-agent")
    os.kill(agent, signal.SIGSTOP)
    try:
        live.move(-1, errors=errors)
        late = live.ask("honest", live.list_customers("X", ODD))
        assert {one["variant"] for one in late} == {"champion"}
    finally:
        os.kill(agent, signal.SIGCONT)
    live.wait_for_revision()
    live.ask_honestly()
    assert live.decide(OFFLINE).verdict == "advance"
