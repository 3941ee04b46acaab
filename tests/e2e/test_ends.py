"""What a command has started ends with it: by a signal to end, and where the command itself is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.http_service import wait_until
from tests.production import create_repository
from tests.services import require

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc"),
]

ROOT = Path(__file__).parents[2]
MARK = "CLOSEDLOOP_MARK_OF_A_TEST"  # whatever a command starts inherits it
END_SECONDS = 180  # an agent drains its spool first


def find_marked(mark: str) -> dict[int, str]:
    """The commands of all running processes with this mark, by their ids."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def start_and_end(command: list[str], folder: Path, log: Path, begun: str, number: int) -> None:
    """Start a command, and send it a signal once a process whose command has the word ``begun`` runs beside it.

    SIGINT and SIGHUP go to all of its process group, as a terminal sends them.
    """
    mark = uuid.uuid4().hex
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CLOSEDLOOP_", "MLFLOW_"))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment | {MARK: mark}, stdout=output, stderr=output, start_new_session=True
        )
    try:

        def has_begun() -> bool:
            assert process.poll() is None, log.read_text(encoding="utf-8", errors="replace")
            return any(begun in words for pid, words in find_marked(mark).items() if pid != process.pid)

        wait_until(has_begun, f"a process with {begun}")
        (os.killpg if number in (signal.SIGINT, signal.SIGHUP) else os.kill)(process.pid, number)
        assert process.wait(END_SECONDS) != 0
        wait_until(lambda: not find_marked(mark), "the end of all of its processes", seconds=END_SECONDS)
    finally:
        for pid in find_marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


NUMBERS = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize("number", NUMBERS[:2], ids=lambda one: one.name)
def test_a_soak_leaves_nothing_behind(tmp_path, number):
    command = [sys.executable, "-m", "tests.soak.serving", "10"]
    start_and_end(command, ROOT, tmp_path / "log", "serve-agent", number)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda one: one.name)
def test_the_hostile_soak_leaves_nothing_behind(tmp_path, number):
    """As soon as the first of its clients runs, and the others are not started yet."""
    command = [sys.executable, "-m", "tests.soak.hostile", "10", "--busy"]
    start_and_end(command, ROOT, tmp_path / "log", "attack", number)


@pytest.mark.parametrize("number", NUMBERS[:2], ids=lambda one: one.name)
def test_a_benchmark_leaves_nothing_behind(small_shop, tmp_path, number):
    require(shutil.which("wrk"), "wrk")
    command = [sys.executable, "benchmarks/serving.py", f"--project={small_shop.root}", "--only", "service"]
    start_and_end(command, ROOT, tmp_path / "log", "serve-agent", number)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda one: one.name)
def test_the_loop_under_make_leaves_nothing_behind(tmp_path, number):
    """While the components of its first training run."""
    made = create_repository(tmp_path / "project")
    start_and_end(["make", "loop"], made.root, tmp_path / "log", "forkserver", number)
