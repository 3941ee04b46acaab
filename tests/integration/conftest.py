"""The databases that the operations store runs on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from tests.services import PostgresServer, run_postgres


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server, with as many databases as a module's tests make."""
    with run_postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a database that a module's tests share."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('store') / 'operations.db'}"
    made: str = request.getfixturevalue("postgres").create_database()
    return made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Predictions]:
    """A store in a file of the test's own; tests of the store itself take a `database`."""
    made = Predictions(Database(f"sqlite:///{tmp_path / 'operations.db'}"))
    made.database.upgrade()
    yield made
    made.database.close()
