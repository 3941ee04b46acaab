"""What a process makes of the environment that it is started in, tried in processes of their own."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

CLIENTS = {
    "status": """
from closedloop.adapters.service import read_health
assert read_health({address!r}).model_version == '7'
""",
    "metrics reader": """
from closedloop.adapters.prometheus import ErrorCounts
assert ErrorCounts("", {address!r} + "/metrics").read_totals() == {{"7/champion": 2.0}}""",
    "MLflow's client": "import requests; assert requests.get({address!r} + '/health').status_code == 200",
    "httpx": "import httpx; assert httpx.get({address!r} + '/health').status_code == 200",
}
DEAD = "http://127.0.0.1:1"


class Service(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        pages = {
            "/health": b'{"model_version": "7"}',
            "/metrics": b"# TYPE closedloop_model_failed_customers_total counter\n"
            b'closedloop_model_failed_customers_total{model_version="7",variant="champion"} 2\n',
        }
        self.send_response(200)
        self.end_headers()
        self.wfile.write(pages[self.path])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    """A service on the loopback interface."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run(code: str, *, prepare: bool = True, **given: str) -> subprocess.CompletedProcess[str]:
    first = "from closedloop.config.environment import set_environment; set_environment()\n" if prepare else ""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "ORT_DISABLE_TELEMETRY"):
        kept.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", first + code], env=kept | given, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("given", [{"HTTP_PROXY": DEAD}, {"http_proxy": DEAD, "no_proxy": "intranet.example"}])
def test_loopback_is_reached_past_a_proxy(address, client, given):
    code = CLIENTS[client].format(address=address)
    given = {name.lower(): value for name, value in given.items()} | given  # urllib reads some in small letters only
    assert run(code, prepare=False, **given).returncode != 0
    ran = run(code, **given)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("given", "spared"),
    [
        ({}, None),
        ({"no_proxy": "a.example"}, "a.example"),
        ({"https_proxy": DEAD, "no_proxy": "*"}, "*"),
        ({"https_proxy": DEAD, "NO_PROXY": "a.example, localhost"}, "a.example,localhost,127.0.0.1,::1,0.0.0.0"),
        ({"ALL_PROXY": DEAD}, "127.0.0.1,localhost,::1,0.0.0.0"),
    ],
)
def test_what_goes_past_the_proxy_already_still_does(given, spared):
    assert run("import os; print(os.environ.get('no_proxy'))", **given).stdout.strip() == str(spared)


def test_a_run_that_another_program_left_open_and_a_hooks_repository_are_not_gone_on_with():
    left = {"MLFLOW_RUN_ID": "a" * 32, "MLFLOW_EXPERIMENT_ID": "7", "MLFLOW_EXPERIMENT_NAME": "x"}
    left |= {"GIT_DIR": ".git", "GIT_WORK_TREE": "/elsewhere", "GIT_INDEX_FILE": ".git/index"}
    code = f"import os; print(sorted(set(os.environ) & {set(left)}))"
    assert run(code, **left).stdout.strip() == "[]"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without a name")
@pytest.mark.parametrize(("given", "name"), [({}, "uid-54321"), ({"LOGNAME": "anna"}, "anna")])
def test_a_user_without_a_name_has_one_for_tools_that_ask(given, name):
    become = "import getpass, os, pwd; from closedloop.config.environment import set_environment; os.setuid(54321)\n"
    asked = "print(getpass.getuser())"
    assert (run(become + asked, prepare=False, **given).returncode != 0) == (not given)
    assert run(f"{become}set_environment(); {asked}", prepare=False, **given).stdout.strip() == name


@pytest.mark.parametrize("earlier", [False, True])
def test_programs_are_those_of_its_own_environment_whether_or_not_it_is_activated(tmp_path, earlier):
    other = tmp_path / "closedloop"
    other.write_text("#!/bin/sh\n", encoding="utf-8")
    other.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin" if earlier else "/usr/bin:/bin"
    code = (
        "import shutil; from closedloop.config.environment import set_environment; set_environment();"
        " print(*(shutil.which(name) for name in ('closedloop', 'dvc', 'mlflow')), sep='\\n')"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    )
    own = Path(sys.executable).parent
    assert found.stdout.splitlines() == [str(own / name) for name in ("closedloop", "dvc", "mlflow")]


@pytest.mark.parametrize("theirs", ["nothing", "dvc"])
def test_other_programs_are_those_that_the_user_puts_first(tmp_path, theirs):
    """The environment has a kubectl of its own too, and a user's cluster may need theirs."""
    front, behind = tmp_path / "front", tmp_path / "behind"
    for program in (front / "kubectl", behind / theirs):
        program.parent.mkdir()
        program.write_text("#!/bin/sh\n", encoding="utf-8")
        program.chmod(0o755)
    code = (
        "import shutil; from closedloop.config.environment import set_environment;"
        " set_environment(); set_environment(); print(*(shutil.which(name) for name in ('kubectl', 'dvc')), sep='\\n')"
    )
    environment = {**os.environ, "PATH": f"{front}:{behind}:/usr/bin:/bin"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [str(front / "kubectl"), str(Path(sys.executable).parent / "dvc")]


def test_onnx_runtime_keeps_no_record_of_its_use(tmp_path: Path) -> None:
    """As it is imported it would write the machine's id and what it is to send below the user's folder."""
    ran = run("import onnxruntime", HOME=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert list(tmp_path.rglob("*")) == []
