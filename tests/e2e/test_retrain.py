"""`closedloop retrain` on the small shop: the whole pipeline through kfp.local, killed, repeated and refused."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from closedloop.adapters.mlflow import Tracking
from closedloop.config.settings import load_settings
from closedloop.contract import digest_folder, read_contract
from closedloop.processes import start_process
from tests.conftest import SMALL_SHOP, SOURCE_ROOT, Project
from tests.http_service import wait_until

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(900)]
TRIGGER = "0123456789abcdef"
COMMAND = ["closedloop", "retrain", "--trigger-id", TRIGGER]
CHECK = "INSERT INTO checks VALUES ('c-1', 'shop_churn', '1', ?, ?, ?, 9, 9, 'retrain', '{}', ?)"
REQUEST = """INSERT INTO retrainings (trigger_id, model_name, check_id, requested_by, reason, as_of, state, updated_at)
    VALUES (?, 'shop_churn', 'c-1', 'monitor', 'drift in 3 of 3 checks', ?, 'requested', ?)"""
STAGES = ("ingest", "validate", "features", "training set", "train", "evaluate", "register", "package")
DAY = "2024-01-01 00:00:00.000000"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, make_project: Any) -> Project:
    """The small shop with its graph and its pipeline, in a Git repository, and a request of the monitor's."""
    made: Project = make_project(tmp_path_factory.mktemp("retrain") / "project")
    made.change_params(SMALL_SHOP)
    made.add_sources("src", ".dvc", "pipelines")
    shutil.copy(SOURCE_ROOT / ".gitignore", made.root / ".gitignore")
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.com"]
    for arguments in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "a project"]):
        subprocess.run(["git", *identity, *arguments], cwd=made.root, check=True)
    made.run("store", "upgrade")
    execute(made, CHECK, DAY, DAY, DAY, DAY)
    execute(made, REQUEST, TRIGGER, DAY, DAY)
    return made


def execute(shop: Project, statement: str, *values: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(shop.root / "state/operations.db", timeout=30)) as connection, connection:
        return connection.execute(statement, values).fetchall()


def run(shop: Project, *arguments: str, status: int = 0, answer: str | None = None, **environment: str) -> str:
    """Run a command; returns what it tells people, beside its ``answer`` on standard output."""
    ran = subprocess.run(
        arguments, cwd=shop.root, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == status, ran.stdout + ran.stderr
    assert answer in (None, ran.stdout)
    return ran.stderr


def count_stages(shop: Project) -> int:
    """Processes that work for the project's retraining."""
    lines = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return sum(str(shop.root) in line and "executor_main" in line for line in lines)


def list_stages(told: str) -> list[str]:
    """Those that ran, in the stages' order."""
    return [stage for stage in STAGES if f"{stage:>12}  " in told]


def connect(shop: Project) -> Tracking:
    return Tracking(load_settings("local", folder=shop.root / "configs"), "shop_churn")


def list_versions(shop: Project) -> list[Any]:
    return list(connect(shop).client.search_model_versions("name = 'shop_churn'"))


def find_model(shop: Project) -> Path:
    [found] = shop.root.glob("state/retraining/shop_churn/artifacts/*/train/model")
    return found


def test_killed_and_repeated_it_registers_one_challenger_with_its_cause(shop):
    with start_process(COMMAND, cwd=shop.root, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if "checking" in line:
                assert count_stages(shop) > 0
                process.send_signal(signal.SIGKILL)
                break
    wait_until(lambda: count_stages(shop) == 0, "the end of the stage that was running")
    assert execute(shop, "SELECT state FROM retrainings") == [("running",)]
    told = run(shop, *COMMAND, answer="1\n")
    assert "is registered, version 1" in told
    assert list_stages(told) == [*STAGES]
    [version] = list_versions(shop)
    tracking = connect(shop)
    assert tracking.read_alias("challenger").version == version.version
    assert tracking.read_alias("champion") is None  # although release.auto_promote is on here
    assert version.tags["closedloop.trigger_id"] == TRIGGER
    assert version.tags["closedloop.check_id"] == "c-1"
    assert version.tags["closedloop.folder_sha256"] == digest_folder(find_model(shop))
    assert execute(shop, "SELECT state, model_version FROM retrainings") == [("registered", "1")]
    assert execute(shop, "SELECT * FROM deployments") == []


def test_the_same_trigger_again_does_nothing(shop):
    told = run(shop, *COMMAND, answer="1\n")
    assert "nothing to do: retraining 0123456789abcdef is registered, version 1" in told
    assert list_stages(told) == []
    assert len(list_versions(shop)) == 1


def test_killed_before_it_could_record_its_version_it_registers_nothing_twice(shop):
    execute(shop, "UPDATE retrainings SET state = 'running', model_version = NULL")
    assert "is registered, version 1" in run(shop, *COMMAND)
    assert len(list_versions(shop)) == 1


def test_it_used_as_many_snapshots_as_a_run_and_tested_the_newest_on_who_was_held_out(shop):
    lineage = read_contract(find_model(shop)).lineage
    newest = "2023-12-02"
    assert [f"{day}" for day in lineage.validation_snapshots + lineage.test_snapshots] == [newest, newest]
    assert [f"{day}" for day in lineage.train_snapshots] == ["2023-09-03", "2023-10-03", "2023-11-02", newest]


def test_the_model_is_the_one_that_dvc_repro_makes(shop):
    """Other processes, another hash seed, other folders: the same bytes."""
    before = digest_folder(find_model(shop))
    path = shop.root / "params.yaml"
    text = path.read_text(encoding="utf-8")
    shop.change_params({"split": {"by": "customer"}})
    # the contract says whether the code was as committed: params.yaml has its own digest there, and may not differ
    subprocess.run(["git", "update-index", "--assume-unchanged", "params.yaml"], cwd=shop.root, check=True)
    try:
        run(shop, "dvc", "repro", PYTHONHASHSEED="1", CLOSEDLOOP_ENGINE__THREADS="1")
    finally:
        path.write_text(text, encoding="utf-8")
    assert digest_folder(shop.root / "models/candidate") == before
    assert shop.read_json("metrics/registration.json")["folder_sha256"] == before
    assert len(list_versions(shop)) == 1


def test_a_gate_that_says_no_is_on_record_with_its_sentence(shop):
    path = shop.root / "configs/datasets/shop.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["expectations"][0]["kwargs"]["min_value"] = 1_000_000
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    told = run(shop, "closedloop", "retrain", "--trigger-id", "t-2", "--reason", "a test", status=2)
    assert "GateFailed: retraining t-2 is refused: validate: data gate: failed critical expectations: 1 of 19" in told
    [(state, detail)] = execute(shop, "SELECT state, detail FROM retrainings WHERE trigger_id = 't-2'")
    assert state == "refused"
    assert "1000000" in detail.replace(",", "")
    assert len(list_versions(shop)) == 1


def test_a_crash_is_on_record_and_names_its_stage(shop):
    (shop.root / "params.yaml").write_text(
        (shop.root / "params.yaml").read_text(encoding="utf-8").replace("dataset: shop", "dataset: telco")
    )
    told = run(shop, "closedloop", "retrain", "--trigger-id", "t-3", status=1)
    assert "retraining t-3 is failed: ingest: " in told
    assert execute(shop, "SELECT state FROM retrainings WHERE trigger_id = 't-3'") == [("failed",)]
