"""The wheel in fresh environments with the extras of a level: what docs/levels.md says of it runs there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.tabular.test_describe import write_german_table

pytestmark = [pytest.mark.thorough, pytest.mark.long]
ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).parent / "uv"
LEVELS = {1: "track", 2: "track,versions", 3: "track,versions,gates"}


def find_index() -> dict[str, str]:
    """Tell uv the index that pip is told to use, since it does not read pip's configuration; nothing where none is."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    told = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    index = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("PIP_INDEX_URL") or told
    return {"UV_DEFAULT_INDEX": index} if index else {}


def call(*command: str | Path, folder: Path, bin_: Path | None = None) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CLOSEDLOOP_", "VIRTUAL_ENV"))}
    path = os.pathsep.join([str(bin_), "/usr/bin", "/bin"]) if bin_ else os.environ["PATH"]
    environment = {**kept, **find_index(), "PATH": path, "UV_SYSTEM_CERTS": "true"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    built = call(UV, "build", "--quiet", "--out-dir", folder, ROOT, folder=ROOT)
    assert built.returncode == 0, built.stderr
    assert len(list(folder.glob("*.tar.gz"))) == 1
    return next(folder.glob("*.whl"))


def install(wheel: Path, folder: Path, extras: str) -> Path:
    """A fresh environment with the wheel and its extras, in the versions of the lock; returns its ``bin``."""
    assert call(UV, "venv", "--quiet", "--python", sys.executable, folder, folder=folder.parent).returncode == 0
    wanted = [f"closedloop[{extras}] @ {wheel.as_uri()}", "--constraint", ROOT / "requirements.lock"]
    ran = call(UV, "pip", "install", "--quiet", "--python", folder / "bin/python", *wanted, folder=folder.parent)
    assert ran.returncode == 0, ran.stderr
    return folder / "bin"


def lay_out(folder: Path, bin_: Path) -> Path:
    project = folder / "my project"
    assert call(bin_ / "closedloop", "init", project, folder=folder, bin_=bin_).returncode == 0
    write_german_table(project / "members.csv", 1500)
    described = call("closedloop", "describe", "members.csv", folder=project, bin_=bin_)
    assert described.returncode == 0, described.stderr
    return project


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("level", [1, 2])
def test_a_table_is_trained_and_tracked(level, wheel, tmp_path):
    bin_ = install(wheel, tmp_path / "environment", LEVELS[level])
    project = lay_out(tmp_path, bin_)
    ran = call("closedloop", "run", "--dataset", "members", "--until", "train", folder=project, bin_=bin_)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Ended after train" in ran.stdout
    assert "nothing goes online" in " ".join(ran.stderr.split())
    assert (project / "workspaces/members/metrics/train_metrics.json").is_file()
    assert (project / "mlflow.db").is_file()
    again = call("closedloop", "run", "--dataset", "members", "--until", "train", folder=project, bin_=bin_)
    assert ("Nothing changed" in again.stdout) == (level == 2)
    events = call("closedloop", "run", "--as-of", "2024-01-01", folder=project, bin_=bin_)
    assert events.returncode == 1
    assert "install closedloop[features]" in events.stdout + events.stderr
    serving = call("closedloop", "exporter", folder=project, bin_=bin_)
    assert serving.returncode == 1
    assert "install closedloop[" in serving.stderr


@pytest.mark.timeout(1800)
def test_gates_judge_a_table_and_the_registry_takes_it(wheel, tmp_path):
    bin_ = install(wheel, tmp_path / "environment", LEVELS[3])
    project = lay_out(tmp_path, bin_)
    ran = call("closedloop", "run", "--dataset", "members", folder=project, bin_=bin_)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "members_churn version 1, alias champion" in ran.stdout
    assert "serve  # install closedloop[serve] first" in ran.stdout
    shown = call("closedloop", "--dataset", "members", "status", "--json", folder=project, bin_=bin_)
    assert (shown.returncode, json.loads(shown.stdout)["next_command"]) == (0, None)
    rows = ["--input", "members.csv", "--output", "scores.csv"]
    scored = call("closedloop", "--dataset", "members", "score", *rows, folder=project, bin_=bin_)
    assert scored.returncode == 0, scored.stderr
    demo = call("closedloop", "--dataset", "members", "demo", folder=project, bin_=bin_)
    assert (demo.returncode, demo.stdout) == (1, "")
    assert "install closedloop[serve,features]" in demo.stderr
    assert "Nothing changed" in call("closedloop", "run", "--dataset", "members", folder=project, bin_=bin_).stdout
