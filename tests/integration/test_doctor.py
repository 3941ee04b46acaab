"""closedloop doctor on real services: what is missing, locked or old is named, with what to do."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import sqlalchemy as sa

from closedloop.bootstrap import build_probes, load_run
from closedloop.core.release.entries import Deployment
from closedloop.errors import ClosedloopError, ServiceUnavailable
from closedloop.loop.status.doctor import Probe, describe_skew, examine
from closedloop.processes import start_process
from closedloop.store.database import Database
from closedloop.store.journal import Journal
from tests.deployments import deploy
from tests.http_service import wait_until
from tests.manifests import ROOT
from tests.production import ACCOUNT, Bucket
from tests.programs import fetch, run_prometheus
from tests.services import find_free_port, run_postgres, run_redis

SECRET = "0pen-sesame"
NOWHERE = "127.0.0.1:1"


def test_a_broken_service_keeps_no_other_from_being_asked():
    def fail() -> str:
        raise ServiceUnavailable("gone\n  for good")

    found = list(examine([Probe("a", fail, "start it"), Probe("b", lambda: "fine", "-")]))
    assert [(one.name, one.text, one.remedy) for one in found] == [
        ("a", "gone for good", "start it"),
        ("b", "fine", ""),
    ]


def test_a_clock_may_be_5_seconds_off():
    assert "within 5 s" in describe_skew(-5)
    with pytest.raises(ClosedloopError, match=r"\+6 s off ours"):
        describe_skew(6)


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    """Addresses of a PostgreSQL, a Redis and an MLflow server that ask for a password."""
    from redis import Redis

    folder = tmp_path_factory.mktemp("services")
    bucket = Bucket()
    bucket.start()
    client, name = bucket.client(), "closedloop-data"
    if name not in [one["Name"] for one in client.list_buckets()["Buckets"]]:  # of another server of this process
        client.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    with run_postgres(folder) as postgres, run_redis(folder) as redis:
        address = postgres.create_database()
        with sa.create_engine(address.replace("postgresql", "postgresql+psycopg")).connect() as connection:
            connection.execute(sa.text(f"CREATE ROLE app LOGIN SUPERUSER PASSWORD '{SECRET}'"))
            connection.commit()
            rules = postgres.data / "pg_hba.conf"
            rules.write_text("host all app 127.0.0.1/32 scram-sha-256\n" + rules.read_text(encoding="utf-8"))
            connection.execute(sa.text("SELECT pg_reload_conf()"))
        host, port = redis.address.split(":")
        Redis(host=host, port=int(port)).config_set("requirepass", SECRET)
        mlflow, process = start_mlflow(folder)
        try:
            yield {
                "store": address.replace("closedloop:s3cret-w0rd", f"app:{SECRET}"),
                "redis": f"{redis.address},password={SECRET}",
                "mlflow": mlflow,
                "bucket": bucket.url,
            }
        finally:
            bucket.stop()
            process.terminate()
            process.wait()


def start_mlflow(folder: Path) -> tuple[str, subprocess.Popen[bytes]]:
    port = find_free_port()
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/accounts.db\nadmin_username = admin\n"
        f"admin_password = {SECRET}-longer\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
        encoding="utf-8",
    )
    places = [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/artifacts"]
    environment = {
        **os.environ,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "k",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["mlflow", "server", "--app-name=basic-auth", "--workers=1", f"--port={port}", *places]
    with (folder / "mlflow.log").open("wb") as log:
        process = start_process(command, env=environment, stdout=log, stderr=log, cwd=folder)

    def answers() -> bool:
        assert process.poll() is None, (folder / "mlflow.log").read_text(encoding="utf-8")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
            return True
        return False

    wait_until(answers, "MLflow's server", seconds=600)
    return f"http://127.0.0.1:{port}", process


@pytest.fixture
def ask(services, tmp_path, monkeypatch):
    """Runs the doctor under the production profile; arguments replace what is right."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def run(store=services["store"], redis=services["redis"], mlflow=services["mlflow"], user="admin", registry=None,
            **settings):  # fmt: skip
        overrides = {
            "registry": {"registry_type": "sql", "path": registry or f"sqlite:///{tmp_path}/registry.db"},
            "online_store": {"type": "redis", "connection_string": redis},
        }
        values = {
            "CLOSEDLOOP_PROFILE": "production",
            "CLOSEDLOOP_OPERATIONS__URL": store,
            "CLOSEDLOOP_FEATURES__OVERRIDES": json.dumps(overrides),
            "CLOSEDLOOP_TRACKING__URI": mlflow,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": f"{SECRET}-longer",
            "AWS_ENDPOINT_URL": services["bucket"],
            "AWS_MAX_ATTEMPTS": "1",
            **ACCOUNT,
            **settings,
        }
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        found = {one.name: one for one in examine(build_probes(load_run(Path("params.yaml"))))}
        assert SECRET not in str(found)
        return found

    return run


