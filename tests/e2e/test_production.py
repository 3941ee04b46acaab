"""The whole workflow under the production profile, on real PostgreSQL, Redis, MLflow and S3.

Each of them is lost once, for CLOSEDLOOP_OUTAGE_SECONDS (default 60).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pandas as pd
import pytest

from tests.docs.test_docs import read_commands
from tests.http_service import HttpService, wait_until
from tests.production import ACCOUNT, commit, create_repository, put_program, run_production, train_first
from tests.production_load import DAY, fail, keep_all, lose, read_registry, read_stored, serve
from tests.services import find_postgres

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def production(tmp_path_factory):
    with run_production(tmp_path_factory.mktemp("production")) as servers:
        yield servers


@pytest.fixture(scope="module")
def origin(production, tmp_path_factory):
    """A repository whose weak model was trained, pushed, registered and is champion."""
    made = create_repository(tmp_path_factory.mktemp("origin") / "project")
    train_first(production, made)
    return made


@pytest.fixture
def clone(production, origin, tmp_path):
    """What a colleague has before the first pull."""
    subprocess.run(["git", "clone", "--quiet", origin.root, tmp_path / "clone"], check=True)
    shutil.copytree(origin.root / ".venv", tmp_path / "clone/.venv", symlinks=True)
    production.run(tmp_path / "clone", "make", "--silent", "data-remote", "--old-file=.venv/installed")
    return tmp_path / "clone"


def test_what_was_pushed_is_pulled_elsewhere_and_nothing_runs_again(production, origin, clone):
    production.run(clone, "dvc", "pull")
    assert "up to date" in production.run(clone, "dvc", "status")
    for name in ("models/candidate/model.onnx", "data/training/test.parquet"):
        assert (clone / name).read_bytes() == (origin.root / name).read_bytes()
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


def test_the_service_gets_its_model_through_mlflow_alone(production, origin, cluster):
    """As its pods do, which the network lets reach no bucket."""
    tracking = production.mlflow.url.replace("127.0.0.1", "localhost")
    alone = {"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": "localhost", "CLOSEDLOOP_TRACKING__URI": tracking}
    alone["CLOSEDLOOP_SERVING__STATE"] = "state/alone"
    service = HttpService(cluster.root, production.environment | alone, ("--as-of", DAY))
    try:
        service.start()
    finally:
        service.stop()


@pytest.fixture(scope="module")
def rows(origin):
    """Rows as clients send them."""
    contract = json.loads((origin.root / "models/candidate/contract.json").read_text(encoding="utf-8"))
    frame = pd.read_parquet(origin.root / "data/training/test.parquet").head(40)
    return json.loads(frame[[one["name"] for one in contract["features"]]].to_json(orient="records"))


@pytest.fixture(scope="module")
def customers(origin):
    """Those whose features are online."""
    return pd.read_parquet(origin.root / f"data/features/{DAY}.parquet")["customer_id"].tolist()


@pytest.mark.long
def test_without_postgresql_all_is_answered_and_stored_later(production, origin, cluster, rows, customers):
    with keep_all(production, cluster.root, rows, customers) as (service, inline, by_id):
        stored = read_stored(production).total()
        with lose(production.postgres, inline, by_id):
            wait_until(lambda: service.read_metric("spool_depth_bytes") > 100_000, "a spool that fills")
            assert "ServiceUnavailable: operations store" in fail(
                production, cluster.root, "closedloop", "release", "history"
            )
        waiting = len(inline.answers) + len(by_id.answers)
        wait_until(lambda: read_stored(production).total() > stored + waiting, "a spool that drains under load")
    assert by_id.refused == []
    production.run(cluster.root, "closedloop", "doctor")


@pytest.mark.long
def test_without_redis_requests_by_id_alone_are_refused_until_it_is_back(production, origin, cluster, rows, customers):
    with keep_all(production, cluster.root, rows, customers) as (_, inline, by_id):
        with lose(production.redis, inline):
            wait_until(lambda: len(by_id.refused) > 100, "refusals")
            failed = fail(production, cluster.root, "closedloop", "refresh", "--as-of", DAY)
            assert "ServiceUnavailable: feature store: " in failed
        by_id.wait_for(100)
        refused = len(by_id.refused)
        by_id.wait_for(300)
        assert len(by_id.refused) == refused
    assert {one["error"]["message"] for one in by_id.refused} == {"online store: no rows in 250 ms"}
    scores = {(answer["customer"], answer["probability"]) for answer in by_id.answers}
    assert len(scores) == len({customer for customer, _ in scores})  # what Redis kept is what it had
    production.run(cluster.root, "closedloop", "refresh", "--as-of", DAY)


@pytest.fixture(scope="module")
def better(origin):
    """The same repository with the default parameters; nothing ran yet."""
    origin.change_params({"model": {"params": {"max_iter": 100, "max_leaf_nodes": 31}}})
    commit(origin.root, "a better model")
    return origin


@pytest.mark.long
def test_without_s3_nothing_is_trained_pushed_or_pulled_and_serving_goes_on(
    production, clone, better, cluster, rows, customers
):
    before = read_registry(production)
    with keep_all(production, cluster.root, rows, customers) as (_, inline, by_id):
        with lose(production.bucket, inline, by_id):
            assert "ServiceUnavailable: MLflow at " in fail(production, better.root, "dvc", "repro")
            assert "ERROR: " in fail(production, clone, "dvc", "pull")
            assert "ERROR: " in fail(production, better.root, "dvc", "push")
            assert read_registry(production) == before
        production.run(better.root, "dvc", "repro")
        production.run(better.root, "dvc", "push")
        production.run(clone, "dvc", "pull")
    assert by_id.refused == []
    assert read_registry(production) == {1: "champion", 2: "challenger"}


@pytest.mark.long
def test_without_mlflow_nothing_is_registered_and_serving_goes_on(production, origin, cluster, rows, customers):
    before = read_registry(production)

    with keep_all(production, cluster.root, rows, customers) as (service, inline, by_id):

        def list_notes():
            return [note.split(":")[0] for note in service.call("GET", "/model/info")[1]["notes"]]

        wait_until(lambda: list_notes() == [], "no note of the time before")
        with lose(production.mlflow, inline, by_id):
            for stage in ("train", "evaluate", "register"):
                assert "ServiceUnavailable: MLflow at " in fail(production, origin.root, "closedloop", stage)
            wait_until(lambda: list_notes() == ["registry"], "a note on the outage")
            assert read_registry(production) == before
        wait_until(lambda: list_notes() == [], "no note any more")
        production.run(origin.root, "closedloop", "register")
    assert by_id.refused == []
    assert read_registry(production) == before


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

    with serve(production, cluster.root, rows) as (service, _):
        before = [service.call("POST", "/predict", {"features": row})[1] for row in rows]
        wait_until(lambda: read_stored(production)[before[-1]["request_id"]], "rows in the store")
    stored = read_stored(production)
    history = production.run(cluster.root, "closedloop", "release", "history")
    new = create_repository(tmp_path / "app")
    put_program(new.root, "date", f"#!/bin/sh\necho {DAY}\n")
    run(commands["back up"], new.root, production.postgres, production.environment)

    def restore(postgres, bucket):
        # what an agent makes that reaches the empty store
        url = production.environment["CLOSEDLOOP_OPERATIONS__URL"].replace(
            f":{production.postgres.port}/", f":{postgres.port}/"
        )
        production.run(new.root, "closedloop", "store", "upgrade", CLOSEDLOOP_OPERATIONS__URL=url)
        run(commands["restore"], new.root, postgres, {**ACCOUNT, "AWS_ENDPOINT_URL": bucket.url})

    (tmp_path / "servers").mkdir()
    with run_production(tmp_path / "servers", restore) as restored:
        assert "the journal holds" in run(commands["prove it"], new.root, restored.postgres, restored.environment)
        assert restored.run(new.root, "closedloop", "release", "history") == history
        assert read_stored(restored) == stored
        with serve(restored, new.root, rows) as (service, _):
            after = [service.call("POST", "/predict", {"features": row})[1] for row in rows]
    for name in ("model_version", "probability", "prediction"):
        assert [one[name] for one in after] == [one[name] for one in before]
