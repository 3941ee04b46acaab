"""How soon a release is taken up: from the write of the deployment row to the first answer of the new version.

    python benchmarks/takeup.py                 12 releases, half of them under the load of 16 connections
    python benchmarks/takeup.py --json FILE     also write every figure

Each version is registered before and new to the service, which therefore finds the row, downloads the model's folder
from the registry, checks it (digest, golden rows, contract), warms it up and swaps it in. The model is the project's
own (`make run` first); store, registry and state are in a folder of the benchmark's own. The slowest of all counts.
Exit status 1 and the name of the first missed target.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parts.models import require_project
from parts.targets import Target, finish, show, show_targets

from closedloop.processes import exit_on_signals, start_process

ROOT, PARTS = Path(__file__).parent.parent, Path(__file__).parent / "parts"
LIMIT_SECONDS = 2
READY_SECONDS = 120
CONNECTIONS = 16


def prepare(project: Path, work: Path) -> None:
    """A project folder with nothing in it yet; the environment says where it keeps what."""
    for entry in ("configs", "params.yaml"):
        (work / entry).symlink_to(project / entry)
    os.environ |= {
        "CLOSEDLOOP_OPERATIONS__URL": f"sqlite:///{work / 'operations.db'}",
        "CLOSEDLOOP_TRACKING__URI": f"sqlite:///{work / 'mlflow.db'}",
        "CLOSEDLOOP_TRACKING__ARTIFACTS": str(work / "artifacts"),
        "CLOSEDLOOP_SERVING__STATE": str(work / "state"),
        "CLOSEDLOOP_SERVING__PORT": str(find_free_port()),
        "CLOSEDLOOP_SERVING__METRICS_PORT": str(find_free_port()),
    }


def find_free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def register(run: Any, folder: Path, versions: int) -> None:
    """The same model as so many versions."""
    from closedloop.bootstrap import build_tracking
    from closedloop.contract import digest_folder

    tracking = build_tracking(run)
    with tracking.start_run("take-up") as run_id:
        tracking.log_files({"contract": folder})
    tags = {"closedloop.folder_sha256": digest_folder(folder)}
    for _ in range(versions):
        tracking.register(f"runs:/{run_id}/contract", run_id, tags)


@contextlib.contextmanager
def serve(work: Path) -> Iterator[None]:
    """The service, once it is ready."""
    command = [str(Path(sys.executable).parent / "closedloop"), "serve"]
    with (work / "service.log").open("wb") as log:
        process = start_process(command, cwd=work, stdout=log, stderr=log)
    try:
        wait_for("/readyz", lambda status, _: status == 200, process)
        yield
    finally:
        process.terminate()
        process.wait(60)


def wait_for(path: str, holds: Any, process: subprocess.Popen[bytes] | None = None) -> float:
    """Seconds until an answer is as it should be."""
    start = time.perf_counter()
    while time.perf_counter() - start < READY_SECONDS:
        if process is not None and process.poll() is not None:
            break
        with contextlib.suppress(OSError, http.client.HTTPException):
            status, answer = ask("GET", path)
            if holds(status, answer):
                return time.perf_counter() - start
        time.sleep(0.005)
    raise SystemExit(f"{path} is not as it should be after {READY_SECONDS} s")


def ask(verb: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ["CLOSEDLOOP_SERVING__PORT"]), timeout=30)
    with contextlib.closing(connection):
        connection.request(verb, path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")


def release(journal: Any, name: str, version: str) -> None:
    """Write the row with its entry, as the release controller does."""
    import datetime as dt

    from closedloop.core.release.entries import Deployment, Entry

    before, head = journal.read_newest(name)
    now = dt.datetime.now(dt.UTC)
    row = Deployment(name, before.revision + 1 if before else 1, version, f"salt-{version}", now)
    journal.append_entry(Entry("promote", "a benchmark", now, "for the benchmark", row), after=head)


def time_releases(journal: Any, name: str, versions: range, row: dict[str, Any]) -> list[float]:
    """Seconds from the committed row to the first answer of each version."""
    body, found = json.dumps({"features": row}).encode(), []
    for version in map(str, versions):
        release(journal, name, version)
        start = time.perf_counter()
        while ask("POST", "/predict", body)[1]["model_version"] != version:
            if time.perf_counter() - start > READY_SECONDS:
                raise SystemExit(f"version {version} does not answer after {READY_SECONDS} s")
            time.sleep(0.005)
        found.append(time.perf_counter() - start)
        print(f"  version {version}: {found[-1]:.2f} s", file=sys.stderr, flush=True)
        time.sleep(0.13 * (int(version) % 5))  # not in step with the service's own looks at the row
    return found


@contextlib.contextmanager
def load(work: Path, row: dict[str, Any]) -> Iterator[None]:
    """Requests on all connections, for the length of the block."""
    bodies = work / "bodies.jsonl"
    bodies.write_text(json.dumps({"features": row}) + "\n", encoding="utf-8")
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", "-d600s", "-s", str(PARTS / "load.lua")]
    command.append(f"http://127.0.0.1:{os.environ['CLOSEDLOOP_SERVING__PORT']}/predict")
    process = start_process(command, stdout=subprocess.DEVNULL, env={**os.environ, "BODIES": str(bodies)})
    try:
        yield
        if process.poll() is not None:
            raise SystemExit("wrk ended before the releases did")
    finally:
        process.kill()
        process.wait()


def measure(project: Path, work: Path, releases: int) -> dict[str, list[float]]:
    """Seconds of each release, by load."""
    from closedloop.bootstrap import build_journal, load_run
    from closedloop.contract import read_contract

    prepare(project, work)
    run = load_run(work / "params.yaml", root=work)
    folder = project / "models/candidate"
    print(f"registering {releases + 1} versions", file=sys.stderr, flush=True)
    register(run, folder, releases + 1)
    name, journal = run.dataset.model_name, build_journal(run)
    run.database.upgrade()
    release(journal, name, "1")
    contract, half = read_contract(folder), releases // 2 + 2
    row = contract.golden_rows[0].features
    with contextlib.closing(run.database), serve(work):
        found = {"idle": time_releases(journal, name, range(2, half), row)}
        with load(work, row):
            found[f"{CONNECTIONS} connections"] = time_releases(journal, name, range(half, releases + 2), row)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--releases", type=int, default=12)
    parser.add_argument("--project", type=Path, default=ROOT, help="a project folder in which `make run` has run")
    arguments = parser.parse_args()
    require_project(parser, arguments.project)
    if shutil.which("wrk") is None:
        parser.error("wrk is not there: install the Debian package of that name")
    from closedloop.config.environment import set_environment

    exit_on_signals()
    set_environment()
    with tempfile.TemporaryDirectory(prefix="takeup-") as folder:
        found = measure(arguments.project, Path(folder), arguments.releases)
    rows = {load: [f"{f(seconds):.2f}" for f in (min, max)] for load, seconds in found.items()}
    show("From the row to the first answer", ("load", "least s", "most s"), rows)
    targets = [Target(f"{load}: seconds", max(seconds), "<=", LIMIT_SECONDS) for load, seconds in found.items()]
    show_targets(targets)
    return finish(arguments, ("releases",), {"seconds": found}, targets)


if __name__ == "__main__":
    sys.exit(main())
