"""The production profile on real servers: PostgreSQL, Redis, MLflow with accounts, and an S3 server in this process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from closedloop.processes import start_process
from tests.conftest import SMALL_SHOP, SOURCE_ROOT, Project, create_project
from tests.http_service import wait_until
from tests.services import PostgresServer, RedisServer, find_free_port, run_postgres, run_redis

BUCKETS = ("closedloop-data", "closedloop-artifacts")
PASSWORD = "an0ther-s3cret"
DATABASES = ("closedloop", "mlflow", "mlflow_accounts", "feast")  # as k8s/overlays/local/databases.sql has them
ACCOUNT = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "something", "AWS_DEFAULT_REGION": "eu-west-1"}
WEAK = {"model": {"params": {"max_iter": 8, "max_leaf_nodes": 3}}}  # passes its gates, and loses against the default
GIT = ["git", "-c", "user.name=tester", "-c", "user.email=tester@example.com", "-c", "gc.auto=0"]


@dataclass
class Bucket:
    """An S3 server; what was stored outlives ``stop``."""

    port: int = field(default_factory=find_free_port)
    _server: Any = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen."""
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        """Refuse connections."""
        self._server.stop()
        self._server._server.server_close()

    def client(self) -> Any:
        """boto3's client of it."""
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.url, aws_access_key_id="someone", aws_secret_access_key="something",
            region_name="eu-west-1",
        )  # fmt: skip


