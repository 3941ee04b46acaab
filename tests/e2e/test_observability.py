"""A real Prometheus scrapes the real service and exporter: every panel has data, and alerts reach a Slack channel."""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.util
import itertools
import json
import math
import socket
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from tests.http_service import Load, run_service, wait_until
from tests.loops import NAME, fill
from tests.model_folders import write_model_folder
from tests.programs import fetch, run_program, run_prometheus
from tests.services import find_free_port, run_postgres

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s/base/observability"
OF_MODEL = f'{{model_name="{NAME}"}}'


@contextlib.contextmanager
def run_exporter(project: Path, url: str) -> Iterator[str]:
    """`closedloop exporter` on a free port; gives the address of its page."""
    port = str(find_free_port())
    command = (sys.executable, "-m", "closedloop.cli.main", "exporter")
    settings = {"CLOSEDLOOP_EXPORTER__PORT": port, "CLOSEDLOOP_OPERATIONS__URL": url}
    with run_program(project / "exporter.log", *command, cwd=project, **settings):
        address = f"http://127.0.0.1:{port}/metrics"
        wait_until(lambda: fetch(address), "the exporter's page")
        yield address


class Slack(BaseHTTPRequestHandler):
    """Takes messages as Slack does."""

    messages: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.messages.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def run_slack() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slack)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def run_alertmanager(folder: Path, slack: str) -> Iterator[str]:
    """The real one with the real routes; only the waits are shorter, and the secret lies elsewhere."""
    (folder / "slack-url").write_text(slack, encoding="utf-8")
    config = yaml.safe_load((FOLDER / "alertmanager.yaml").read_text(encoding="utf-8"))
    config["global"]["slack_api_url_file"] = str(folder / "slack-url")
    config["route"] |= {"group_wait": "1s", "group_interval": "1s"}
    for route in config["route"]["routes"]:
        route.pop("group_wait", None)
    (folder / "alertmanager.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    port = find_free_port()
    options = [
        f"--config.file={folder / 'alertmanager.yaml'}",
        f"--storage.path={folder / 'alerts'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with run_program(folder / "alertmanager.log", "prometheus-alertmanager", *options, cwd=folder):
        wait_until(lambda: fetch(f"http://127.0.0.1:{port}/-/ready"), "readiness of the alertmanager")
        yield f"127.0.0.1:{port}"


def query(prometheus: str, expression: str) -> list[float]:
    """What an expression gives now, without what is no number; an invalid one is an error."""
    ready = expression.replace("$__rate_interval", "1m").replace("$model", NAME)
    address = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': ready})}"
    try:
        with urllib.request.urlopen(address, timeout=20) as answer:  # noqa: S310 - loopback
            found = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{expression}: {error.read().decode()}") from error
    return [value for one in found if not math.isnan(value := float(one["value"][1]))]


def list_queries() -> dict[str, str]:
    """{dashboard / panel / legend: expression}."""
    return {
        f"{path.stem} / {panel['title']} / {target['legendFormat']}": target["expr"]
        for path in sorted(FOLDER.glob("dashboards/*.json"))
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]
        for target in panel.get("targets", ())
    }


def test_the_dashboards_are_what_their_code_says():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "k8s/dashboards/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    kept = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("dashboards/*")}
    assert generate.render() == kept, "run python k8s/dashboards/generate.py"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("dashboards/*.json")), ids=lambda path: path.stem)
def test_panels_fill_their_rows_and_cover_each_other_nowhere(path):
    """What can be seen of the layout without a Grafana server."""
    taken = {}
    for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
        place = panel["gridPos"]
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        ):
            assert taken.setdefault(cell, panel["title"]) == panel["title"]
    columns, rows = ({cell[axis] for cell in taken} for axis in (0, 1))
    assert len(taken) == len(columns) * len(rows), "a row has a hole"
    assert columns == set(range(24))


@pytest.mark.thorough
def test_every_panel_has_data_and_alerts_reach_slack(project, tmp_path, monkeypatch):
    Slack.messages.clear()
    write_model_folder(tmp_path / "model", model_name=NAME)
    url = f"sqlite:///{tmp_path / 'loop.db'}"
    fill(url, dt.datetime.now(dt.UTC))
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(run_service(project.root, "--model", str(tmp_path / "model")))
        exporter = urllib.parse.urlsplit(stack.enter_context(run_exporter(project.root, url))).netloc
        alertmanager = stack.enter_context(run_alertmanager(tmp_path, stack.enter_context(run_slack())))
        targets = {"closedloop-service": f"127.0.0.1:{service.metrics_port}", "closedloop-exporter": exporter}
        prometheus = stack.enter_context(run_prometheus(tmp_path, targets, alertmanager, rules=FOLDER / "rules.yaml"))
        load = stack.enter_context(Load(service, clients=1))
        load.wait_for(50)
        for answer in load.answers[:20]:
            assert service.call("POST", "/outcomes", {"prediction_id": answer["prediction_id"], "outcome": 1})[0] == 202
        missing = dict(list_queries())

        def all_have_data():
            for place in [place for place, one in missing.items() if query(prometheus, one)]:
                del missing[place]
            return not missing

        assert len(missing) > 40
        with contextlib.suppress(AssertionError):
            wait_until(all_have_data, "data")
        assert missing == {}
        monkeypatch.setenv("CLOSEDLOOP_OPERATIONS__URL", url)
        here = f"http://127.0.0.1:{service.port}"
        version = service.call("GET", "/health")[1]["model_version"]
        shown = json.loads(project.run("status", "--json", "--service", here).output)
        assert (shown["service"]["model_version"], shown["row"]["champion_version"]) == (version, "3")
        assert f"answers with version {version}" in project.run("status", "--service", here).output
        groups = json.loads(fetch(f"{prometheus}/api/v1/rules"))["data"]["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
        wait_until(lambda: len(Slack.messages) >= 2, "two messages in Slack")
        loud = {message["attachments"][0]["title"]: message["channel"] for message in Slack.messages}
        assert loud == {
            "FIRING: ModelSuspect (warning)": "#closedloop",
            "FIRING: RetrainingFailed (warning)": "#closedloop",
        }, "and the drift that the monitor's alert is about is inhibited"
        texts = [message["attachments"][0]["text"] for message in Slack.messages]
        assert any("docs/runbook.md#retrainingfailed" in text for text in texts)


@pytest.mark.thorough
def test_the_exporter_says_that_the_store_is_away_and_comes_back(project, tmp_path):
    with run_postgres(tmp_path) as postgres:
        url = postgres.create_database()
        fill(url, dt.datetime.now(dt.UTC))
        with run_exporter(project.root, url) as page:
            shown = fetch(page)
            assert f"closedloop_operations_store_up{OF_MODEL} 1.0" in shown
            assert f"closedloop_model_accuracy_rolling{OF_MODEL} {112 / 150}" in shown
            assert f"closedloop_label_maturity_ratio{OF_MODEL} 0.75" in shown
            assert "\nlabel_maturity_ratio 0.75" in shown
            release = page.replace("/metrics", "/release?version=4")
            assert json.loads(fetch(release) or "{}")["stage"] == "canary_5"
            postgres.stop("immediate")
            with pytest.raises(urllib.error.HTTPError, match="503"):
                urllib.request.urlopen(release, timeout=20)  # noqa: S310 - loopback
            gone = fetch(page)
            assert f"closedloop_operations_store_up{OF_MODEL} 0.0" in gone
            assert {line.split("{")[0].split()[0] for line in gone.splitlines() if not line.startswith("#")} == {
                "closedloop_operations_store_up",
                "operations_store_up",
            }
            postgres.start()
            assert wait_until(
                lambda: f"\nclosedloop_operations_store_up{OF_MODEL} 1.0" in fetch(page), "the store's return"
            )
        assert "s3cret" not in (project.root / "exporter.log").read_text(encoding="utf-8")


@pytest.mark.thorough
def test_wrong_calls_say_what_is_allowed(project, monkeypatch):
    assert "--as-of 'soon': a date as 2025-01-31" in project.run("exporter", "--as-of", "soon", status=1).output
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("CLOSEDLOOP_EXPORTER__PORT", str(taken.getsockname()[1]))
        assert "Address already in use" in project.run("exporter", status=1).output
    told = project.run("monitor", "--as-of", "2024-01-01", status=1).output
    assert "no version of shop_churn is released" in told