@pytest.mark.thorough
def test_services_that_are_well(ask, services):
    database = Database(services["store"])
    database.upgrade()
    now = dt.datetime.now(dt.UTC)
    if Journal(database).read_deployment("shop_churn") is None:
        deploy(database, Deployment("shop_churn", 0, "7", "salt", now))
    found = ask()
    assert [name for name, one in found.items() if one.remedy] == ["Feast's registry"]  # nothing was published yet
    assert "holds no feature service" in found["Feast's registry"].text
    assert "closedloop refresh" in found["Feast's registry"].remedy
    assert found["deployment"].text == "version 7 is champion"
    assert found["MLflow"].text.startswith("version 3.")
    assert "empty: `closedloop refresh` brings features online" in found["online store"].text
    assert found["DVC's remote"].text.startswith("s3://closedloop-data/dvc")
    assert "Prometheus" not in found  # none is set


@pytest.mark.thorough
@pytest.mark.parametrize("address", ["redis.example.com", "redis://redis.example.com:6379"])
def test_an_online_stores_address_that_is_none(ask, address):
    found = ask(redis=f"{address},password={SECRET}")
    assert "must be host:port" in found["online store"].text
    assert found["online store"].remedy
    assert found["DVC's remote"].text.startswith("s3://")  # the others are asked all the same


@pytest.mark.thorough
def test_services_that_are_missing(ask):
    gone = f"postgresql://app:{SECRET}@{NOWHERE}/x"
    found = ask(
        store=gone,
        redis=f"{NOWHERE},password={SECRET}",
        mlflow=f"http://{NOWHERE}",
        registry=gone.replace("postgresql", "postgresql+psycopg"),
        CLOSEDLOOP_RETRAINING__RUNNER="cluster",
        CLOSEDLOOP_RETRAINING__ENDPOINT=f"http://{NOWHERE}",
        CLOSEDLOOP_RELEASE__PROMETHEUS=f"http://{NOWHERE}",
        AWS_ENDPOINT_URL=f"http://{NOWHERE}",
    )
    assert all(one.remedy for one in found.values())
    for name in ("operations store", "MLflow", "Feast's registry", "Kubeflow Pipelines", "Prometheus"):
        assert "refused" in found[name].text, found[name]
    assert "onnect" in found["online store"].text
    assert found["DVC's remote"].text.startswith("s3://closedloop-data/dvc: Could not connect")
    settings = {
        "operations store": "operations.url",
        "MLflow": "tracking.uri",
        "artifacts": "tracking.artifacts",
        "Feast's registry": "features.overrides",
        "online store": "features.overrides",
        "DVC's remote": "data.remote",
        "Prometheus": "release.prometheus",
    }
    assert {name: setting for name, setting in settings.items() if setting in found[name].remedy} == settings
    assert "retraining.endpoint" in found["Kubeflow Pipelines"].remedy


@pytest.mark.thorough
def test_wrong_passwords(ask, services):
    wrong = services["store"].replace(SECRET, "wrong")
    redis = services["redis"].replace(SECRET, "wrong")
    found = ask(store=wrong, redis=redis, user="stranger", registry=wrong.replace("postgresql", "postgresql+psycopg"))
    assert "password authentication failed" in found["operations store"].text
    assert "operations.url" in found["operations store"].remedy
    assert "password authentication failed" in found["Feast's registry"].text
    assert "answers 401" in found["MLflow"].text
    assert "MLFLOW_TRACKING_PASSWORD" in found["MLflow"].remedy
    assert "password" in found["online store"].text
    assert "features.overrides" in found["Feast's registry"].remedy
    assert "features.overrides" in found["online store"].remedy
    assert "401" in found["artifacts"].text


@pytest.mark.thorough
def test_an_old_schema(ask, services):
    Database(services["store"]).upgrade()
    with sa.create_engine(services["store"].replace("postgresql", "postgresql+psycopg")).connect() as connection:
        newest = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one()
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0001'"))
        connection.commit()
        found = ask()
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :newest"), {"newest": newest})
        connection.commit()
    assert f"is at revision 0001, this release needs {newest}" in found["operations store"].text
    assert "closedloop store upgrade" in found["operations store"].remedy
    connection.close()


