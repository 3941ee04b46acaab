"""The Jobs' commands on real servers that ask for passwords, each with the Secrets of its manifest and no more."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.server
import re
import subprocess
import threading
from dataclasses import dataclass

import pandas as pd
import pytest
import sqlalchemy as sa

from closedloop.bootstrap import build_features, load_run
from closedloop.contract import CategoricalFeature, NumericFeature
from closedloop.records import Prediction
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from tests.cluster import Cluster, build_image
from tests.docs.test_docs import read_commands
from tests.manifests import ROOT
from tests.production import run_production
from tests.releases import NAME, register_versions

pytestmark = pytest.mark.thorough

FEATURES = (
    NumericFeature(name="purchase_count_30d", minimum=0.0, maximum=100.0),
    NumericFeature(name="age", minimum=16.0, maximum=110.0),
    CategoricalFeature(name="segment", categories=("budget", "standard", "premium")),
)
SNAPSHOT = dt.datetime(2023, 5, 20, tzinfo=dt.UTC)
CLOSED = dt.datetime(2023, 6, 25, tzinfo=dt.UTC)


class Prometheus(http.server.BaseHTTPRequestHandler):
    """Knows of no error."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": {"result": []}}')

    def log_message(self, *_):
        """Say nothing."""


@contextlib.contextmanager
def run_prometheus():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Prometheus)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Place:
    """A cluster in a folder, and the operations store beside it."""

    cluster: Cluster
    store: str

    def run(self, kind, name, today=SNAPSHOT, **given):
        """A pod of this resource, once; what it said."""
        self.cluster.put_program("date", f"#!/bin/sh\necho {today:%F}\n")
        spec = self.cluster.find(kind, f"closedloop-{name}")["spec"]
        template = spec.get("jobTemplate", {}).get("spec", spec)["template"]["spec"]
        place = self.cluster.folder / "pods" / name
        command, environment = self.cluster.prepare(template, place)
        command = [word for word in command if not word.startswith("--every")]
        ran = subprocess.run(
            command, cwd=place, env=environment | given, capture_output=True, text=True, check=False, timeout=300
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return " ".join((ran.stdout + ran.stderr).split())

    def score(self, today):
        """How many the Job of this day says that it scored, and the table after it."""
        (count,) = re.findall(r"([\d,]+) of \1 rows scored", self.run("CronJob", "score", today))
        engine = sa.create_engine(self.store)
        found = pd.read_sql("SELECT * FROM scores ORDER BY as_of, customer_id", engine)
        engine.dispose()
        return int(count.replace(",", "")), found

    def log_predictions(self, customers):
        """As the service does."""
        store = Predictions(Database(self.store))
        store.insert(
            [
                Prediction(
                    f"p-{one}", "r", NAME, "1", "champion", "http", SNAPSHOT, (), 0.5, 0, 0.5, customer_id=one,
                    features_as_of=SNAPSHOT,
                )
                for one in customers
            ]
        )  # fmt: skip
        store.database.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_project):
    """A shop too small for a model of its own, and two versions, of which the first one serves."""
    folder = tmp_path_factory.mktemp("secrets")
    project = make_project(folder / "project")
    project.add_sources("pipelines")
    project.change_params({"simulator": {"customers": 4_000}, "features": {"window_days": [7, 30]}})
    with run_production(folder) as production, run_prometheus() as prometheus:
        given = production.environment
        with pytest.MonkeyPatch.context() as patch:
            for name, value in given.items():
                patch.setenv(name, value)
            service = build_features(load_run(project.root / "params.yaml", root=project.root)).features.service
            register_versions(project.root, {"1": 0.0, "2": 0.01}, service, features=FEATURES)
        secrets = {
            "closedloop-store": {"url": given["CLOSEDLOOP_OPERATIONS__URL"]},
            "closedloop-features": {"overrides": given["CLOSEDLOOP_FEATURES__OVERRIDES"]},
            "closedloop-release": {"journal-key": given["CLOSEDLOOP_RELEASE__JOURNAL_KEY"]},
            "closedloop-serving": {"id-key": "an-id-key-of-the-service"},
            "closedloop-tracking": {
                "username": given["MLFLOW_TRACKING_USERNAME"],
                "password": given["MLFLOW_TRACKING_PASSWORD"],
            },
        }
        instead = {
            "PYTHONPATH": str(ROOT / "src"),
            "CLOSEDLOOP_TRACKING__URI": production.mlflow.url,
            "CLOSEDLOOP_RELEASE__PROMETHEUS": prometheus,
            "CLOSEDLOOP_RELEASE__TRAFFIC": "row",
        }
        cluster = Cluster.create(folder / "cluster", secrets, instead)
        image = cluster.find("CronJob", "closedloop-erase")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        build_image(project.root, "jobs", "deployed", cluster.folder / "registry" / image["containers"][0]["image"])
        yield Place(cluster, given["CLOSEDLOOP_OPERATIONS__URL"])


