"""What a tool that waits for a release is answered over HTTP, at each step of a real journal."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from functools import partial
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from closedloop.core.release.policy import ReleasePolicy
from closedloop.loop.status.release_verdict import read_verdict
from closedloop.release.by_hand import promote
from closedloop.release.controller import run_pass, start_release
from closedloop.release.moves import deploy_champion
from closedloop.serving.exposition import serve_metrics
from tests.deployments import change_row
from tests.release_controller import Services
from tests.releases import HOUR, NAME, NOW, flow, open_desk

POLICY = ReleasePolicy()
STEPS = ("shadow", "canary_5", "canary_25", "canary_50")


@pytest.fixture
def desk(tmp_path):
    """A release desk, and the address that answers about it."""
    with open_desk(tmp_path) as (releases, evidence, traffic):
        documents = {"/release": partial(read_verdict, releases.journal, NAME)}
        port = serve_metrics(CollectorRegistry(), "127.0.0.1", 0, "exporter.port", documents)
        yield releases, evidence, traffic, f"http://127.0.0.1:{port}/release"


def ask(address: str, query: str = "?version=2", method: str = "GET") -> tuple[int, Any]:
    request = urllib.request.Request(address + query, method=method)  # noqa: S310 - loopback
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310 - loopback
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def read(address: str, query: str = "?version=2") -> tuple[str, str, str]:
    status, found = ask(address, query)
    assert (status, found["model_name"]) == (200, NAME)
    return found["version"], found["stage"], found["verdict"]


def test_each_step_of_a_release_holds_until_the_version_serves(desk):
    releases, evidence, traffic, address = desk
    assert read(address, "") == (None, None, "hold")
    deploy_champion(releases, "1", now=NOW, actor="register", reason="the first version")
    assert read(address) == ("2", None, "hold"), "it has not begun"
    start_release(releases, evidence, "2", actor="a test", now=NOW)
    now = NOW
    for step in STEPS:
        assert read(address) == ("2", step, "hold")
        assert read(address, "") == ("2", step, "hold")
        assert read(address, "?version=1") == ("1", "champion", "promote")
        flow(traffic, step)
        now += HOUR
        entries = len(releases.read_entries())
        read(address)
        assert len(releases.read_entries()) == entries, "who asks decides nothing"
        run_pass(releases, evidence, POLICY, now=now, as_of=now)
    assert read(address) == read(address, "") == ("2", "champion", "promote")
    newest = releases.read_entries()[-1]
    found = ask(address)[1]
    assert (found["reason"], found["decided_at"]) == (newest.reason, now.isoformat().replace("+00:00", "Z"))


@pytest.mark.parametrize("step", STEPS)
def test_a_version_that_is_taken_back_is_a_rollback(desk, step):
    releases, evidence, traffic, address = desk
    deploy_champion(releases, "1", now=NOW, actor="register", reason="the first version")
    start_release(releases, evidence, "2", actor="a test", now=NOW)
    now = NOW
    for before in STEPS[: STEPS.index(step)]:
        flow(traffic, before)
        now += HOUR
        run_pass(releases, evidence, POLICY, now=now, as_of=now)
    assert read(address) == ("2", step, "hold")
    flow(traffic, step, latency_p95_ms=800.0)
    run_pass(releases, evidence, POLICY, now=now + HOUR, as_of=now + HOUR)
    assert read(address) == read(address, "") == ("2", "rejected", "rollback")
    assert "latency" in ask(address)[1]["reason"]


def test_a_version_whose_place_another_took_is_a_rollback(desk):
    releases, evidence, traffic, address = desk
    deploy_champion(releases, "1", now=NOW, actor="register", reason="the first version")
    start_release(releases, evidence, "2", actor="a test", now=NOW)
    flow(traffic, "shadow")
    run_pass(releases, evidence, POLICY, now=NOW + HOUR, as_of=NOW + HOUR)
    promote(releases, Services(), "3", actor="a person", reason="urgent", now=NOW + 2 * HOUR)
    assert read(address) == ("2", "replaced", "rollback")
    assert ask(address)[1]["reason"].startswith("version 3 took its place: ")
    assert read(address, "?version=1") == ("1", "replaced", "rollback")
    assert read(address, "") == ("3", "champion", "promote")


def test_what_cannot_be_answered_is_said_and_is_no_verdict(desk):
    releases, _, _, address = desk
    for query in ("?version=two", "?version=", "?stage=canary_5", "?version=2&stage=canary_5"):
        status, found = ask(address, query)
        assert (status, found["error"]["message"]) == (400, "the one parameter is version, a number"), query
    assert ask(address, method="POST")[0] == 405
    deploy_champion(releases, "1", now=NOW, actor="register", reason="the first version")
    change_row(releases.journal.database, NAME, champion_version="3")
    status, found = ask(address)
    assert (status, found["error"]["code"]) == (503, "unavailable"), "a row that no entry wrote"
