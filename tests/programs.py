"""Real programs for the length of a block, and what they answer."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import yaml

from closedloop.processes import start_process
from tests.http_service import wait_until
from tests.services import find_free_port, require


@contextlib.contextmanager
def run_program(log: Path, *command: str, cwd: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the length of the block."""
    require(shutil.which(command[0]), command[0])
    with log.open("wb") as output:
        process = start_process(command, cwd=cwd, env=os.environ | environment, stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(180)


@contextlib.contextmanager
def run_mlflow_ui(root: Path, log: Path) -> Iterator[str]:
    """Plain `mlflow ui` in a project's folder, whose mlflow.db it has to find by itself; its address."""
    port = find_free_port()
    # stages that ran in this process have set MLFLOW_TRACKING_URI
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    # One worker: the default four take three times as long to start on two cores.
    inherited |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with log.open("wb") as output:
        server = start_process(
            ["mlflow", "ui", "--port", str(port)],
            cwd=root,
            env={**inherited, "MLFLOW_WORKERS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def is_healthy() -> bool:
        assert server.poll() is None, log.read_text(encoding="utf-8")
        return fetch(f"http://127.0.0.1:{port}/health") is not None

    try:
        wait_until(is_healthy, "an answer of mlflow ui")
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # it only reads
        server.wait()


def fetch(address: str) -> str | None:
    try:
        with urllib.request.urlopen(address, timeout=180) as answer:  # noqa: S310 - loopback
            return answer.read().decode()
    except OSError:
        return None


@contextlib.contextmanager
def run_prometheus(
    folder: Path,
    targets: dict[str, str],
    alertmanager: str = "127.0.0.1:1",
    *,
    rules: Path | None = None,
    namespace: str | None = None,
) -> Iterator[str]:
    """The real one; ``targets`` are addresses by job, or by pod of a ``namespace``."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)] if rules else [],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
        "scrape_configs": [
            {
                "job_name": name,
                "static_configs": [
                    {"targets": [target], "labels": {"namespace": namespace, "pod": name} if namespace else {}}
                ],
            }
            for name, target in targets.items()
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    port = find_free_port()
    options = [
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'series'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with run_program(folder / "prometheus.log", "prometheus", *options, cwd=folder):
        wait_until(lambda: fetch(f"http://127.0.0.1:{port}/-/ready"), "readiness of Prometheus")
        yield f"http://127.0.0.1:{port}"
