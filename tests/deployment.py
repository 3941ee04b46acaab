"""Production on one machine, with a repository whose workflows release into it.

Real are PostgreSQL, Redis, MLflow, S3, Prometheus, DVC, the service and all that the Jobs do; the cluster, the image
registry and the cloud's command line are tests/cluster.py, GitHub is tests/github.py.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import sqlalchemy as sa

from tests.cluster import PROGRAMS, Cluster, build_image, write_program
from tests.conftest import Project
from tests.github import Runner
from tests.http_service import HttpService, Load, wait_until
from tests.manifests import ROOT
from tests.production import ACCOUNT, Production, create_repository, run_production, train_first
from tests.programs import run_prometheus
from tests.services import find_free_port

DAY, CLOSED = "2024-01-01", "2024-02-05"  # what the data's clock says, and when the horizon of that day has closed
REGISTRY = "registry.example.com"
CLOCKS = {
    "closedloop": (
        '#!/bin/sh\n[ "$1" = retrain ] && set -- "$@" --as-of {day}\nexec python -m closedloop.cli.main "$@"\n'
    ),
    "date": "#!/bin/sh\necho {today}\n",
}


@dataclass
class Place:
    """All that a pipeline runs in."""

    production: Production
    origin: Project
    cluster: Cluster
    runner: Runner
    service: HttpService
    prometheus: str

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Ask the operations store."""
        engine = sa.create_engine(self.production.environment["CLOSEDLOOP_OPERATIONS__URL"], poolclass=sa.NullPool)
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(statement))]

    def read_row(self) -> tuple[Any, ...]:
        """What serves."""
        [row] = self.query("SELECT champion_version, challenger_version, challenger_mode FROM deployments")
        return row

    def read_entries(self) -> list[dict[str, Any]]:
        """The journal."""
        return [json.loads(text) for (text,) in self.query("SELECT entry FROM journal ORDER BY sequence")]

    def send(self, count: int, version: str, variant: str, customers: Sequence[str] = ()) -> None:
        """Customers ask until the store has so many more predictions of a version."""
        counted = "SELECT count(*) FROM predictions WHERE model_version = '{}' AND variant = '{}'"
        statement = counted.format(version, variant)
        goal = self.query(statement)[0][0] + count
        with Load(self.service, keep=False, customers=customers or self.list_customers(), may_refuse=True) as load:
            wait_until(
                lambda: load.failures or self.query(statement)[0][0] >= goal,
                f"{count} predictions of version {version}, {variant}",
                seconds=600,
            )
        assert load.failures == [], load.failures[:3]
        # an online store that a busy machine keeps from answering in time refuses those requests, and no others
        late = "online store: no rows in "
        assert all(one["error"]["message"].startswith(late) for one in load.refused), load.refused[:3]
        assert len(load.refused) < len(load.answers)

    def count_versions(self, requests: int) -> dict[str, int]:
        """Who answers."""
        bodies = [{"customer_id": customer} for customer in self.list_customers()[:requests]]
        answers = [self.service.call("POST", "/predict", body) for body in bodies]
        return Counter(answer["model_version"] for status, answer in answers if status == 200)

    def list_customers(self) -> list[str]:
        """Of whom the online store has features: drawn, as the first ones are the oldest."""
        rows = pd.read_parquet(self.origin.root / f"data/features/{DAY}.parquet")
        return [str(one) for one in rows["customer_id"].sample(3_000, random_state=0)]

    def list_likely(self, share: float) -> list[str]:
        """The customers that the champion thinks the likeliest to leave."""
        scored = self.query(
            "SELECT customer_id, max(score) FROM predictions WHERE variant = 'champion' GROUP BY 1 ORDER BY 2 DESC"
        )
        return [customer for customer, _ in scored[: int(len(scored) * share)]]

    def verify(self) -> str:
        """What `closedloop release verify` says."""
        return self.production.run(self.origin.root, "closedloop", "release", "verify")

    def run_job(self, job: str, today: str = CLOSED) -> str:
        """As a person does who is logged in to the cluster: a machine of the workflow is one."""
        self.cluster.put_program("date", CLOCKS["date"].format(today=today))
        machine = self.runner.folder / "release"
        command = ["make", "cluster-job", f"JOB={job}"]
        return self.production.run(machine / "checkout", *command, HOME=str(machine))

    def take_step(self) -> None:
        """One pass of the Deployment of releases, which the service then follows.

        Nothing is asked meanwhile: what a busy machine answers late by the weights of before looks like a broken split.
        """
        template = self.cluster.find("Deployment", "closedloop-release")["spec"]["template"]["spec"]
        place = self.cluster.folder / "pods/release"
        command, environment = self.cluster.prepare(template, place)
        assert command == ["closedloop", "release", "step", "--every=5m"]
        ran = subprocess.run(command[:-1], cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        [(revision,)] = self.query("SELECT revision FROM deployments")
        asked = ("GET", "/model/info")
        wait_until(lambda: self.service.call(*asked)[1]["revision"] == revision, "the service's new row", seconds=300)


@contextlib.contextmanager
def run_place(folder: Path) -> Iterator[Place]:
    """Servers, a weak champion, its image in the cluster, and a service with a Prometheus that looks at it."""
    port = find_free_port()
    with contextlib.ExitStack() as stack:
        production = stack.enter_context(run_production(folder))
        origin = create_repository(folder / "origin")
        train_first(production, origin)
        (folder / "prometheus").mkdir()
        targets = {"closedloop-service": f"127.0.0.1:{port}"}
        rules = ROOT / "k8s/base/observability/rules.yaml"
        prometheus = stack.enter_context(run_prometheus(folder / "prometheus", targets, rules=rules))
        cluster = _create_cluster(production, folder / "cluster", prometheus)
        build_image(origin.root, "jobs", "deployed", cluster.folder / f"registry/{REGISTRY}/closedloop-jobs:v0.1.0")
        build_image(origin.root, "serving", "deployed", folder / "pod")
        runner = Runner(
            origin.root,
            folder / "runners",
            ACCOUNT | {"AWS_ENDPOINT_URL": production.bucket.url},
            {"REGISTRY": REGISTRY, "CLUSTER": "closedloop"},
            {name: write_program(name, cluster.folder) for name in PROGRAMS},
        )
        service = HttpService(folder / "pod", production.environment, ("--as-of", DAY), metrics_port=port)
        stack.callback(service.stop)
        service.start()
        yield Place(production, origin, cluster, runner, service, prometheus)


def _create_cluster(production: Production, folder: Path, prometheus: str) -> Cluster:
    given = production.environment
    secrets = {
        "closedloop-store": {"url": given["CLOSEDLOOP_OPERATIONS__URL"]},
        "closedloop-features": {"overrides": given["CLOSEDLOOP_FEATURES__OVERRIDES"]},
        "closedloop-release": {"journal-key": given["CLOSEDLOOP_RELEASE__JOURNAL_KEY"]},
        "closedloop-tracking": {
            "username": given["MLFLOW_TRACKING_USERNAME"],
            "password": given["MLFLOW_TRACKING_PASSWORD"],
        },
        "closedloop-retraining": {"token": ""},
    }
    instead = {
        "CLOSEDLOOP_TRACKING__URI": production.mlflow.url,
        "CLOSEDLOOP_RELEASE__PROMETHEUS": prometheus,
        "CLOSEDLOOP_RELEASE__TRAFFIC": "row",  # tests/e2e/test_envoy.py has Istio's
        "CLOSEDLOOP_RELEASE__REQUESTS_MIN": "200",
        "CLOSEDLOOP_RELEASE__LATENCY_SLACK_MS": "5000",  # the machine may be busy
        "CLOSEDLOOP_RETRAINING__RUNNER": "local",
        "CLOSEDLOOP_MONITORING__MODEL_AGE_DAYS_MAX": "36500",  # predictions have the wall's clock, the data has its own
    }
    cluster = Cluster.create(folder, secrets, instead)
    for name, text in CLOCKS.items():
        cluster.put_program(name, text.format(day=DAY, today=CLOSED))
    return cluster
