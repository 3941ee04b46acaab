"""The whole workflow under the production profile, on real PostgreSQL, Redis, MLflow and S3."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import shutil
import subprocess

import pandas as pd
import pytest
import sqlalchemy as sa

from tests.http_service import HttpService, Load, wait_until
from tests.manifests import ROOT
from tests.production import ACCOUNT, commit, create_repository, put_program, run_production
from tests.services import find_postgres

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(1200)]

DAY = "2024-01-01"
WEAK = {"model": {"params": {"max_iter": 8, "max_leaf_nodes": 3}}}  # passes its gates, and loses against the default


@pytest.fixture(scope="module")
def production(tmp_path_factory):
    with run_production(tmp_path_factory.mktemp("production")) as servers:
        yield servers


@pytest.fixture(scope="module")
def origin(production, tmp_path_factory):
    """A repository whose weak model was trained, pushed, registered and is champion."""
    made = create_repository(tmp_path_factory.mktemp("origin") / "project")
    made.change_params(WEAK)
    production.run(made.root, "closedloop", "store", "upgrade")
    production.run(made.root, "dvc", "repro")
    production.run(made.root, "closedloop", "release", "promote", "1")
    commit(made.root, "a weak model")
    production.run(made.root, "make", "--silent", "data-remote")
    production.run(made.root, "dvc", "push")
    return made


def test_what_was_pushed_is_pulled_elsewhere_and_nothing_runs_again(production, origin, tmp_path):
    subprocess.run(["git", "clone", "--quiet", origin.root, tmp_path / "clone"], check=True)
    shutil.copytree(origin.root / ".venv", tmp_path / "clone/.venv", symlinks=True)
    production.run(tmp_path / "clone", "make", "--silent", "data-remote", "--old-file=.venv/installed")
    production.run(tmp_path / "clone", "dvc", "pull")
    assert "up to date" in production.run(tmp_path / "clone", "dvc", "status")
    for name in ("models/candidate/model.onnx", "data/training/test.parquet"):
        assert (tmp_path / "clone" / name).read_bytes() == (origin.root / name).read_bytes()
    stored = production.bucket.client().list_objects_v2(Bucket="closedloop-data")["Contents"]
    assert all(one["Key"].startswith("dvc/files/md5/") for one in stored)


def test_the_doctor_finds_all_well(production, origin):
    assert "version 1 is champion" in production.run(origin.root, "closedloop", "doctor")
    assert not list(origin.root.glob("mlflow.db*"))
    assert not (origin.root / "state/operations.db").exists()
    assert not (origin.root / "state/feast/registry.db").exists()


@pytest.fixture(scope="module")
def cluster(origin, tmp_path_factory):
    """What the image of the jobs has, in a folder: no data, and a parameter file of its own."""
    made = create_repository(tmp_path_factory.mktemp("cluster") / "app")
    commit(made.root, "the image")
    return made


@pytest.fixture(scope="module")
def rows(origin):
    """Rows as clients send them."""
    contract = json.loads((origin.root / "models/candidate/contract.json").read_text(encoding="utf-8"))
    frame = pd.read_parquet(origin.root / "data/training/test.parquet").head(40)
    return json.loads(frame[[one["name"] for one in contract["features"]]].to_json(orient="records"))


@contextlib.contextmanager
def serve(production, cluster, rows, **ports):
    """The service as a pod of the cluster, under load."""
    service = HttpService(cluster.root, production.environment, ("--as-of", DAY), **ports)  # the data's day
    try:
        service.start()
        with Load(service, rows=rows) as load:
            load.wait_for(50)
            yield service, load
    finally:
        service.stop()


def read_stored(production):
    engine = sa.create_engine(production.environment["CLOSEDLOOP_OPERATIONS__URL"], poolclass=sa.NullPool)
    with engine.connect() as connection:
        statement = "SELECT request_id FROM predictions WHERE variant <> 'shadow'"
        return collections.Counter(connection.execute(sa.text(statement)).scalars())


def read_commands(title):
    """The shell blocks of a section of the runbook, by their first line, a comment."""
    text = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n# (.*)\n([^`]*)```", section)
    return {name.split(",")[0]: commands for name, commands in blocks}


def test_a_backup_restores_the_same_champion_with_the_same_answers_into_an_empty_place(
    production, origin, cluster, rows, tmp_path
):
    """The last of this page's tests: the buckets that are restored into are the emptied old ones."""
    commands = read_commands("Back up and restore")

    def run(commands, root, postgres, environment):
        account = {"PGHOST": "127.0.0.1", "PGPORT": str(postgres.port), "PGUSER": "closedloop"}
        programs = os.pathsep.join([f"{root}/.venv/bin", str(find_postgres()), os.environ["PATH"]])
        command = ["bash", "-euc", commands]
        ran = subprocess.run(
            command, cwd=root, env=os.environ | environment | account | {"PATH": programs}, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout
        return ran.stdout

    with serve(production, cluster, rows) as (service, _):
        before = [service.call("POST", "/predict", {"features": row})[1] for row in rows]
        wait_until(lambda: read_stored(production)[before[-1]["request_id"]], "rows in the store")
    stored = read_stored(production)
    history = production.run(cluster.root, "closedloop", "release", "history")
    new = create_repository(tmp_path / "app")
    put_program(new.root, "date", f"#!/bin/sh\necho {DAY}\n")
    run(commands["back up"], new.root, production.postgres, production.environment)

    def restore(postgres, bucket):
        run(commands["restore"], new.root, postgres, {**ACCOUNT, "AWS_ENDPOINT_URL": bucket.url})

    (tmp_path / "servers").mkdir()
    with run_production(tmp_path / "servers", restore) as restored:
        assert "the journal holds" in run(commands["prove it"], new.root, restored.postgres, restored.environment)
        assert restored.run(new.root, "closedloop", "release", "history") == history
        assert read_stored(restored) == stored
        with serve(restored, new, rows) as (service, _):
            after = [service.call("POST", "/predict", {"features": row})[1] for row in rows]
    for name in ("model_version", "probability", "prediction"):
        assert [one[name] for one in after] == [one[name] for one in before]
