"""What a replay does to the folder that it is started in."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from closedloop.errors import ConfigError
from closedloop.replay.replay import prepare_folder
from tests.conftest import SOURCE_ROOT


@pytest.mark.parametrize("name", ["{elsewhere}", "..", "../..", "../../elsewhere", "no_such"])
def test_a_path_in_place_of_a_data_sets_name_deletes_nothing(tmp_path, name):
    root, elsewhere = tmp_path / "project", tmp_path / "project/elsewhere"
    shutil.copytree(SOURCE_ROOT / "configs", root / "configs")
    kept = [elsewhere / "data.csv", root / "workspaces/loop/shop/loop.html", root / "workspaces/mine/dvc.lock"]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("mine", encoding="utf-8")
    plan = SimpleNamespace(days=["2024-01-01"], horizon_days=None)
    with pytest.raises(ConfigError, match="dataset"):
        prepare_folder(root, name.format(elsewhere=elsewhere), None, plan)
    assert [path.read_text(encoding="utf-8") for path in kept] == ["mine"] * 3
