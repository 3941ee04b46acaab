"""A role of PostgreSQL for the service's pods alone, as the runbook makes it: it stores, and rewrites nothing."""

from __future__ import annotations

import contextlib
import re

import psycopg
import pytest

from closedloop.store.database import Database
from closedloop.store.journal import Journal
from closedloop.store.predictions import Predictions
from tests.deployments import deploy
from tests.docs.test_docs import ROOT
from tests.integration.test_journal import ROW as DEPLOYMENT
from tests.integration.test_store import MODEL, POSITION, predict, report
from tests.services import PostgresServer

pytestmark = pytest.mark.thorough
REWRITES = (
    "UPDATE deployments SET champion_version = '9'",
    "UPDATE journal SET entry = '{}'",
    "INSERT INTO journal SELECT * FROM journal",
    "UPDATE predictions SET score = 0",
    "DELETE FROM outcomes",
)


@pytest.fixture
def database(postgres: PostgresServer) -> str:
    """With a champion, and with the role that the runbook makes."""
    url = postgres.create_database()
    with contextlib.closing(Database(url)) as database:
        database.upgrade()
        deploy(database, DEPLOYMENT)
    (statements,) = re.findall(r"```sql\n([^`]*)```", (ROOT / "docs/runbook.md").read_text(encoding="utf-8"))
    with psycopg.connect(url) as connection:
        connection.execute(statements.replace("'...'", "'x'"))
    return url.replace("//closedloop:", "//closedloop_service:")


def test_the_service_s_role_stores_and_rewrites_nothing(database: str) -> None:
    store = Predictions(Database(database))
    store.database.upgrade()  # as an agent does, whose schema is there
    assert store.insert([predict("a"), predict("b")], POSITION).predictions == 2
    assert store.insert([report("a"), predict("b")], POSITION).outcomes == 1
    assert store.read_position(MODEL, POSITION.spool) == POSITION
    found = Journal(store.database).read_deployment(MODEL)
    assert found
    assert found.champion_version == DEPLOYMENT.champion_version
    store.database.close()
    for statement in REWRITES:
        with psycopg.connect(database) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement)
