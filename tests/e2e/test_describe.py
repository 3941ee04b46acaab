"""A config that `closedloop describe` wrote goes through the whole graph, as it stands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_your_data import FAST, add_run_files
from tests.unit.tabular.test_describe import write_german_log, write_german_table, write_parquet

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def project(tmp_path_factory, make_project):
    made = make_project(tmp_path_factory.mktemp("strange") / "my project")
    add_run_files(made.root)
    made.change_params(FAST)
    write_german_table(made.root / "Kündigungen 2024.csv", 1500)
    write_german_log(made.root / "bestellungen.csv", 500)
    write_parquet(made.root / "members.parquet", 1000)
    return made


def call(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "closedloop"
    return subprocess.run([program, *arguments], cwd=root, capture_output=True, text=True)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Kündigungen 2024.csv", "kundigungen_2024"),
        ("bestellungen.csv", "bestellungen"),
        ("members.parquet", "members"),
    ],
)
def test_a_described_file_trains_or_a_gate_says_no(project, file, name):
    described = call(project.root, "describe", file, "--json")
    assert described.returncode == 0, described.stderr
    told = json.loads(described.stdout)
    assert (told["name"], told["config"]) == (name, f"configs/datasets/{name}.yaml")
    assert f"closedloop run --dataset {name}" in told["next_command"]
    assert all(note[:30] in described.stderr for note in told["notes"])
    again = call(project.root, "describe", file)
    assert again.returncode == 1
    assert "--force" in again.stderr
    ran = call(project.root, "run", "--dataset", name, "--json")
    assert ran.returncode in (0, 2), ran.stdout + ran.stderr
    if ran.returncode == 0:
        made = json.loads(ran.stdout)
        assert (made["ran"][-1], made["registration"]["version"]) == ("package", 1)
        again = json.loads(call(project.root, "--dataset", name, "run", "--json").stdout)
        assert (again["folder"], again["ran"]) == (f"workspaces/{name}", [])
    else:
        assert ran.stdout == ""
    assert (project.root / "workspaces" / name / "reports/model_card.html").is_file()
    if ran.returncode == 0 and name != "bestellungen":  # customers of a log are scored by their features
        scored = call(project.root, "--dataset", name, "score", "--input", file, "--output", "scores.csv")
        assert scored.returncode == 0, scored.stderr
        (project.root / "scores.csv").unlink()
