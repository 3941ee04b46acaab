"""Which commit a model comes from, and whether that commit alone leads back to what was run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from closedloop.adapters.git import read_commit


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, in which one stands."""
    for name in ("configs/datasets/shop.yaml", "src/code.py", "params.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one: 1\n", encoding="utf-8")
    (tmp_path / ".gitignore").write_text("__pycache__/\n", encoding="utf-8")
    (tmp_path / "dvc.lock").write_text("", encoding="utf-8")
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    for command in (("init", "-q"), ("add", "-A"), (*identity, "commit", "-qm", "one")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLOSEDLOOP_GIT_COMMIT", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "dirty"),
    [
        ("params.yaml", True),
        ("configs/datasets/mine.yaml", True),
        ("src/new.py", True),
        ("feature_repo/feature_store.yaml", True),
        ("dvc.lock", False),
        ("notes.txt", False),
        ("src/__pycache__/code.pyc", False),
    ],
)
def test_what_a_run_reads_and_no_commit_holds_is_told(clone: Path, name: str, dirty: bool) -> None:
    assert read_commit()[1] is False
    (clone / name).parent.mkdir(parents=True, exist_ok=True)
    (clone / name).write_text("two: 2\n", encoding="utf-8")
    assert read_commit()[1] is dirty


def test_a_workspace_sees_the_configs_that_it_links(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = clone / "workspaces/mine"
    workspace.mkdir(parents=True)
    (workspace / "configs").symlink_to("../../configs")
    monkeypatch.chdir(workspace)
    assert read_commit()[1] is False
    (clone / "configs/datasets/mine.yaml").write_text("name: mine\n", encoding="utf-8")
    assert read_commit()[1] is True
