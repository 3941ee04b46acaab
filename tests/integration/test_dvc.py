"""DVC where a machine is not as it expects."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from closedloop.adapters.dvc import reproduce
from closedloop.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_a_folder_without_git_is_told_both_ways_out_and_each_of_them_works(tmp_path, monkeypatch):
    (tmp_path / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", tmp_path / ".dvc")
    (tmp_path / "dvc.yaml").write_text("stages: {one: {cmd: echo 1 > one, outs: [one]}}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        reproduce(Path())
    assert str(tmp_path) in str(refused.value)
    for number, remedy in enumerate(("git init", "dvc config --local core.no_scm true")):
        assert f"'{remedy}'" in str(refused.value)
        copied = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-{number}"))
        monkeypatch.chdir(copied)
        subprocess.run(remedy.split(), check=True)
        assert reproduce(Path()) == ["one"]
