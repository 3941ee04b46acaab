"""A folder called `a b%2Fc`: workflow, retraining and service there, and after the project was moved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from closedloop.contract import read_contract
from tests.conftest import SMALL_SHOP, SOURCE_ROOT, Project, create_project
from tests.http_service import HttpService
from tests.production import commit, link_environment, put_program

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(1800)]


def run_in(root: Path, programs: str, *words: str) -> str:
    """Run a command; returns what it answers, or else what it tells people."""
    given = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "COLUMNS": "200"}
    words = ("closedloop", *words)
    ran = subprocess.run(words, cwd=root, env=given, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{' '.join(words)} ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}"
    return ran.stdout or ran.stderr


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An environment whose path has a space, which KFP hands to a shell; MLflow takes no % in it."""
    place = tmp_path_factory.mktemp("an environment")
    link_environment(place, stamps=False)
    put_program(place, "closedloop", f'#!/bin/sh\nexec "{place}/.venv/bin/python" -m closedloop.cli.main "$@"\n')
    return f"{place}/.venv/bin"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The small shop in a repository in such a folder."""
    made = create_project(tmp_path_factory.mktemp("places") / "a b%2Fc" / "project")
    made.change_params(SMALL_SHOP)
    made.add_sources("src", ".dvc", "pipelines")
    shutil.copy(SOURCE_ROOT / ".gitignore", made.root)
    subprocess.run(["git", "init", "--quiet"], cwd=made.root, check=True)
    commit(made.root, "a project")
    return made


def serve(root: Path) -> HttpService:
    service = HttpService(root)
    service.start()
    return service


def test_a_project_runs_in_such_a_folder_and_goes_on_where_it_is_moved_to(odd, small_shop, programs):
    root = odd.root

    def run(place, *words):
        return run_in(place, programs, *words)

    assert "stages ran" in run(root, "run")
    plain, found = (read_contract(shop.root / "models/candidate") for shop in (small_shop, odd))
    assert found.model_sha256 == plain.model_sha256
    strays = [path for path in root.parent.parent.rglob("*.db") if root not in path.parents]
    assert strays == []
    run(root, "release", "promote", "1")

    service = serve(root)
    try:
        customer = first_customer(root)
        status, answer = service.call("POST", "/predict", {"customer_id": customer})
        assert status == 200, answer
    finally:
        service.kill()
    assert run(root, "retrain", "--trigger-id", "first").strip().endswith("2")
    before = answer

    moved = root.parent.with_name("it's moved 100%") / "there"
    moved.parent.mkdir()
    shutil.move(root, moved)
    assert "Nothing changed" in run(moved, "run")
    assert "artifacts of" not in run(moved, "release", "verify")  # they were followed once
    service = serve(moved)
    try:
        status, answer = service.call("POST", "/predict", {"customer_id": customer})
        assert (status, answer["probability"], answer["model_version"]) == (200, before["probability"], "1")
        told = json.loads(run(moved, "status", "--json", f"--service=http://127.0.0.1:{service.port}"))
        assert told["service"]["model_version"] == "1"
    finally:
        service.stop()
    for one in (before, answer):  # the first one lay in the spool when the project was moved
        recorded = json.loads(run(moved, "why", "--json", one["prediction_id"]))
        assert recorded["model"]["version"] == "1"
        assert "as recorded" in run(moved, "reproduce", one["prediction_id"])
    run(moved, "score", "--input", "data/training/test.parquet", "--output", "scored.parquet")
    assert run(moved, "retrain", "--trigger-id", "second").strip().endswith("2")
    assert not root.exists(), "something was written where the project had been"


def first_customer(root: Path) -> str:
    """One whose features are online."""
    newest = max((root / "data/features").glob("*.parquet"))
    return str(pd.read_parquet(newest, columns=["customer_id"])["customer_id"].iloc[0])
