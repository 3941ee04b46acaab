"""The step that the status names works where it is named, and is not named again after it was done."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import Project
from tests.e2e.test_monitoring import log_predictions, read_champion
from tests.http_service import HttpService
from tests.model_folders import write_model_folder
from tests.services import find_free_port

DAY = dt.timedelta(days=1)
SNAPSHOT = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)


def read_status(project: Project, *words: str) -> dict:
    return json.loads(project.run("status", "--json", *words).output)


def run(project: Project, command: str, *, status: int = 0) -> str:
    """A command as it is offered, in a process of its own."""
    program, *words = shlex.split(command)
    assert program == "closedloop"
    called = [sys.executable, "-m", "closedloop.cli.main", *words]
    # a demo's service answers the demo alone, and asks it for no token
    guarded = os.environ | {"CLOSEDLOOP_SERVING__TOKENS": '{"a-token-of-the-service": ["predict"]}'}
    ended = subprocess.run(
        called, cwd=project.root, env=guarded, capture_output=True, text=True, check=False, timeout=600
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@contextlib.contextmanager
def serve(project: Project, *words: str, port: int | None = None) -> Iterator[HttpService]:
    service = HttpService(project.root, {}, words, port=port or find_free_port())
    try:
        service.start()
        yield service
    finally:
        service.stop()


def follow(project: Project, *words: str) -> list[str]:
    """Run what is offered until nothing is; no command is offered twice."""
    done: list[str] = []
    while command := read_status(project, *words)["next_command"]:
        assert command not in done, f"{command} is offered again"
        run(project, command)
        done.append(command)
    return done


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_each_step_that_is_offered_works_and_is_not_offered_again(shop_copy: Project) -> None:
    before = read_status(shop_copy, "--service", "http://127.0.0.1:9")
    assert (before["next_step"], before["next_command"]) == ("start the service", "closedloop serve")
    words = before["next_command"].split()[2:]
    with serve(shop_copy, *words):
        assert (
            read_status(shop_copy)["service"]["model_version"] == "1"
        )  # found where it was started, and not on port 3000
        assert follow(shop_copy) == ["closedloop demo"]
        seen = read_status(shop_copy)
        assert seen["next_step"] == "nothing is due"
        assert (seen["check"]["as_of"][:10], seen["check"]["predictions"]) == ("2024-01-02", 2_000)
        assert (shop_copy.root / "state/demo/shop_churn/service.log").is_file()
        rows = pd.read_parquet(shop_copy.root / "data/features/2024-01-01.parquet").head(800)
        log_predictions(shop_copy, rows, SNAPSHOT + 3 * DAY / 2, read_champion(shop_copy))
        later = "--as-of", "2024-02-01"
        assert follow(shop_copy, *later) == [f"closedloop {one} --as-of 2024-02-01" for one in ("monitor", "outcomes")]
    assert read_status(shop_copy)["next_command"] == "closedloop serve"


@pytest.mark.thorough
def test_a_version_that_was_not_released_is_offered_for_it(shop_copy: Project) -> None:
    (shop_copy.root / "state/operations.db").unlink()
    command = read_status(shop_copy)["next_command"]
    assert command == "closedloop release promote 1"
    run(shop_copy, command)
    assert read_status(shop_copy)["row"]["champion_version"] == "1"
    (entry,) = json.loads(shop_copy.run("release", "history", "--json").output)
    assert (entry["action"], entry["row"]["champion_version"]) == ("promote", "1")
    found = {one["name"]: one["well"] for one in json.loads(shop_copy.run("doctor", "--json").output)}
    assert found["operations store"]
    told = shop_copy.run("release", "check", "--json", status=3).stdout
    assert json.loads(told) == {"rollout": None, "decision": None}
    nothing = shop_copy.run("release", "check", status=3).output
    assert nothing.endswith("no version of shop_churn is being released: there is nothing to judge\n")


def test_before_anything_ran_the_status_says_how_to_begin(project: Project) -> None:
    shown = project.run("status").output
    assert "Next: train a first model:\n  closedloop run\n" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert not (project.root / "state").exists()


@pytest.mark.thorough
def test_a_run_that_a_gate_stopped_is_told(shop_copy: Project) -> None:
    (shop_copy.root / "state/operations.db").unlink()
    (shop_copy.root / "metrics/registration.json").unlink()
    shop_copy.run("evaluate", "--threshold", "0.999", status=2)
    found = read_status(shop_copy)
    told = "the last run was stopped by the gate accuracy (reports/model_card.html): correct data or parameters, then"
    assert (found["next_step"], found["next_command"]) == (told, "closedloop run")


@pytest.mark.thorough
def test_another_data_sets_service_is_not_taken_for_ours(shop_copy, make_project, tmp_path, monkeypatch) -> None:
    other = make_project(tmp_path / "other")
    other.change_params({"dataset": "telco"})
    write_model_folder(tmp_path / "model", model_name="telco_churn")
    port = find_ports_in_a_row(3)
    with serve(other, "--model", str(tmp_path / "model"), port=port):
        monkeypatch.setenv("CLOSEDLOOP_SERVING__PORT", str(port))
        found = read_status(shop_copy)
        assert found["service"]["model_name"] == "telco_churn"
        command = f"closedloop serve --port {port + 1} --metrics-port {port + 2}"
        assert found["next_command"] == command
        with serve(shop_copy, *shlex.split(command)[2:], port=port + 1):
            assert list(read_status(shop_copy)["service"].values())[:2] == ["1", "shop_churn"]
            assert read_status(shop_copy)["next_command"] == "closedloop demo"


def find_ports_in_a_row(count: int) -> int:
    """The first of so many free ports."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                for more in range(1, count):
                    stack.enter_context(socket.create_server(("127.0.0.1", first + more)))
                return int(first)


@pytest.mark.thorough
def test_the_digest_that_a_service_names_is_the_registered_one(shop_copy: Project) -> None:
    with serve(shop_copy) as service:
        assert service.call("GET", "/health")[1]["folder_sha256"] == read_status(shop_copy)["service"]["folder_sha256"]
        registration = json.loads(Path(shop_copy.root / "metrics/registration.json").read_text(encoding="utf-8"))
        assert read_status(shop_copy)["service"]["folder_sha256"] == registration["folder_sha256"]
