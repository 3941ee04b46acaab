"""Two services behind Envoy, split as the manifests' VirtualService says and as the controller of releases changes it.

Istio's control plane cannot be had here; `tests/istio.py` takes its place, and that of kubectl.
"""

from __future__ import annotations

import collections
import contextlib
import datetime as dt
import json
import math
import sqlite3
import subprocess

import pytest

from closedloop.bootstrap import build_releases, load_run
from closedloop.contract import digest_folder
from closedloop.release.by_hand import promote
from tests.http_service import HttpService, Load, wait_until
from tests.istio import DELAY_SECONDS, run_envoy
from tests.manifests import render
from tests.model_folders import ROWS, write_model_folder
from tests.programs import run_prometheus
from tests.routes import RESOURCE, describe_routes, write_routes

pytestmark = pytest.mark.thorough

NAME, SERVICE = "shop_churn", "shop_churn_0"
BROKEN = {"visits_30d": 25.0, "age": 40.0, "plan": "plus"}  # version 2's graph raises on it, version 1's does not
REQUESTS = 1_000


class Everything:
    """A feature store that holds whatever it is asked for."""

    def has_service(self, _):
        return True


@pytest.fixture
def shop(project, tmp_path):
    """Version 1 is champion; version 2 won against it, and fails on rows that it was not tried on."""
    releases = build_releases(load_run(project.root / "params.yaml", root=project.root))
    for number, fails_from in (("1", None), ("2", 21)):
        folder = tmp_path / number
        write_model_folder(folder, model_name=NAME, feature_service=SERVICE, fails_from=fails_from)
        with releases.tracking.start_run(f"train {number}") as run_id:
            releases.tracking.log_files({"contract": folder})
        tags = {"closedloop.folder_sha256": digest_folder(folder), "closedloop.gates": "passed"}
        tags |= {"closedloop.feature_service": SERVICE, "closedloop.comparison": "win"}
        tags["closedloop.compared_with"] = digest_folder(tmp_path / "1")
        releases.tracking.register(f"runs:/{run_id}/contract", run_id, tags)
    promote(releases, Everything(), "1", actor="a test", reason="first", now=dt.datetime.now(dt.UTC))
    return project, releases


@pytest.fixture
def manifests():
    """The VirtualService and the DestinationRule as they are applied, and the labels of what they select."""
    found = {(one["kind"], one["metadata"]["name"]): one for one in render("production")}
    labels = [
        found["Deployment", f"closedloop-{track}"]["spec"]["template"]["metadata"]["labels"]
        for track in ("stable", "canary")
    ]
    return found["VirtualService", "closedloop"], found["DestinationRule", "serving"], labels


def ask(proxy, **headers):
    service = HttpService(proxy.root, port=proxy.port, headers=proxy.headers | headers)
    status, answer = service.call("POST", "/predict", {"features": ROWS[0]})
    assert status == 200, answer
    return answer


def count_versions(proxy, requests=100):
    """Who answered how often."""
    return collections.Counter(ask(proxy)["model_version"] for _ in range(requests))


def weigh(place, canary):
    """As a person would with kubectl."""
    service = json.loads((place / RESOURCE).read_text(encoding="utf-8"))
    for one in service["spec"]["http"][1]["route"]:
        one["weight"] = canary if one["destination"]["subset"] == "canary" else 100 - canary
    write_routes(place, service)


@contextlib.contextmanager
def run_two(project, monkeypatch):
    """The stable service; the canary's, not started: it is not ready before there is a challenger."""
    stable, canary = (
        HttpService(
            project.root,
            {
                "CLOSEDLOOP_SERVING__SLOT": slot,
                "CLOSEDLOOP_SERVING__STATE": f"state/{slot}",
                "CLOSEDLOOP_SERVING__ID_KEY": "k" * 32,
            },
        )
        for slot in ("champion", "challenger")
    )
    try:
        stable.start()
        yield stable, canary
    finally:
        for service in (stable, canary):
            if service.process:
                service.stop()


