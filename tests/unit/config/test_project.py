"""`closedloop init` lays a project out that the workflow accepts, and overwrites nothing."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from closedloop.bootstrap import load_run
from closedloop.cli.main import app
from closedloop.config.project import init_project
from closedloop.config.yaml import read_yaml
from closedloop.errors import ConfigError


def test_a_project_can_be_loaded_and_its_graph_needs_no_sources(tmp_path):
    files = init_project(tmp_path / "my project")
    assert all(file.is_file() for file in files)
    assert load_run(tmp_path / "my project/params.yaml", root=tmp_path / "my project").dataset.name == "shop"
    stages = read_yaml(tmp_path / "my project/dvc.yaml")["stages"]
    assert not [dep for stage in stages.values() for dep in stage["deps"] if dep.startswith("src/")]


def test_a_file_that_is_there_is_kept_and_nothing_is_written(tmp_path):
    (tmp_path / "params.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"params\.yaml is there already"):
        init_project(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
    assert (tmp_path / "params.yaml").read_text(encoding="utf-8") == "mine"


def test_what_to_do_next_can_be_copied_where_the_folder_has_a_space(tmp_path):
    said = CliRunner().invoke(app, ["init", str(tmp_path / "my project")]).output
    assert f"Next: cd '{tmp_path}/my project', git init, closedloop describe FILE" in said