class Older(BaseHTTPRequestHandler):
    """MLflow of the release before, whose clock is a minute ahead; it, and Kubeflow, know nobody."""

    def do_GET(self):
        body = b"2.22.0" if self.path == "/version" else b"who are you"
        self.send_response(200 if self.path == "/version" else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def date_time_string(self, timestamp=None):
        return super().date_time_string(time.time() + self.server.ahead_seconds)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def run_older(ahead_seconds):
    with ThreadingHTTPServer(("127.0.0.1", 0), Older) as server:
        server.ahead_seconds = ahead_seconds
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.thorough
def test_a_server_of_another_version_and_a_runner_that_lets_nobody_in(ask):
    with run_older(0) as address:
        found = ask(mlflow=address, CLOSEDLOOP_RETRAINING__RUNNER="cluster", CLOSEDLOOP_RETRAINING__ENDPOINT=address)
    assert "MLflow's server is version 2.22.0, this client 3." in found["MLflow"].text
    assert "or upgrade it" in found["MLflow"].remedy
    assert "401" in found["Kubeflow Pipelines"].text
    assert "CLOSEDLOOP_RETRAINING__TOKEN" in found["Kubeflow Pipelines"].remedy


@pytest.mark.thorough
def test_clocks_that_differ(ask, services, monkeypatch):
    with sa.create_engine(services["store"].replace("postgresql", "postgresql+psycopg")).connect() as connection:
        for statement in (
            "CREATE SCHEMA ahead",
            "CREATE FUNCTION ahead.clock_timestamp() RETURNS timestamptz LANGUAGE sql "
            "AS $$ SELECT pg_catalog.clock_timestamp() + interval '1 minute' $$",
            "ALTER ROLE app SET search_path = ahead, pg_catalog, public",
        ):
            connection.execute(sa.text(statement))
        connection.commit()
        monkeypatch.setattr("mlflow.__version__", "2.22.0")  # as the one that answers
        try:
            with run_older(60) as address:
                found = ask(mlflow=address)
        finally:
            connection.execute(sa.text("ALTER ROLE app RESET search_path"))
            connection.commit()
    for name in ("its clock", "MLflow's clock"):
        assert found[name].text.startswith("the server's clock is +"), found[name]
        assert "s off ours, at most 5 are fine" in found[name].text
        assert "NTP" in found[name].remedy


@pytest.mark.thorough
def test_a_remote_of_data_that_is_not_there(ask, tmp_path):
    found = ask(CLOSEDLOOP_DATA__REMOTE="s3://nobodys-bucket/dvc")["DVC's remote"]
    assert found.text == "s3://nobodys-bucket/dvc: The specified bucket does not exist"
    assert "AWS_*" in found.remedy
    found = ask(CLOSEDLOOP_DATA__REMOTE=f"warp://someone:{SECRET}@server/dvc")["DVC's remote"]
    assert found.text.startswith("data.remote warp://***@server/dvc: Protocol not known")
    found = ask(CLOSEDLOOP_DATA__REMOTE=str(tmp_path / "new"))["DVC's remote"]
    assert (found.text, found.remedy) == (f"{tmp_path / 'new'}, where nothing was pushed yet", "")
    assert "DVC's remote" not in ask(CLOSEDLOOP_DATA__REMOTE="")


class Scraped(BaseHTTPRequestHandler):
    """A service whose champion is version 7."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(
            b'closedloop_model_failed_customers_total{model_name="shop_churn",model_version="7",variant="champion"} 0\n'
        )

    def log_message(self, *_):
        pass


@pytest.mark.thorough
def test_a_prometheus_that_a_release_can_ask_or_cannot(ask, services, tmp_path):
    def probe(address, matchers="", **places):
        settings = {"CLOSEDLOOP_RELEASE__PROMETHEUS": address, "CLOSEDLOOP_RELEASE__PROMETHEUS_MATCHERS": matchers}
        return ask(**places, **settings)["Prometheus"]

    database = Database(services["store"])
    database.upgrade()
    if Journal(database).read_deployment("shop_churn") is None:
        deploy(database, Deployment("shop_churn", 0, "7", "salt", dt.datetime.now(dt.UTC)))
    with ThreadingHTTPServer(("127.0.0.1", 0), Scraped) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with run_prometheus(tmp_path, {"serving": f"127.0.0.1:{server.server_port}"}) as address:
            query = f"{address}/api/v1/query?query=increase(closedloop_model_failed_customers_total[1m])"
            wait_until(lambda: "model_version" in (fetch(query) or ""), "two scrapes")
            found = probe(address)
            assert (found.text, found.remedy) == ("reachable, and knows version 7", "")
            found = probe(address, 'namespace="elsewhere"')
            series = 'closedloop_model_failed_customers_total{model_name="shop_churn",namespace="elsewhere"}'
            assert f"it knows no {series} of version 7" in found.text
            assert "let it scrape the service" in found.remedy
            assert "400" in probe(address, "namespace=").text
            nowhere = services["store"].replace("127.0.0.1:", "127.0.0.1:1/")
            found = probe(address, store=nowhere)  # without the store nobody knows which version
            assert (found.text, found.remedy) == ("reachable", "")
        found = probe(f"http://127.0.0.1:{server.server_port}")
        assert "its answer is not Prometheus'" in found.text
        assert "release.prometheus" in found.remedy
        server.shutdown()


@pytest.mark.thorough
def test_a_bucket_that_is_away(ask, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    account = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": f"http://{NOWHERE}"}
    found = ask(CLOSEDLOOP_TRACKING__ARTIFACTS="s3://closedloop-artifacts/mlflow", **account)
    assert "artifacts at s3://closedloop-artifacts/mlflow: " in found["artifacts"].text
    assert "onnect" in found["artifacts"].text
    assert "the bucket's credentials" in found["artifacts"].remedy