def test_the_split_is_the_virtual_services_and_a_canary_that_errs_is_rolled_back(
    shop, manifests, tmp_path, monkeypatch
):
    (project, releases), (virtual_service, rule, labels) = shop, manifests
    place = tmp_path / "mesh"
    place.mkdir()
    monkeypatch.setenv("PATH", str(place), prepend=":")
    monkeypatch.setenv("CLOSEDLOOP_SERVING__COUNT_SENT_FEATURES", "true")
    with contextlib.ExitStack() as stack:
        stable, canary = stack.enter_context(run_two(project, monkeypatch))
        pods = {"serving": [(labels[0], stable.port), (labels[1], canary.port)]}
        targets = {"stable": f"127.0.0.1:{stable.metrics_port}", "canary": f"127.0.0.1:{canary.metrics_port}"}
        prometheus = stack.enter_context(run_prometheus(tmp_path, targets))
        for name, value in {
            "TRAFFIC": "istio",
            "PROMETHEUS": prometheus,
            "REQUESTS_MIN": "200",
            "REQUESTS_A_DAY": "100000",  # those of the seconds before would not fill a canary of 5%
            "LATENCY_SLACK_MS": "5000",  # the machine may be busy
        }.items():
            monkeypatch.setenv(f"CLOSEDLOOP_RELEASE__{name}", value)
        proxy = stack.enter_context(run_envoy(place, virtual_service, rule, pods))
        assert count_versions(proxy) == {"1": 100}
        project.run("release", "start", "2")
        canary.start()
        wait_until(
            lambda: "2" in json.dumps(stable.call("GET", "/model/info")[1]["slots"].get("challenger")), "the shadow"
        )

        weigh(place, 10)
        wait_until(lambda: ask(proxy)["model_version"] == "2", "Envoy's new weights")
        found = count_versions(proxy, REQUESTS)
        assert set(found) == {"1", "2"}
        assert abs(found["2"] - 0.1 * REQUESTS) < 6 * math.sqrt(REQUESTS * 0.1 * 0.9)
        print(f"of {REQUESTS} requests at 90/10 the canary answered {found['2']}")
        weigh(place, 100)
        wait_until(lambda: count_versions(proxy) == {"2": 100}, "all of them")
        forced = ask(proxy, **{"x-model-version": "1"})  # the stable service alone has it
        assert forced["model_version"] == "1"
        weigh(place, 0)
        wait_until(lambda: count_versions(proxy) == {"1": 100}, "none of them")

        def step():
            return project.run("release", "step").output

        def may_advance():
            command = ["closedloop", "release", "check"]
            return subprocess.run(command, cwd=project.root, check=False).returncode == 0

        with Load(proxy) as load:
            wait_until(may_advance, "enough requests in shadow", seconds=300)
            # what is answered before Envoy has the new weights is all the stable service's, and does not count
            assert "advance" in step()
            load.wait_for(500)
        assert load.failures == []
        assert read_weights(place) == {"stable": 95, "canary": 5}
        wait_until(lambda: ask(proxy)["model_version"] == "2", "an answer of the canary")
        bodies = [{"features": row} for row in (*ROWS, BROKEN)]
        statuses, answered = collections.Counter(), {answer["prediction_id"] for answer in load.answers}

        def send_and_step():
            for _ in range(50):
                for body in bodies:
                    status, answer = proxy.call("POST", "/predict", body)
                    statuses[status] += 1
                    assert status == 200 or body is bodies[-1], answer
                    if status == 200:
                        answered.add(answer["prediction_id"])
            # each of the two stores by itself: one that is behind looks like a broken split
            wait_until(lambda: answered <= read_stored(project.root), "all answers in the store", seconds=300)
            return "roll back" in step()

        wait_until(send_and_step, "the rollback", seconds=300)
        assert read_weights(place) == {"stable": 100, "canary": 0}
        assert set(statuses) == {200, 500}
        wait_until(lambda: count_versions(proxy) == {"1": 100}, "the champion alone")
        assert {proxy.call("POST", "/predict", body)[0] for body in bodies} == {200}
    entries = releases.read_entries()
    assert [entry.action for entry in entries] == ["promote", "shadow", "routed", "canary_5", "routed", "reject"]
    step_at, routed_at = entries[-2].rollout.step_at, entries[-2].rollout.routed_at
    assert (routed_at - step_at).total_seconds() >= DELAY_SECONDS
    assert entries[-1].reason.startswith(("error ratio: ", "error rate: "))


def read_stored(root):
    with contextlib.closing(sqlite3.connect(f"file:{root / 'state/operations.db'}?mode=ro", uri=True)) as store:
        return {found for (found,) in store.execute("SELECT prediction_id FROM predictions")}


def read_weights(place):
    service = json.loads((place / RESOURCE).read_text(encoding="utf-8"))
    return {one["destination"]["subset"]: one["weight"] for one in service["spec"]["http"][1]["route"]}


def test_what_envoy_cannot_be_told_here_is_refused(manifests):
    service, _, _ = manifests
    service["spec"]["http"][1]["mirror"] = {"host": "serving"}
    with pytest.raises(ValueError, match="route split"):
        describe_routes(service)
