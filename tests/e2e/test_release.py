"""A release undone under load, the journal that proves it, and every answer explained and computed once more."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import sqlite3
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import generate_latest

from closedloop.bootstrap import build_predictions, build_releases, load_run
from closedloop.errors import GateFailed
from closedloop.loop.lineage import explain, reproduce
from closedloop.release.by_hand import promote
from closedloop.serving.exposition import build_registry, name_registry
from closedloop.serving.metrics import WorkerMetrics
from closedloop.store.journal import read_entry
from tests.http_service import Load, run_service, wait_until
from tests.lineage import Cached
from tests.programs import fetch, run_program, run_prometheus
from tests.releases import register_versions

pytestmark = pytest.mark.thorough

NAME = "shop_churn"
BIASES = {"1": 0.0, "2": 0.01, "3": -1.0}


class Everything:
    """A feature store that holds whatever it is asked for."""

    def has_service(self, _):
        return True


def run_sql(root, statement, *values):
    with contextlib.closing(sqlite3.connect(root / "state/operations.db")) as connection, connection:
        connection.execute(statement, values)


@pytest.fixture
def shop(project):
    """Three registered versions, the first of which serves; the third answers otherwise than when it was evaluated."""
    register_versions(project.root, BIASES)
    run = load_run(project.root / "params.yaml", root=project.root)
    return project, build_releases(run), build_predictions(run)


def release(releases, version):
    promote(releases, Everything(), version, actor="a test", reason="for the test", now=dt.datetime.now(dt.UTC))


def test_a_rollback_under_load_is_in_force_at_once_and_the_journal_shows_it(shop):
    project, releases, store = shop
    release(releases, "2")
    with run_service(project.root) as service, Load(service) as load:
        wait_until(lambda: service.call("GET", "/health")[1]["model_version"] == "2", "version 2")
        load.wait_for(200)
        told = project.run("release", "rollback", "--reason", "complaints", "--actor", "on call", "--json").stdout
        assert json.loads(told) == {"champion": "1", "rollout": None}
        wait_until(lambda: service.call("GET", "/health")[1]["model_version"] == "1", "version 1")
        first = len(load.answers) + load.clients  # those were under way
        load.wait_for(300)
        load.stop()  # else a drain on a busy machine may never have stored as many as were answered
        wait_until(
            lambda: len([1 for some in store.read_predictions(NAME) for _ in some]) >= len(load.answers), "the drain"
        )
    assert load.failures == []
    assert {answer["model_version"] for answer in load.answers[first:]} == {"1"}
    row = releases.journal.read_deployment(NAME)
    old = [one.predicted_at for some in store.read_predictions(NAME) for one in some if one.model_version == "2"]
    late = max((max(old) - row.updated_at).total_seconds(), 0.0)
    print(f"the old version's last answer came {late:.2f} s after the rollback was asked for")
    assert late < 20  # generous: this machine may be busy; measured alone it is below 2
    entry = read_entry(releases.journal.read_newest(NAME)[1])
    assert (entry.action, entry.actor, entry.reason, entry.rejected) == ("roll_back", "on call", "complaints", "2")
    assert str(releases.tracking.read_alias("champion").version) == "1"
    nothing = project.run("release", "check", status=3).output
    assert "no version of shop_churn is being released: there is nothing to judge" in nothing
    proved = project.run("release", "verify").output
    assert "the journal holds: 3 entries, 0 signed" in proved
    assert "not protected: no key is set" in proved
    assert json.loads(project.run("release", "verify", "--json").stdout) == {"entries": 3, "signed": 0, "keyed": False}
    assert "on call: complaints" in project.run("release", "history").output

    run_sql(
        project.root, "UPDATE journal SET entry = replace(entry, 'for the test', 'for the Test') WHERE sequence = 2"
    )
    assert "entry 2 was changed" in project.run("release", "verify", status=2).output
    run_sql(project.root, "UPDATE journal SET entry = replace(entry, ' Test', ' test')")
    project.run("release", "verify")
    run_sql(project.root, "DELETE FROM journal WHERE sequence = 3")
    output = " ".join(project.run("release", "verify", status=2).output.split())
    assert "entry 3 is missing: the journal ends before entry 3, which the registry names" in output


def test_every_answer_of_three_versions_is_explained_and_computed_once_more(shop, tmp_path):

    project, releases, store = shop
    with run_service(project.root) as service:
        with Load(service) as load:
            for version in BIASES:
                release(releases, version)
                wait_until(lambda: service.call("GET", "/health")[1]["model_version"] == version, version)  # noqa: B023
                load.wait_for(100)
        answered = {answer["prediction_id"] for answer in load.answers}
        wait_until(
            lambda: answered <= {one.prediction_id for some in store.read_predictions(NAME) for one in some},
            "the drain",
        )
    by_version = {version: [a for a in load.answers if a["model_version"] == version] for version in BIASES}
    chosen = [answer for answers in by_version.values() for answer in answers[:75]]
    assert len(chosen) == 75 * len(BIASES) >= 200
    cached = Cached(releases.tracking, tmp_path / "downloads")
    for answer in chosen:
        again = reproduce(store, cached, NAME, answer["prediction_id"])
        assert again.score == pytest.approx(answer["probability"], abs=1e-6)
        assert again.decision == answer["prediction"]
        found = explain(store, releases.journal, releases.tracking, cached, answer["prediction_id"])
        assert found["model"]["version"] == answer["model_version"]
        assert found["features"] == answer["row"]
        entry = read_entry(releases.journal.read(NAME)[found["journal"]["entry"] - 1])
        assert (entry.action, entry.row.champion_version) == ("promote", answer["model_version"])
    shown = json.loads(project.run("why", "--json", chosen[0]["prediction_id"]).output)
    assert shown["features_as_of"] == "sent with the request"
    assert shown["gates"] == "not recorded"
    assert "as recorded" in project.run("reproduce", chosen[0]["prediction_id"]).output
    found = json.loads(project.run("reproduce", "--json", chosen[0]["prediction_id"]).stdout)
    assert found["score"] == pytest.approx(found["recorded_score"], abs=1e-6)
    assert found["decision"] == chosen[0]["prediction"]

    digest, tag = releases.tracking.read_version("1").tags["closedloop.folder_sha256"], "closedloop.folder_sha256"
    one = by_version["1"][-1]["prediction_id"]
    releases.tracking.client.set_model_version_tag(NAME, "1", tag, "f" * 64)
    for command in ("why", "reproduce"):  # the journal's digest counts too
        said = " ".join(project.run(command, one, status=1).output.split())
        assert f"names the digest ffffffffffff, the journal released it with {digest[:12]}" in said
    releases.tracking.client.set_model_version_tag(NAME, "1", tag, digest)

    run_sql(
        project.root, "UPDATE predictions SET score = score / 2 WHERE prediction_id = ?", chosen[0]["prediction_id"]
    )
    with pytest.raises(GateFailed, match="the same features give"):
        reproduce(store, cached, NAME, chosen[0]["prediction_id"])
    run_sql(project.root, "DELETE FROM predictions WHERE prediction_id = ?", chosen[1]["prediction_id"])
    assert "was purged or erased" in " ".join(
        project.run("reproduce", chosen[1]["prediction_id"], status=1).output.split()
    )


def test_a_good_version_goes_all_the_way_under_load_and_a_bad_one_is_rejected(shop, monkeypatch):
    project, releases, _ = shop
    monkeypatch.setenv("CLOSEDLOOP_SERVING__COUNT_SENT_FEATURES", "true")
    # so slow that a worker which takes a step up late on a busy machine has not answered hundreds of customers before
    with run_service(project.root) as service, Load(service, pause_seconds=0.3) as load:
        monkeypatch.setenv("CLOSEDLOOP_SERVING__METRICS_PORT", str(service.metrics_port))
        monkeypatch.setenv("CLOSEDLOOP_RELEASE__REQUESTS_MIN", "1000000")
        # the traffic of the seconds before would not fill a canary of 5%
        monkeypatch.setenv("CLOSEDLOOP_RELEASE__REQUESTS_A_DAY", "100000")
        monkeypatch.setenv("CLOSEDLOOP_RELEASE__LATENCY_SLACK_MS", "5000")  # the machine may be busy
        project.run("release", "start", "2")
        project.run("release", "check", status=3)
        monkeypatch.setenv("CLOSEDLOOP_RELEASE__REQUESTS_MIN", "20")

        def is_champion():
            return releases.read_state().rollout.step == "champion"

        command = (sys.executable, "-m", "closedloop.cli.main", "release", "step", "--every", "1s")
        with run_program(project.root / "steps.log", *command, cwd=project.root):
            wait_until(is_champion, "a new champion", seconds=400)
        load.wait_for(100)
        row = releases.read_state().row
        assert (row.champion_version, row.challenger_version, row.challenger_mode) == ("2", "1", "shadow")
        project.run("release", "start", "3")
        wait_until(lambda: "roll back" in project.run("release", "step").output, "a rejection")
    assert load.failures == []
    actions = [entry.action for entry in releases.read_entries()]
    steps = ["shadow", "canary_5", "canary_25", "canary_50", "champion"]
    assert actions == ["promote", *steps, "shadow", "reject"]
    assert "apart from those that it was evaluated by" in releases.read_entries()[-1].reason
    assert releases.read_state().row.champion_version == "2"
    assert "3" not in {answer["model_version"] for answer in load.answers}
    assert {answer["variant"] for answer in load.answers} == {"champion", "canary"}
    assert releases.tracking.read_version("3").tags["closedloop.rejected"].startswith("entry 8: ")
    project.run("release", "verify")


@contextlib.contextmanager
def run_page(folder):
    """The metrics page of another service, and what counts its errors."""
    metrics = WorkerMetrics(folder, "w1")
    metrics.start()

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(generate_latest(name_registry(build_registry(folder), NAME, aliases=True)))

        def log_message(self, *_):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", metrics
    finally:
        server.shutdown()
        server.server_close()
        metrics.close()


def test_check_reads_a_real_prometheus_and_the_store_and_changes_nothing(shop, monkeypatch, tmp_path):
    """Undecided, then fine, then a second service's errors, which only Prometheus knows of."""
    project, releases, _ = shop
    monkeypatch.setenv("CLOSEDLOOP_SERVING__COUNT_SENT_FEATURES", "true")
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(run_service(project.root))
        load = stack.enter_context(Load(service))
        other, metrics = stack.enter_context(run_page(tmp_path / "metrics"))
        metrics.count("model_failed_customers_total", "2", "shadow")  # a series begins with what it says first
        targets = {"closedloop": f"127.0.0.1:{service.metrics_port}", "other": other}
        address = stack.enter_context(run_prometheus(tmp_path, targets))
        monkeypatch.setenv("CLOSEDLOOP_RELEASE__PROMETHEUS", address)
        monkeypatch.setenv("CLOSEDLOOP_RELEASE__REQUESTS_MIN", "1000000")
        # the traffic of the seconds before would not fill a canary of 5%
        monkeypatch.setenv("CLOSEDLOOP_RELEASE__REQUESTS_A_DAY", "100000")
        monkeypatch.setenv("CLOSEDLOOP_RELEASE__LATENCY_SLACK_MS", "5000")  # the machine may be busy
        started = json.loads(project.run("release", "start", "2", "--json").stdout)
        assert (started["champion"], started["rollout"]["version"]) == ("1", "2")
        assert [step.partition(":")[0] for step in started["steps"]] == ["shadow", "canary_50"], "fitted to the traffic"
        entries = len(releases.read_entries())
        assert "sample: " in project.run("release", "check", status=3).output
        told = json.loads(project.run("release", "check", "--json", status=3).stdout)
        assert (told["rollout"]["version"], told["decision"]["verdict"]) == ("2", "hold")
        monkeypatch.setenv("CLOSEDLOOP_RELEASE__REQUESTS_MIN", "50")

        def says(status):
            with contextlib.suppress(AssertionError):
                return project.run("release", "check", status=status).output
            return None

        known = f"{address}/api/v1/query?query=closedloop_model_failed_customers_total"
        wait_until(lambda: '"other"' in (fetch(known) or ""), "the second service's series in Prometheus")
        assert "advance" in wait_until(lambda: says(0), "advance")
        metrics.count("model_failed_customers_total", "2", "shadow", by=1_000_000)
        found = wait_until(lambda: says(2), "roll back")
        assert "error rate: " in found
        assert load.failures == []
    assert len(releases.read_entries()) == entries
    assert releases.read_state().row.challenger_mode == "shadow"
    monkeypatch.setenv("CLOSEDLOOP_RELEASE__PROMETHEUS", "http://127.0.0.1:1")
    assert "ServiceUnavailable" in project.run("release", "check", status=1).output
