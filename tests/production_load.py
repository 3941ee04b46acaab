"""The production profile's service under load, what of it is stored, and the loss of a server meanwhile."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa

from tests.http_service import HttpService, Load, wait_until
from tests.production import PASSWORD, Production, name_databases

OUTAGE_SECONDS = float(os.environ.get("CLOSEDLOOP_OUTAGE_SECONDS", "60"))
DAY = "2024-01-01"  # of the data
GENTLE: dict[str, Any] = {"clients": 2, "pause_seconds": 0.01}  # what other tests of this store have to read, too


class Server(Protocol):
    """What can be away."""

    def start(self) -> None:
        """Be there again, with all that was kept."""

    def stop(self) -> None:
        """Be gone."""


@contextmanager
def serve(
    production: Production, root: Path, rows: Sequence[dict[str, Any]], *arguments: str, **ports: int
) -> Iterator[tuple[HttpService, Load]]:
    """The service as a pod of the cluster, under load."""
    service = HttpService(root, production.environment, arguments or ("--as-of", DAY), **ports)
    try:
        service.start()
        with Load(service, rows=rows, **GENTLE) as load:
            load.wait_for(50)
            yield service, load
    finally:
        service.stop()


def read_stored(production: Production) -> Counter[str]:
    """The requests whose answers are in the operations store, and how often each."""
    engine = sa.create_engine(production.environment["CLOSEDLOOP_OPERATIONS__URL"], poolclass=sa.NullPool)
    with engine.connect() as connection:
        statement = "SELECT request_id FROM predictions WHERE variant <> 'shadow'"
        return Counter(connection.execute(sa.text(statement)).scalars())


def read_registry(production: Production) -> dict[int, str | None]:
    """Aliases by version, as MLflow's database holds them."""
    engine = sa.create_engine(name_databases(production.postgres)["mlflow"], poolclass=sa.NullPool)
    join = "LEFT JOIN registered_model_aliases a ON a.name = v.name AND a.version = v.version"
    with engine.connect() as connection:
        found = connection.execute(sa.text(f"SELECT v.version, a.alias FROM model_versions v {join}"))
        return {row.version: row.alias for row in found}


@contextmanager
def keep_all(
    production: Production, root: Path, rows: Sequence[dict[str, Any]], customers: Sequence[str]
) -> Iterator[tuple[HttpService, Load, Load]]:
    """Version 1 under load of rows and of ids; in the end all answers are stored, each once, and nothing else."""
    before = read_stored(production)
    with (
        serve(production, root, rows) as (service, inline),
        Load(service, customers=customers, may_refuse=True, **GENTLE) as by_id,
    ):
        by_id.wait_for(50)
        yield service, inline, by_id
        inline.stop()
        by_id.stop()
        answers = [*inline.answers, *by_id.answers]
        goal = before.total() + len(answers)
        wait_until(lambda: read_stored(production).total() >= goal, "all answers in the store")
    assert inline.failures == by_id.failures == []
    assert {answer["model_version"] for answer in answers} == {"1"}
    assert read_stored(production) - before == Counter(answer["request_id"] for answer in answers)
    print(f"{len(inline.answers)} answers of rows, {len(by_id.answers)} by id, {len(by_id.refused)} refused")


@contextmanager
def lose(server: Server, *loads: Load) -> Iterator[None]:
    """A server that is away for the outage's length at least, while these loads are answered."""
    server.stop()
    back_at = time.monotonic() + OUTAGE_SECONDS
    try:
        yield
        while time.monotonic() < back_at:
            for load in loads:
                load.wait_for(10)
    finally:
        server.start()


def fail(production: Production, root: Path, *command: str) -> str:
    """A command that must end with a clear error; returns what it said."""
    output = production.run(root, *command, status=None)
    assert "Traceback" not in output, output
    assert PASSWORD not in output
    return " ".join(output.split())