@dataclass
class Production:
    """The servers, and what a process must have in its environment to reach them."""

    postgres: PostgresServer
    redis: RedisServer
    bucket: Bucket
    mlflow: MlflowServer
    environment: dict[str, str]

    def run(self, root: Path, *command: str, status: int | None = 0, **environment: str) -> str:
        """Run a program in a project's folder; returns all that it writes. Status None is any but 0."""
        ran = subprocess.run(
            command, cwd=root, env=os.environ | self.environment | environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        as_expected = ran.returncode == status if status is not None else ran.returncode != 0
        assert as_expected, f"{' '.join(command)} ended with {ran.returncode}:\n{ran.stdout}"
        return ran.stdout


def name_databases(postgres: PostgresServer) -> dict[str, str]:
    """Addresses of all databases, by what is in them."""
    return {name: f"postgresql+psycopg://closedloop:x@127.0.0.1:{postgres.port}/{name}" for name in DATABASES}


def describe_environment(postgres: PostgresServer, redis: RedisServer, bucket: Bucket, mlflow: str) -> dict[str, str]:
    """What `k8s/external.yaml` and the host names of configs/production.yaml stand for."""
    databases = name_databases(postgres)
    overrides = {
        "registry": {"path": databases["feast"]},
        "online_store": {"connection_string": redis.address},
    }
    return {
        "CLOSEDLOOP_PROFILE": "production",
        "CLOSEDLOOP_OPERATIONS__URL": databases["closedloop"],
        "CLOSEDLOOP_FEATURES__OVERRIDES": json.dumps(overrides),
        "CLOSEDLOOP_TRACKING__URI": mlflow,
        "CLOSEDLOOP_SERVING__HOST": "127.0.0.1",
        "CLOSEDLOOP_RELEASE__JOURNAL_KEY": "a-key-of-the-journal-of-32-characters",
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_ENDPOINT_URL": bucket.url,
        **ACCOUNT,
    }


@dataclass
class MlflowServer:
    """MLflow as k8s/base/mlflow starts it; its log and accounts' settings are in ``folder``."""

    folder: Path
    postgres: PostgresServer
    bucket: Bucket
    port: int = field(default_factory=find_free_port)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        databases = name_databases(self.postgres)
        self.folder.mkdir(exist_ok=True)
        (self.folder / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {databases['mlflow_accounts']}\n"
            f"admin_username = admin\nadmin_password = {PASSWORD}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
            encoding="utf-8",
        )
        environment = os.environ | ACCOUNT | {
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
            "MLFLOW_BACKEND_STORE_URI": databases["mlflow"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "k",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_S3_ENDPOINT_URL": self.bucket.url,
        }  # fmt: skip
        command = ["mlflow", "server", "--app-name=basic-auth", "--workers=1", f"--port={self.port}"]
        command.append(f"--artifacts-destination=s3://{BUCKETS[1]}/mlflow")
        with (self.folder / "mlflow.log").open("ab") as log:
            self._process = start_process(command, env=environment, stdout=log, stderr=log, cwd=self.folder)
        wait_until(self._is_up, "start of MLflow", seconds=600)

    def stop(self) -> None:
        """Stop it and wait."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(180)

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "mlflow.log").read_text(encoding="utf-8")
        try:
            return bool(urllib.request.urlopen(f"{self.url}/health").status == 200)  # noqa: S310 - loopback
        except OSError:
            return False


def _empty(client: Any, bucket: str) -> None:
    """moto's servers of one process share what they hold: take away what an earlier one left."""
    if bucket not in [one["Name"] for one in client.list_buckets()["Buckets"]]:
        return
    for one in client.list_objects_v2(Bucket=bucket).get("Contents", []):
        client.delete_object(Bucket=bucket, Key=one["Key"])
    client.delete_bucket(Bucket=bucket)


@contextmanager
def run_servers(folder: Path) -> Iterator[tuple[PostgresServer, RedisServer, Bucket]]:
    """The three without MLflow; databases and buckets are there, and empty."""
    bucket = Bucket()
    bucket.start()
    client, where = bucket.client(), {"LocationConstraint": "eu-west-1"}
    for name in BUCKETS:
        _empty(client, name)
        client.create_bucket(Bucket=name, CreateBucketConfiguration=where)
    try:
        with run_postgres(folder) as postgres, run_redis(folder, keeps=True) as redis:
            for name in DATABASES:
                postgres.run("createdb", "--host=127.0.0.1", f"--port={postgres.port}", "--username=closedloop", name)
            yield postgres, redis, bucket
    finally:
        bucket.stop()


@contextmanager
def run_production(
    folder: Path, fill: Callable[[PostgresServer, Bucket], None] = lambda postgres, bucket: None
) -> Iterator[Production]:
    """All servers; databases and buckets are empty but for what ``fill`` puts into them before MLflow starts."""
    with run_servers(folder) as (postgres, redis, bucket):
        fill(postgres, bucket)
        mlflow = MlflowServer(folder / "mlflow", postgres, bucket)
        try:
            mlflow.start()
            environment = describe_environment(postgres, redis, bucket, mlflow.url)
            yield Production(postgres, redis, bucket, mlflow, environment)
        finally:
            mlflow.stop()


def create_repository(root: Path) -> Project:
    """The small shop in a repository with the Makefile, and an environment whose programs can be replaced."""
    made = create_project(root)
    made.change_params(SMALL_SHOP)
    ignored = shutil.ignore_patterns("__pycache__", "cache", "tmp", "*.local", "plots_template.html")
    for name in ("src", ".dvc", "pipelines"):
        shutil.copytree(SOURCE_ROOT / name, root / name, ignore=ignored)
    for name in (".gitignore", "Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(SOURCE_ROOT / name, root / name)
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main"], cwd=root, check=True)
    link_environment(root)
    return made


def commit(root: Path, message: str) -> None:
    """All that Git does not ignore."""
    for arguments in (["add", "--all"], ["commit", "--quiet", "--message", message]):
        subprocess.run([*GIT, *arguments], cwd=root, check=True)


def link_environment(root: Path, *, stamps: bool = True) -> None:
    """A .venv of links to this one: what is put into its bin stands in for a program.

    With ``stamps``, `make` finds it installed.
    """
    own = Path(sys.prefix)
    (root / ".venv/bin").mkdir(parents=True)
    for program in (own / "bin").iterdir():
        (root / ".venv/bin" / program.name).symlink_to(program)
    (root / ".venv/lib").symlink_to(own / "lib")
    shutil.copy(own / "pyvenv.cfg", root / ".venv/pyvenv.cfg")
    (root / ".venv/installed").touch()
    for name in () if not stamps else ("requirements.lock", "pyproject.toml"):
        os.utime(root / name, (0, 0))


def put_program(root: Path, name: str, text: str) -> None:
    """A program in the project's own environment, in place of what is there."""
    path = root / ".venv/bin" / name
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def train_first(production: Production, made: Project) -> None:
    """A weak model is trained, pushed, registered and champion."""
    made.change_params(WEAK)
    production.run(made.root, "closedloop", "store", "upgrade")
    production.run(made.root, "dvc", "repro")
    production.run(made.root, "closedloop", "release", "promote", "1")
    commit(made.root, "a weak model")
    production.run(made.root, "make", "--silent", "data-remote")
    production.run(made.root, "dvc", "push")
