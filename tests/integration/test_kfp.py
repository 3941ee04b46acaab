"""Kubeflow Pipelines' client against a stub of its REST interface, and the local runner on small pipelines."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from closedloop.adapters.kfp import ClusterRunner, LocalRunner, PipelineFailed
from closedloop.config.settings import RetrainingSettings
from closedloop.errors import ConfigError, ServiceUnavailable
from closedloop.processes import start_process
from tests.production import link_environment

ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "pipelines/retrain.py"
ARGUMENTS = {"model_name": "shop_churn", "trigger_id": "t-1", "params": '{"seed": 7}'}
UPLOADED = re.compile(rb"\r\n\r\n(.*?)\r\n--", re.DOTALL)


class Stub(ThreadingHTTPServer):
    """What the interface /apis/v2beta1 answers, kept in lists; ``states`` are what a run goes through."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: list[tuple[str, str, Any]] = []
        self.experiments: list[dict[str, Any]] = []
        self.pipelines: list[dict[str, Any]] = []
        self.versions: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.recurring: list[dict[str, Any]] = []
        self.states = ["PENDING", "RUNNING", "SUCCEEDED"]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        self.calls.append((method, path, {**query, "body": body}))
        named = json.loads(query["filter"])["predicates"][0]["stringValue"] if query.get("filter") else None

        def find(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [row for row in reversed(rows) if named in (None, row["display_name"])]

        match method, path.strip("/").split("/"):
            case "GET", ["healthz"]:
                return {"multi_user": False}
            case "GET", ["experiments"]:
                return {"experiments": find(self.experiments)}
            case "POST", ["experiments"]:
                return _add(self.experiments, {**body, "experiment_id": "e-1"})
            case "GET", ["pipelines"]:
                return {"pipelines": find(self.pipelines)}
            case "POST", ["pipelines", "upload"]:
                return _add(self.pipelines, {"display_name": query["name"], "pipeline_id": "p-1"})
            case "POST", ["pipelines", "upload_version"]:
                version = {"display_name": query["name"], "pipeline_id": query["pipelineid"]}
                return _add(self.versions, {**version, "pipeline_version_id": f"v-{len(self.versions)}", "yaml": body})
            case "GET", ["pipelines", _, "versions"]:
                return {"pipeline_versions": list(reversed(self.versions))}
            case "GET", ["runs"]:
                return {"runs": find(self.runs)}
            case "POST", ["runs"]:
                return _add(self.runs, {**body, "run_id": f"r-{len(self.runs)}", "state": self.states[0]})
            case "GET", ["runs", run_id]:
                [run] = [row for row in self.runs if row["run_id"] == run_id]
                run["state"] = self.states[min(self.states.index(run["state"]) + 1, len(self.states) - 1)]
                return run
            case "POST", ["recurringruns"]:
                return _add(self.recurring, {**body, "recurring_run_id": "s-1"})
        raise KeyError(path)

    def count(self, method: str, path: str) -> int:
        return sum(call[:2] == (method, path) for call in self.calls)


def _add(rows: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    rows.append(row)
    return row


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Type"].startswith("multipart/"):
            found = UPLOADED.search(body)
            assert found
            self._answer(found[1].decode())
        else:
            self._answer(json.loads(body))

    def _answer(self, body: Any) -> None:
        split = urlsplit(self.path)
        try:
            answer, status = (
                self.server.answer(
                    self.command,
                    split.path.removeprefix("/apis/v2beta1"),
                    {name: values[0] for name, values in parse_qs(split.query).items()},
                    body,
                ),
                200,
            )
        except KeyError:
            answer, status = {"error": "not found"}, 404
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def connect(stub: Stub, **changes: Any) -> ClusterRunner:
    settings = RetrainingSettings(runner="cluster", endpoint=stub.endpoint, **changes)
    return ClusterRunner(PIPELINE, settings, poll_seconds=0.01)


def test_a_run_uploads_the_pipeline_and_its_version_and_waits(stub):
    connect(stub, service_account="retrainer").run("shop_churn-t-1", ARGUMENTS)
    assert [pipeline["display_name"] for pipeline in stub.pipelines] == ["closedloop-retrain"]
    [version] = stub.versions
    assert next(yaml.safe_load_all(version["yaml"]))["pipelineInfo"]["name"] == "closedloop-retrain"
    assert [row["display_name"] for row in stub.experiments] == ["closedloop-retrain"]
    [run] = stub.runs
    assert run["display_name"] == "shop_churn-t-1"
    assert run["experiment_id"] == "e-1"
    assert run["pipeline_version_reference"] == {"pipeline_id": "p-1", "pipeline_version_id": "v-0"}
    assert run["runtime_config"]["parameters"] == ARGUMENTS
    assert run["service_account"] == "retrainer"
    assert stub.count("GET", "/runs/r-0") == 2


def test_what_is_there_is_not_uploaded_again_and_a_change_is_a_new_version(stub):
    first = connect(stub).publish()
    assert connect(stub).publish() == first
    assert (len(stub.pipelines), len(stub.versions)) == (1, 1)
    changed = connect(stub, base_image="registry.example.com/jobs-python:8").publish()
    assert changed == {"pipeline_id": "p-1", "version_id": "v-1"}
    assert len(stub.pipelines) == 1


def test_a_run_that_goes_on_is_waited_for_and_one_that_failed_is_started_again(stub):
    stub.runs.append({"run_id": "r-old", "display_name": "shop_churn-t-1", "state": "RUNNING"})
    connect(stub).run("shop_churn-t-1", ARGUMENTS)
    assert stub.count("POST", "/runs") == 0
    stub.runs[0]["state"] = "FAILED"
    connect(stub).run("shop_churn-t-1", ARGUMENTS)
    assert stub.count("POST", "/runs") == 1


@pytest.mark.parametrize("state", ["FAILED", "CANCELED", "SKIPPED"])
def test_a_run_that_does_not_succeed_has_failed(stub, state):
    stub.states[-1] = state
    with pytest.raises(PipelineFailed, match=f"r-0 .* is {state}"):
        connect(stub).run("shop_churn-t-1", ARGUMENTS)


def test_a_run_that_takes_too_long_has_failed(stub):
    stub.states = ["RUNNING"]
    with pytest.raises(PipelineFailed, match="is RUNNING"):
        connect(stub, timeout_seconds=1).run("shop_churn-t-1", ARGUMENTS)


def test_a_recurring_run_names_its_schedule_and_its_version(stub):
    made = connect(stub).schedule("shop_churn", "0 0 9 1 * *", {"model_name": "shop_churn"})
    assert made == "s-1"
    [recurring] = stub.recurring
    assert recurring["trigger"]["cron_schedule"] == {"cron": "0 0 9 1 * *"}
    assert recurring["pipeline_version_reference"] == {"pipeline_id": "p-1", "pipeline_version_id": "v-0"}
    assert recurring["runtime_config"]["parameters"] == {"model_name": "shop_churn"}
    assert (recurring["max_concurrency"], recurring["no_catchup"], recurring["mode"]) == (1, True, "ENABLE")


def test_an_endpoint_that_is_not_there_is_unavailable(stub):
    stub.pipelines = [{"pipeline_id": "p-1"}]  # a server that answers nonsense
    with pytest.raises(ServiceUnavailable, match=re.escape(stub.endpoint)):
        connect(stub).publish()


def test_a_cluster_needs_an_address():
    with pytest.raises(ValueError, match="needs the address"):
        RetrainingSettings(runner="cluster")


SMALL = """
from kfp import dsl

def first(trigger_id: str) -> str:
    import sys
    print("       first  a stage speaks", file=sys.stderr)
    print('{"run": "noise"}')
    return trigger_id

def second(text: str) -> None:
    assert text != "fails", "said no"

def build_pipeline(settings):
    def place(function, **inputs):
        options = {"base_image": settings.base_image, "packages_to_install": [], "install_kfp_package": False}
        return dsl.component(function, **options)(**inputs)

    @dsl.pipeline(name="small")
    def small(trigger_id: str = "") -> None:
        place(second, text=place(first, trigger_id=trigger_id).output)

    return small
"""


@pytest.fixture
def local(tmp_path: Path) -> LocalRunner:
    (tmp_path / "small.py").write_text(SMALL, encoding="utf-8")
    return LocalRunner(tmp_path / "small.py", tmp_path / "state", RetrainingSettings())


@pytest.mark.thorough
def test_local_runs_tell_what_stages_tell_and_log_the_rest(local, tmp_path, capfd):
    local.run("small", {"trigger_id": "t-1"})
    told = capfd.readouterr()
    assert told.err == "       first  a stage speaks\n"
    assert told.out == ""
    log = (tmp_path / "state/log.txt").read_text(encoding="utf-8")
    assert "a stage speaks" in log
    assert '{"run": "noise"}' in log


@pytest.mark.thorough
def test_a_component_that_fails_stops_the_pipeline_by_name(local, tmp_path):
    with pytest.raises(PipelineFailed, match=r"'second'.*AssertionError: said no \(.*log\.txt\)"):
        local.run("small", {"trigger_id": "fails"})
    assert "said no" in (tmp_path / "state/log.txt").read_text(encoding="utf-8")


RUN = """
import sys
from pathlib import Path
from closedloop.adapters.kfp import LocalRunner
from closedloop.config.settings import RetrainingSettings
LocalRunner(Path(sys.argv[1]), Path(sys.argv[2]), RetrainingSettings()).run("small", {"trigger_id": sys.argv[3]})
"""


@pytest.mark.thorough
@pytest.mark.parametrize(("given", "status", "said"), [("t-1", 0, "a stage speaks"), ("fails", 1, "said no")])
def test_folder_and_environment_may_have_any_name(tmp_path, given, status, said):
    """KFP hands Python's path and its arguments to a shell."""
    root = tmp_path / "a b%2Fc'$(touch ran)"
    root.mkdir()
    link_environment(root, stamps=False)
    (root / "small.py").write_text(SMALL, encoding="utf-8")
    command = [root / ".venv/bin/python", "-c", RUN, "small.py", "state", given]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (ran.returncode, said in ran.stderr) == (status, True), ran.stderr
    assert list(root.rglob("ran")) == []


HOLD = """
import sys, time
from pathlib import Path
from closedloop.adapters.kfp import LocalRunner
from closedloop.config.settings import RetrainingSettings
with LocalRunner(Path("none"), Path(sys.argv[1]), RetrainingSettings()).hold() as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


@pytest.mark.thorough
def test_a_model_is_held_until_its_process_dies(local, tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "state")]
    with start_process(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "True\n"
        with local.hold() as mine:
            assert not mine
        process.kill()
        process.wait()
        with local.hold() as mine:
            assert mine


def test_a_project_without_the_pipeline_says_so(tmp_path):
    with pytest.raises(ConfigError, match="there is no such pipeline"):
        LocalRunner(tmp_path / "none.py", tmp_path, RetrainingSettings()).run("none", {})