def test_every_command_does_its_work_with_the_secrets_that_it_is_given(place):
    assert "features of 2023-05-20 online" in place.run("CronJob", "refresh")
    (published,) = place.cluster.folder.glob(f"claims/*/feast/offline/{NAME}/*/2023-05-20.parquet")
    customers = pd.read_parquet(published)["customer_id"].tolist()[:5]
    place.log_predictions(customers)
    said = place.run("CronJob", "outcomes", CLOSED)
    assert "deleted: 0 predictions and 0 outcomes" in said
    assert "5 outcomes of 1 snapshot stored" in said
    working = [[*place.cluster.folder.glob(f"claims/*/{name}/{NAME}/raw")] for name in ("refresh", "outcomes")]
    assert list(map(len, working)) == [1, 1]
    said = place.run("CronJob", "erase", CUSTOMER=customers[0])
    assert not any(folder.exists() for (folder,) in working)
    assert "deleted rows of features: online 1, published 1, in " in said
    assert "deleted: 1 prediction and 1 outcome" in said
    assert customers[0] not in set(pd.read_parquet(published)["customer_id"])

    assert "champion 1; version 2 in shadow" in place.run("CronJob", "release-start", MODEL_VERSION="2")
    assert "hold" in place.run("Deployment", "release")
    assert "hold" in place.run("CronJob", "release-check")
    assert place.run("CronJob", "release-stop").endswith("champion 1")

    # what a command would have made, had it opened a store whose address it was not given
    assert [*place.cluster.folder.rglob("*.db")] == []


def test_the_first_model_of_a_cluster_becomes_champion_by_the_runbooks_jobs(place):
    """Two versions are registered in place of the training; the Job promotes the second, since the first one serves."""
    retrain, refresh, promote = read_commands("First model in a cluster")["a first model"].splitlines()
    assert (retrain, refresh) == ("make cluster-job JOB=retrain", "make cluster-job JOB=refresh")
    job, version = re.fullmatch(r"make cluster-job JOB=(\S+) MODEL_VERSION=(\d+)", promote).groups()
    assert version == "1"
    place.run("CronJob", "refresh")
    assert "champion 2" in place.run("CronJob", job, MODEL_VERSION="2")


def test_all_active_customers_are_scored_into_a_table_each_once_a_day(place):
    count, found = place.score(SNAPSHOT)
    assert len(found) == found["customer_id"].nunique() == count > 500
    assert set(found["as_of"]) == {SNAPSHOT.date()}
    assert place.score(SNAPSHOT)[1].equals(found)
    count, later = place.score(SNAPSHOT + dt.timedelta(days=1))
    assert later[later["as_of"] == SNAPSHOT.date()].equals(found)
    assert len(later) == len(found) + count
    assert not [one for one in place.cluster.folder.rglob("*.db") if ".cache" not in one.parts], "of a store of its own"
