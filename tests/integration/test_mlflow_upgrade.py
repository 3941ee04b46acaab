"""MLflow's own database, as its pod brings it up to date before its server starts: on a real PostgreSQL."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest
import sqlalchemy as sa

from tests.manifests import render
from tests.services import run_postgres

pytestmark = pytest.mark.thorough
OLDER, REVISION = "400f98739977", "SELECT version_num FROM alembic_version"  # MLflow 3.0's, and how to ask for it


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with run_postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


def upgrade(url: str) -> None:
    """What the Deployment's first container does."""
    (found,) = (
        one
        for one in render("production")
        if one["metadata"]["name"] == "closedloop-mlflow" and one["kind"] == "Deployment"
    )
    (box,) = found["spec"]["template"]["spec"]["initContainers"]
    arguments = [word.replace("$(MLFLOW_BACKEND_STORE_URI)", url) for word in box["args"]]
    given = {one["name"]: one["value"] for one in box["env"] if "value" in one}
    ran = subprocess.run(
        [*box["command"], *arguments], env=os.environ | given, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def read(url: str, statement: str) -> str:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return str(connection.execute(sa.text(statement)).scalar_one())


def verify(url: str) -> None:
    """What the server refuses to start by, where no table is missing."""
    from mlflow.store.db.utils import _verify_schema

    _verify_schema(sa.create_engine(url, poolclass=sa.NullPool))


def make_older(url: str) -> None:
    """A database of an earlier release, with an experiment in it."""
    from alembic import command
    from mlflow.store.db.utils import InitialBase, _get_alembic_config

    engine = sa.create_engine(url, poolclass=sa.NullPool)
    InitialBase.metadata.create_all(engine)
    config = _get_alembic_config(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, OLDER)
        connection.execute(sa.text("INSERT INTO experiments (name, lifecycle_stage) VALUES ('kept', 'active')"))


def test_an_empty_database_gets_its_tables_and_a_second_time_nothing_happens(postgres):
    url = postgres.create_database().replace("postgresql:", "postgresql+psycopg:")
    upgrade(url)
    found = read(url, REVISION)
    upgrade(url)
    assert read(url, REVISION) == found
    verify(url)


def test_a_database_of_an_earlier_release_is_brought_up_to_date_with_what_is_in_it(postgres):
    from mlflow.exceptions import MlflowException

    url = postgres.create_database().replace("postgresql:", "postgresql+psycopg:")
    make_older(url)
    with pytest.raises(MlflowException, match="out-of-date database schema"):
        verify(url)
    upgrade(url)
    verify(url)
    assert read(url, "SELECT name FROM experiments") == "kept"
