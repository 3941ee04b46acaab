"""The operations store on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import fcntl
import os
import re
import secrets
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from closedloop.adapters import online_erasure
from closedloop.adapters import sqlalchemy as engines
from closedloop.core.release.entries import Deployment
from closedloop.errors import ConfigError, DataError, ServiceUnavailable
from closedloop.processes import start_process
from closedloop.records import LABEL_RULE, Outcome, Prediction
from closedloop.store import database
from closedloop.store.database import Database
from closedloop.store.journal import Journal
from closedloop.store.migrations.tables import CHECKS, DEPLOYMENTS, METADATA, OUTCOMES, PREDICTIONS, RETRAININGS
from closedloop.store.predictions import InsertResult, Predictions, Removed, SpoolPosition
from closedloop.store.status_queries import StatusQueries
from tests.services import PASSWORD, PostgresServer

pytestmark = pytest.mark.thorough

DAY = dt.timedelta(days=1)
SNAPSHOT = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
MODEL = "shop_churn"
POSITION = SpoolPosition(MODEL, "host-1-a", segment=3, offset=1_000)
ROW = Deployment(MODEL, 1, "7", "salt", SNAPSHOT, challenger_version="8", challenger_mode="canary", weight=0.25)


@pytest.fixture(scope="module")
def postgres_database(postgres: PostgresServer) -> str:
    return postgres.create_database()


@pytest.fixture
def postgres_url(postgres_database: str) -> str:
    """An empty database; a new one for each test would cost more than all else."""
    with psycopg.connect(postgres_database) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return postgres_database


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state/operations.db'}"
    emptied: str = request.getfixturevalue("postgres_url")
    return emptied


@pytest.fixture
def store(url: str) -> Iterator[Predictions]:
    made = Predictions(Database(url))
    made.database.upgrade()
    yield made
    made.database.close()


@pytest.fixture
def sqlite_file(tmp_path: Path) -> Path:
    """A file with the tables, which no connection is open to."""
    path = tmp_path / "operations.db"
    made = Predictions(Database(f"sqlite:///{path}"))
    made.database.upgrade()
    made.database.close()
    return path


def test_a_client_opens_no_more_connections_than_it_may(postgres_url: str) -> None:
    """Eight threads that each hold a transaction for a moment; the limit is two."""
    store = Predictions(Database(postgres_url, 2))
    store.database.upgrade()

    def count(_: int) -> int:
        with store.database.begin(write=False) as connection:
            connection.execute(sa.text("SELECT pg_sleep(0.05)"))
            mine = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND usename IS NOT NULL"
            return int(connection.execute(sa.text(mine)).scalar_one())

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(count, range(24)))
    store.database.close()
    assert max(found) == 2


def predict(prediction_id: str, **changes: Any) -> Prediction:
    values: dict[str, Any] = {
        "request_id": "r",
        "model_name": MODEL,
        "model_version": "7",
        "variant": "champion",
        "source": "http",
        "predicted_at": SNAPSHOT + DAY,
        "features": (1.0, "gold", None),
        "score": 0.25,
        "decision": 0,
        "latency_ms": 0.5,
        "customer_id": f"customer of {prediction_id}",
        "features_as_of": SNAPSHOT,
    }
    return Prediction(prediction_id, **(values | changes))


def report(prediction_id: str, outcome: int = 1, *, days: float = 40) -> Outcome:
    return Outcome(prediction_id, outcome, SNAPSHOT + days * DAY)


def read(store: Predictions, model_name: str = MODEL, **choice: Any) -> list[Prediction]:
    return [record for chunk in store.read_predictions(model_name, **choice) for record in chunk]


def list_ids(store: Predictions, **choice: Any) -> list[str]:
    """The ids that `list_outcomes` gives 100 days after the snapshot."""
    rows = store.list_outcomes(MODEL, as_of=SNAPSHOT + 100 * DAY, horizon_days=30, **choice)
    return list(rows["prediction_id"])


def count(store: Predictions, table: sa.Table) -> int:
    with store.database.begin(write=False) as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0


# --- schema


def describe_schema(connection: sa.Connection) -> dict[str, Any]:
    """What Alembic's comparison leaves out: checks and what happens on deletion."""
    inspector = sa.inspect(connection)
    return {
        table: (
            sorted((check["name"], check["sqltext"]) for check in inspector.get_check_constraints(table)),
            [(key["constrained_columns"], key["options"]) for key in inspector.get_foreign_keys(table)],
            sorted(key["name"] or "" for key in inspector.get_unique_constraints(table)),
            [(column["name"], column["nullable"]) for column in inspector.get_columns(table)],
        )
        for table in inspector.get_table_names()
        if table != "alembic_version"
    }


def test_migrations_lead_to_the_tables(store: Predictions) -> None:
    with store.database.begin(write=False) as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
        migrated = describe_schema(connection)
    assert set(migrated) == set(METADATA.tables)
    with store.database.begin() as connection:
        METADATA.drop_all(connection)
        METADATA.create_all(connection)
        assert migrated == describe_schema(connection)


def test_processes_that_upgrade_at_once_all_succeed(url: str) -> None:
    script = "import sys; from closedloop.store.database import Database; import alembic.command"
    script += "; store = Database(sys.argv[1]); print('ready', flush=True); sys.stdin.readline(); store.upgrade()"
    command = [sys.executable, "-c", script, url]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [start_process(command, text=True, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, errors
    store = Predictions(Database(url))
    assert store.insert([predict("a")]).predictions == 1
    store.database.close()


def test_an_upgrade_waits_for_another(
    store: Predictions, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for longer than a lock is waited for; the newcomer must not have started when it gives up."""
    monkeypatch.setattr(engines, "LOCK_WAIT_SECONDS", 0.1)
    monkeypatch.setitem(engines.POSTGRES_LIMITS, "options", "-c lock_timeout=100ms")
    newcomer = Predictions(Database(url))
    with store.database.begin() as connection:
        if store.database.dialect == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(database.UPGRADE_LOCK)))
        with pytest.raises(ServiceUnavailable, match="lock"):
            newcomer.database.upgrade()
    newcomer.database.upgrade()
    newcomer.database.close()


def test_the_folder_is_locked_before_the_file_is_opened(tmp_path: Path) -> None:
    """Of two that switch the journal's mode at once SQLite refuses one without waiting, once in a hundred times."""
    store = Predictions(Database(f"sqlite:///{tmp_path / 'operations.db'}"))

    def lock_too(*_: Any) -> None:
        folder = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(folder)

    sa.event.listen(store.database.engine, "connect", lock_too)
    with pytest.raises(BlockingIOError):
        store.database.upgrade()
    sa.event.remove(store.database.engine, "connect", lock_too)
    lock_too()
    store.database.upgrade()
    store.database.close()


def test_upgrade_keeps_what_is_there(store: Predictions) -> None:
    store.insert([predict("a")])
    store.database.upgrade()
    assert len(read(store)) == 1


def test_a_store_without_tables_names_the_command(url: str) -> None:
    if url.startswith("sqlite"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir()
    store = Predictions(Database(url))
    with pytest.raises(ConfigError, match="closedloop store upgrade"):
        store.insert([predict("a")])
    assert not url.startswith("sqlite") or not Path(url.removeprefix("sqlite:///")).exists()
    store.database.upgrade()
    assert store.insert([predict("a")]).predictions == 1
    store.database.close()


def pretend_newer(store: Predictions, oldest: str | None) -> None:
    """As a release after this one leaves it, with tables that code from revision ``oldest`` on can use."""
    with store.database.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
        connection.execute(sa.text("DELETE FROM schema_compatibility"))
        if oldest:
            connection.execute(sa.text("INSERT INTO schema_compatibility VALUES (:oldest)"), {"oldest": oldest})


@pytest.mark.parametrize("oldest", ["9998", None])
def test_a_newer_schema_is_refused(store: Predictions, url: str, oldest: str | None) -> None:
    pretend_newer(store, oldest)
    older = Predictions(Database(url))
    for use in (older.database.upgrade, lambda: older.insert([predict("a")])):
        with pytest.raises(ConfigError, match=r"revision 9999.*knows up to 0009"):
            use()
    older.database.close()


def test_a_newer_schema_that_this_code_can_use_is_used_and_kept(store: Predictions, url: str) -> None:
    store.insert([predict("a")])
    pretend_newer(store, "0005")
    older = Predictions(Database(url))
    older.database.upgrade()
    older.insert([predict("b")])
    assert [record.prediction_id for record in read(older)] == ["a", "b"]
    with older.database.begin(write=False) as connection:
        assert connection.scalar(sa.text("SELECT version_num FROM alembic_version")) == "9999"
    older.database.close()


def test_checks_and_their_retrainings_survive_the_new_verdict(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, upgrade = Database(url), database.command.upgrade
    with monkeypatch.context() as earlier:
        earlier.setattr(database.command, "upgrade", lambda config, _: upgrade(config, "0006"))
        kept.upgrade()
    times = {"as_of": SNAPSHOT, "since": SNAPSHOT, "until": SNAPSHOT, "recorded_at": SNAPSHOT}
    check = {"check_id": "a", "model_name": MODEL, "model_version": "7", **times, "predictions": 3, "outcomes": 1}
    request = {"trigger_id": "t", "model_name": MODEL, "check_id": "a", "requested_by": "m", "reason": "r"}
    with kept.connect("BEGIN IMMEDIATE") as connection, connection.begin():
        connection.execute(sa.insert(CHECKS).values(**check, verdict="retrain", evidence={"drift": [1]}))
        connection.execute(
            sa.insert(RETRAININGS).values(**request, as_of=SNAPSHOT, state="requested", updated_at=SNAPSHOT)
        )
        before = [connection.execute(sa.select(table)).all() for table in (CHECKS, RETRAININGS)]
    kept.upgrade()
    with kept.begin() as connection:
        assert [connection.execute(sa.select(table)).all() for table in (CHECKS, RETRAININGS)] == before
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
        connection.execute(sa.update(CHECKS).values(verdict="cannot tell"))
    for refused in (sa.update(CHECKS).values(verdict="fine"), sa.update(RETRAININGS).values(check_id="b")):
        with pytest.raises(DataError), kept.begin() as connection:
            connection.execute(refused)
    kept.close()


@pytest.fixture
def first_release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The code as far as it knew revision 0001 and no later one; undo it to come back."""
    versions = Path(database.__file__).parent / "migrations"
    folder = tmp_path / "first/migrations"
    shutil.copytree(versions, folder, ignore=shutil.ignore_patterns("000[2-9]*", "__pycache__"))
    configure = database.configure_alembic

    def configure_first(connection: sa.Connection | None = None) -> Any:
        config = configure(connection)
        config.set_main_option("script_location", str(folder))
        return config

    monkeypatch.setattr(database, "configure_alembic", configure_first)
    return monkeypatch


# As code of revision 0001 writes: it knows no column that came later.
OF_FIRST = (
    "INSERT INTO predictions (prediction_id, request_id, model_name, model_version, variant, source, predicted_at,"
    " features, score, decision, latency_ms, forced, snapshot_at, features_as_of)"
    " VALUES ('{0}', 'r', 'shop_churn', '7', 'champion', 'http', '{1}', '[1.5]', 0.5, 0, 0.5, false, '{2}', '{2}')",
    "INSERT INTO outcomes (prediction_id, outcome, reported_at) VALUES ('{0}', 1, '{3}')",
    "INSERT INTO outcomes (prediction_id, outcome, reported_at) VALUES ('{0}', 0, '{1}')",
)


def write_as_first(store: Predictions, name: str) -> None:
    """A prediction, the label rule's outcome of it, and a client's."""
    zone = "" if store.database.dialect == "sqlite" else "+00"
    times = [f"2024-0{month}-{day} {time}{zone}" for month, day, time in MOMENTS]
    with store.database.begin() as connection:
        for statement in OF_FIRST:
            connection.exec_driver_sql(statement.format(name, *times))


MOMENTS = ((3, "05", "10:00:00.250000"), (3, "05", "00:00:00.000000"), (4, "04", "00:00:00.000000"))


def test_rows_of_the_previous_revision_are_kept_and_its_code_runs_on(
    first_release: pytest.MonkeyPatch, url: str
) -> None:
    before = Predictions(Database(url))
    before.database.upgrade()
    write_as_first(before, "a")
    with before.database.begin() as connection:
        connection.execute(
            sa.insert(DEPLOYMENTS).values({column.name: getattr(ROW, column.name) for column in DEPLOYMENTS.c})
        )
    with before.database.begin(write=False) as connection:
        assert "checks" not in sa.inspect(connection).get_table_names()
    first_release.undo()
    now = Predictions(Database(url))
    with pytest.raises(ConfigError, match=r"at revision 0001, this release needs 0009; run `closedloop store upgrade`"):
        read(now)
    now.database.upgrade()
    assert Journal(now.database).read_deployment(MODEL) == ROW
    assert [(one.prediction_id, one.client) for one in read(now)] == [("a", None)]
    with now.database.begin(write=False) as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
        found = connection.execute(sa.text("SELECT outcome, reported_by FROM outcomes ORDER BY outcome")).all()
        assert [tuple(row) for row in found] == [(0, None), (1, LABEL_RULE)]  # the rule's are of a midnight
    write_as_first(before, "b")
    assert len(read(now)) == 2
    now.database.close()
    before.database.close()


def test_code_of_the_previous_revision_starts_on_the_new_tables(
    store: Predictions, first_release: pytest.MonkeyPatch, url: str
) -> None:
    before = Predictions(Database(url))
    before.database.upgrade()
    write_as_first(before, "a")
    with before.database.begin() as connection:
        connection.execute(
            sa.insert(DEPLOYMENTS).values({column.name: getattr(ROW, column.name) for column in DEPLOYMENTS.c})
        )
    assert before.purge(MODEL, keep_days=0, as_of=SNAPSHOT + 100 * DAY) == Removed(1, 2)
    before.database.close()


# --- predictions


def test_every_field_comes_back(store: Predictions) -> None:
    east = dt.timezone(dt.timedelta(hours=2))
    full = Prediction(
        prediction_id="a" * 48,
        request_id="übung 'quoted' \\ 100% :x",
        model_name=MODEL,
        model_version="12",
        variant="shadow",
        source="stream",
        predicted_at=dt.datetime(2024, 3, 31, 1, 30, 0, 123456, tzinfo=east),
        features=(0.1, -0.0, 5e-324, 1.7976931348623157e308, "naïve \U0001f600", "", None, 3),
        score=0.1 + 0.2,
        decision=1,
        latency_ms=0.1234567890123,
        customer_id="Ærøskøbing",
        features_as_of=dt.datetime(2024, 3, 31, tzinfo=dt.UTC),
        answered_id="b" * 48,
        forced=True,
        client="0badc0de",
        revision=2**40,
    )
    bare = predict("c", customer_id=None, features_as_of=None, features=())
    store.insert([full, bare])
    assert read(store, ids=[full.prediction_id, "c", "unknown"]) in ([full, bare], [bare, full])
    (back,) = read(store, ids=[full.prediction_id])
    assert back.predicted_at.isoformat() == "2024-03-30T23:30:00.123456+00:00"
    assert str(back.features[1]) == "-0.0"


def test_what_is_there_is_not_doubled(store: Predictions) -> None:
    records = [predict("a"), report("a"), predict("b"), predict("a")]
    assert store.insert(records) == InsertResult(predictions=2, outcomes=1, duplicates=1)
    changed = predict("a", score=0.75)
    assert store.insert([changed, *records]) == InsertResult(predictions=0, outcomes=0, duplicates=5)
    assert [(record.prediction_id, record.score) for record in read(store)] == [("a", 0.25), ("b", 0.25)]
    assert store.insert([]) == InsertResult(0, 0, 0)


def test_two_that_store_the_same_at_once_double_nothing(store: Predictions) -> None:
    records = [predict(f"{number:05}") for number in range(3_000)]
    barrier = threading.Barrier(2)

    def insert(_: int) -> InsertResult:
        barrier.wait()
        return store.insert(records)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(insert, range(2)))
    assert sum(result.predictions for result in results) == sum(result.duplicates for result in results) == 3_000
    assert count(store, PREDICTIONS) == 3_000


@pytest.mark.parametrize(
    ("fault", "only_on"),
    [
        ({"score": 1.5}, None),
        ({"score": float("nan")}, None),
        ({"decision": 2}, None),
        ({"predicted_at": dt.datetime(2024, 1, 1)}, None),  # noqa: DTZ001 - no zone is the fault
        ({"customer_id": "nul\0byte"}, "postgresql"),
        ({"customer_id": "".join(secrets.token_hex(8) for _ in range(1_000))}, "postgresql"),
    ],
)
def test_a_row_that_cannot_be_held_stops_no_other(
    store: Predictions, fault: dict[str, Any], only_on: str | None
) -> None:
    if only_on not in (None, store.database.dialect):
        assert store.insert([predict("bad", **fault)]).refused == ()
        return
    records = [predict(f"{number:03}") for number in range(100)]
    records[37] = predict("bad", **fault)
    result = store.insert(records, POSITION)
    assert (result.predictions, result.duplicates) == (99, 0)
    ((refused, reason),) = result.refused
    assert refused == "bad"
    assert reason
    assert "customer of" not in reason
    assert "bad" not in {record.prediction_id for record in read(store)}
    assert store.read_position(MODEL, POSITION.spool) == POSITION


def test_predictions_are_read_by_time_in_chunks(store: Predictions) -> None:
    minute = dt.timedelta(minutes=1)
    records = [predict(f"{number:05}", predicted_at=SNAPSHOT + number * minute) for number in range(12_000)]
    store.insert([*reversed(records), predict("x", model_name="other")])
    assert [len(chunk) for chunk in store.read_predictions(MODEL)] == [5_000, 5_000, 2_000]
    assert read(store) == records
    assert read(store, since=SNAPSHOT + 11_998 * minute) == records[-2:]
    assert len(read(store, ids=[record.prediction_id for record in records] + ["x"])) == 12_000
    assert [record.prediction_id for record in read(store, "other")] == ["x"]


# --- exactly once


def test_rows_and_position_are_one_transaction(store: Predictions) -> None:
    def fail(_: sa.Connection) -> None:
        raise RuntimeError("killed")

    assert store.read_position(MODEL, POSITION.spool) is None
    sa.event.listen(store.database.engine, "commit", fail)
    with pytest.raises(RuntimeError):
        store.insert([predict("a"), report("a")], POSITION)
    sa.event.remove(store.database.engine, "commit", fail)
    assert (count(store, PREDICTIONS), count(store, OUTCOMES)) == (0, 0)
    assert store.read_position(MODEL, POSITION.spool) is None
    store.insert([predict("a")], POSITION)
    assert store.read_position(MODEL, POSITION.spool) == POSITION


def test_positions_are_kept_by_model_and_spool(store: Predictions) -> None:
    later = dataclasses.replace(POSITION, segment=4, offset=0)
    others = [dataclasses.replace(POSITION, spool="host-1-b"), dataclasses.replace(POSITION, model_name="other")]
    for position in (POSITION, *others, later):
        store.insert([], position)
    for position in (later, *others):
        assert store.read_position(position.model_name, position.spool) == position


DRAIN = """
import os, signal, sys
import sqlalchemy as sa
from closedloop.store.journal import Journal
from closedloop.store.predictions import InsertResult, Predictions, Removed, SpoolPosition
from closedloop.records import Outcome, Prediction
from closedloop.store.database import Database
import datetime as dt
url, when = sys.argv[1:]
store, now = Predictions(Database(url)), dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
done = store.read_position("shop_churn", "spool")
start = 0 if done is None else done.offset
for first in range(start, 1_000, 100):
    numbers = range(first, first + 100)
    records = [Prediction(f"{n:04}", "", "shop_churn", "7", "champion", "http", now, (), 0.5, 1, 0.1) for n in numbers]
    records += [Outcome(f"{n:04}", 1, now) for n in numbers]
    if first == start + 200 and when == "before":
        sa.event.listen(store.database.engine, "commit", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    result = store.insert(records, SpoolPosition("shop_churn", "spool", 1, first + 100))
    if first == start + 200 and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    print(result.predictions, result.outcomes, result.duplicates, len(result.refused), flush=True)
"""


def test_a_drain_that_is_killed_loses_and_doubles_nothing(store: Predictions, url: str) -> None:
    printed = []
    for when, status in (("before", -9), ("after", -9), ("before", -9), ("never", 0)):
        ran = subprocess.run([sys.executable, "-c", DRAIN, url, when], capture_output=True, text=True, check=False)
        assert ran.returncode == status, ran.stderr
        printed += ran.stdout.splitlines()
    # 2 batches, 2 and the one whose answer was lost, 2, and the 3 that are left; the lost transactions came again
    assert printed == ["100 100 0 0"] * 9
    assert (count(store, PREDICTIONS), count(store, OUTCOMES)) == (1_000, 1_000)


# --- outcomes


def test_the_first_outcome_counts_and_corrections_append(store: Predictions) -> None:
    """The first to be reported: another worker's spool may have brought it last."""
    store.insert([predict("a"), report("a", 1, days=40)])
    assert store.insert([report("a", 0, days=41)]).outcomes == 1
    assert store.insert([report("a", 0, days=10)]).outcomes == 1
    rows = store.list_outcomes(MODEL, as_of=SNAPSHOT + 100 * DAY, horizon_days=30)
    assert rows[["prediction_id", "outcome", "reported_at"]].values.tolist() == [["a", 0, SNAPSHOT + 10 * DAY]]
    with store.database.begin(write=False) as connection:
        kept = connection.scalars(sa.select(OUTCOMES.c.outcome).order_by(OUTCOMES.c.sequence)).all()
    assert kept == [1, 0, 0]


def test_an_outcome_lies_unseen_until_its_prediction_arrives(store: Predictions) -> None:
    """Its prediction may stand in another replica's spool."""
    result = store.insert([report("early"), report("a"), report("early", 0), predict("a")])
    assert result == InsertResult(predictions=1, outcomes=3, duplicates=0)
    assert list_ids(store) == ["a"]
    figures = StatusQueries(store.database)
    assert figures.measure_accuracy(MODEL, "7", closed_by=SNAPSHOT + DAY).whole == 1
    assert store.insert([predict("early")]).predictions == 1
    assert sorted(list_ids(store)) == ["a", "early"]
    assert figures.measure_accuracy(MODEL, "7", closed_by=SNAPSHOT + DAY).whole == 2


def test_an_outcome_whose_prediction_never_came_is_purged_when_predictions_of_its_age_are(store: Predictions) -> None:
    store.insert([report("never", days=40), report("not yet", days=60)])
    assert store.purge(MODEL, keep_days=50, as_of=SNAPSHOT + 100 * DAY) == Removed(0, 1)
    assert store.insert([predict("never"), predict("not yet")]).predictions == 2
    assert list_ids(store) == ["not yet"]


def test_what_is_kept_before_the_commit_is_kept_of_what_was_inserted(store: Predictions) -> None:
    """A batch that cannot be kept elsewhere is not stored either."""

    def fail(result: InsertResult) -> None:
        assert (result.predictions, result.refused[0][0]) == (1, "impossible")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        store.insert([predict("a"), predict("impossible", score=2.0)], POSITION, before_commit=fail)
    assert (read(store), store.read_position(MODEL, POSITION.spool)) == ([], None)


def test_more_outcomes_than_a_statement_takes(store: Predictions) -> None:
    ids = [f"{number:05}" for number in range(40_000)]
    result = store.insert([predict(name) for name in ids[:39_000]] + [report(name) for name in ids])
    assert (result.predictions, result.outcomes, result.refused) == (39_000, 40_000, ())


@pytest.mark.parametrize(
    "changes",
    [
        {"features_as_of": SNAPSHOT, "predicted_at": SNAPSHOT + 20 * DAY},
        {"features_as_of": None, "predicted_at": SNAPSHOT},
        {"features_as_of": None, "predicted_at": SNAPSHOT + DAY - dt.timedelta(microseconds=1)},
        {
            "features_as_of": None,  # still the first of January in UTC
            "predicted_at": dt.datetime(2024, 1, 2, 1, tzinfo=dt.timezone(dt.timedelta(hours=5))),
        },
    ],
)
def test_outcomes_wait_for_their_horizon(store: Predictions, changes: dict[str, Any]) -> None:
    store.insert([predict("a", **changes), report("a", days=2)])
    closes = SNAPSHOT + 30 * DAY
    early = store.list_outcomes(MODEL, as_of=closes - dt.timedelta(microseconds=1), horizon_days=30)
    assert early.empty
    rows = store.list_outcomes(MODEL, as_of=closes, horizon_days=30)
    assert list(rows["snapshot_at"]) == [SNAPSHOT]
    assert early.dtypes.to_dict() == rows.dtypes.to_dict()


def test_statistics_count_one_row_per_customer_snapshot_and_version(store: Predictions) -> None:
    anna = {"customer_id": "anna"}
    store.insert(
        [
            predict("a1", **anna, predicted_at=SNAPSHOT + 1 * DAY),
            predict("a2", **anna, predicted_at=SNAPSHOT + 2 * DAY),
            predict("a3", **anna, predicted_at=SNAPSHOT + 3 * DAY, features_as_of=SNAPSHOT + DAY),
            predict("a4", **anna, predicted_at=SNAPSHOT + 4 * DAY, model_version="8"),
            predict("a5", **anna, predicted_at=SNAPSHOT + 5 * DAY, model_name="other"),
            predict("n1", customer_id=None, predicted_at=SNAPSHOT + 6 * DAY),
            predict("n2", customer_id=None, predicted_at=SNAPSHOT + 7 * DAY),
            predict("silent"),
        ]
    )
    store.insert([report("a2", 0)])  # the first that was reported for her, and so it stays
    store.insert([report(name, 1) for name in ("a1", "a3", "a4", "a5", "n1", "n2")])
    rows = store.list_outcomes(MODEL, as_of=SNAPSHOT + 100 * DAY, horizon_days=30)
    assert list(zip(rows["prediction_id"], rows["outcome"], strict=True)) == [
        ("a2", 0), ("a3", 1), ("a4", 1), ("n1", 1), ("n2", 1)
    ]  # fmt: skip
    assert rows["customer_id"].tolist() == ["anna"] * 3 + [None] * 2


def test_forced_are_left_out_and_shadow_unless_asked_for(store: Predictions) -> None:
    store.insert(
        [
            predict("a", customer_id="anna", score=0.75, decision=1),
            predict("s", customer_id="anna", model_version="8", variant="shadow", answered_id="a", score=0.5),
            predict("f", customer_id="anna", model_version="9", forced=True),
            predict("t", customer_id="anna", model_version="8", variant="shadow", answered_id="f", forced=True),
            report("a"),
            report("f", 0),
        ]
    )
    assert list_ids(store) == ["a"]
    rows = store.list_outcomes(MODEL, as_of=SNAPSHOT + 100 * DAY, horizon_days=30, include_shadow=True)
    values = rows[["prediction_id", "model_version", "variant", "score", "decision", "outcome"]].values.tolist()
    assert values == [["a", "7", "champion", 0.75, 1, 1], ["s", "8", "shadow", 0.5, 0, 1]]
    chosen = store.list_outcomes(
        MODEL, as_of=SNAPSHOT + 100 * DAY, horizon_days=30, include_shadow=True, versions=("8", "9")
    )
    assert chosen["prediction_id"].tolist() == ["s"]
    assert isinstance(rows["predicted_at"].dtype, pd.DatetimeTZDtype)


# --- purge and erasure


def test_purge_removes_what_is_older_than_it_keeps(store: Predictions) -> None:
    edge = SNAPSHOT + 10 * DAY
    store.insert(
        [
            predict("old", predicted_at=edge - dt.timedelta(microseconds=1)),
            predict("edge", predicted_at=edge),
            predict("older of another", predicted_at=SNAPSHOT, model_name="other"),
            report("old"),
            report("old", 0),
            report("edge"),
            report("older of another"),
        ],
        POSITION,
    )
    moment = {"keep_days": 90, "as_of": SNAPSHOT + 100 * DAY}
    assert store.purge(MODEL, **moment) == Removed(predictions=1, outcomes=2)
    assert [record.prediction_id for record in read(store)] == ["edge"]
    assert len(read(store, "other")) == 1
    assert store.purge("other", **moment) == Removed(predictions=1, outcomes=1)
    assert store.purge("other", **moment) == Removed(0, 0)
    assert count(store, OUTCOMES) == 1
    assert store.read_position(MODEL, POSITION.spool) == POSITION


def test_erasure_removes_a_customer_from_all_models(store: Predictions) -> None:
    for model_name in (MODEL, "other"):
        records = [predict(f"{model_name} {name}", model_name=model_name, customer_id=name) for name in ("anna", "bob")]
        store.insert([*records, *[report(record.prediction_id) for record in records]])
    assert store.erase("nobody") == Removed(0, 0)
    assert store.erase("anna") == Removed(2, 2)
    assert [record.customer_id for record in read(store, "other")] == ["bob"]
    assert store.erase("bob") == Removed(2, 2)
    assert (count(store, PREDICTIONS), count(store, OUTCOMES)) == (0, 0)


@pytest.mark.parametrize("asked", ["1", "1.0", " 1"])
def test_erasure_finds_each_spelling_of_an_id(store: Predictions, asked: str) -> None:
    spelt = ["1", "1.0", "10", "1.5", "01"]
    store.insert([predict(str(number), customer_id=name) for number, name in enumerate(spelt)])
    assert store.erase(asked) == Removed(2, 0)
    assert {record.customer_id for record in read(store)} == {"10", "1.5", "01"}


@pytest.mark.parametrize("asked", ["Re\u0301ne\u0301", "R\u00e9n\u00e9"])
def test_erasure_finds_an_id_however_its_marks_were_written(store: Predictions, asked: str) -> None:
    spelt = ["Re\u0301ne\u0301", "R\u00e9n\u00e9", "Rene"]
    store.insert([predict(str(number), customer_id=name) for number, name in enumerate(spelt)])
    assert store.erase(asked) == Removed(2, 0)
    assert {record.customer_id for record in read(store)} == {"Rene"}


@pytest.mark.parametrize("customer", ["x'; DROP TABLE predictions; --", "' OR '1'='1", "%", 'x"', "x\\", "x\n"])
def test_a_customers_id_is_a_value_and_no_sql(store: Predictions, customer: str) -> None:
    store.insert([predict("a", customer_id="anna"), predict("b", customer_id=customer)])
    assert store.erase(customer) == Removed(1, 0)
    assert store.erase(customer) == Removed(0, 0)
    assert [record.customer_id for record in read(store)] == ["anna"]


def find_traces(store: Predictions, word: str) -> int:
    """How often a word stands in the database: in an SQLite file and its log, or in what PostgreSQL shows of itself."""
    if store.database.dialect == "sqlite":
        name = store.database.engine.url.database or ""
        return sum(Path(path).read_bytes().count(word.encode()) for path in (name, f"{name}-wal"))
    with store.database.begin(write=False) as connection:
        tables = sa.inspect(connection).get_table_names()
        shown = [connection.execute(sa.select(sa.text("*")).select_from(sa.table(table))).all() for table in tables]
        shown.append(connection.execute(sa.text("SELECT * FROM pg_stats WHERE schemaname = 'public'")).all())
    return str(shown).count(word)


def test_the_command_erases_a_customer_and_nobody_else(project: Any) -> None:
    project.run("store", "upgrade")
    kept = Predictions(Database(f"sqlite:///{project.root / 'state/operations.db'}"))
    kept.insert([predict(name, customer_id=name) for name in ("anna", "bob")] + [report("anna"), report("bob")])
    output = project.run("store", "erase", "--customer-id", "anna").output
    offline = project.root.resolve() / "state/feast/offline"
    assert f"deleted rows of features: online 0; nothing is published in {offline}\n" in output
    assert "deleted: 1 prediction and 1 outcome\n" in output
    assert list_ids(kept) == ["bob"]
    kept.database.close()


def test_what_cannot_be_tidied_up_in_one_place_keeps_no_other_from_forgetting(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise ServiceUnavailable("online store: its log is in use by another process; run it again")

    project.run("store", "upgrade")
    kept = Predictions(Database(f"sqlite:///{project.root / 'state/operations.db'}"))
    kept.insert([predict("anna", customer_id="anna"), report("anna")])
    monkeypatch.setattr(online_erasure, "erase_online", fail)
    output = project.run("store", "erase", "--customer-id", "anna", status=1).output
    assert "online an unknown number" in output
    assert "its log is in use by another process; run it again" in output
    assert (list_ids(kept), count(kept, OUTCOMES)) == ([], 0)
    kept.database.close()


@pytest.mark.parametrize("removal", ["erase", "purge"])
def test_removed_rows_leave_no_trace(store: Predictions, removal: str) -> None:
    """Enough rows at random places of the index for pages to split, which leaves copies behind."""
    old = SNAPSHOT - 1_000 * DAY
    for _ in range(20):
        records = [predict(secrets.token_hex(24), customer_id="somebody else") for _ in range(450)]
        records += [predict(secrets.token_hex(24), customer_id="Kassandra", predicted_at=old) for _ in range(50)]
        store.insert([*records, *[report(record.prediction_id) for record in records]])
    if store.database.dialect == "postgresql":
        with store.database.begin() as connection:
            connection.execute(sa.text("ANALYZE predictions"))
        with store.database.begin(write=False) as connection:
            quoted = "SELECT most_common_vals::text FROM pg_stats WHERE attname = 'customer_id'"
            assert "Kassandra" in connection.execute(sa.text(quoted)).scalar_one()
    assert find_traces(store, "Kassandra") >= 1_000
    if removal == "erase":
        removed = store.erase("Kassandra")
    else:
        removed = store.purge(MODEL, keep_days=400, as_of=SNAPSHOT)
    assert removed == Removed(1_000, 1_000)
    assert find_traces(store, "Kassandra") == 0
    assert find_traces(store, "somebody else") >= 9_000


def test_erasure_that_a_reader_keeps_incomplete_says_so(sqlite_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LOCK_WAIT_SECONDS", 0.1)
    store = Predictions(Database(f"sqlite:///{sqlite_file}"))
    store.insert([predict("a", customer_id="Kassandra")])
    with contextlib.closing(sqlite3.connect(sqlite_file, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM predictions").fetchall()
        removed = store.erase("Kassandra")
        assert (removed.predictions, removed.outcomes) == (1, 0)
        assert re.search("in use by another process; the rows are deleted.* run it again", removed.left)
    assert find_traces(store, "Kassandra") > 0
    assert store.erase("Kassandra") == Removed(0, 0)
    assert find_traces(store, "Kassandra") == 0
    store.database.close()


def test_tidying_up_takes_no_shared_memory_of_a_container(postgres_url: str) -> None:
    """A parallel VACUUM takes more than the 64 MB of a container's /dev/shm; so do its workers, however few rows."""
    store = Predictions(Database(f"{postgres_url}?options=-c%20min_parallel_index_scan_size%3D0"))
    store.database.upgrade()
    store.insert([predict(f"{number:05}", customer_id=f"{number % 2}") for number in range(10_000)])
    told: list[str] = []

    def listen(_: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.startswith("VACUUM (ANALYZE"):
            connection.execute(sa.text(statement.replace("(ANALYZE", "(VERBOSE, ANALYZE")))

    with store.database.connect(None) as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.add_notice_handler(lambda notice: told.append(notice.message_primary))
        sa.event.listen(store.database.engine, "before_cursor_execute", listen)
        assert store.erase("1") == Removed(5_000, 0)
        sa.event.remove(store.database.engine, "before_cursor_execute", listen)
    assert any("finished vacuuming" in line for line in told)
    assert [line for line in told if "parallel vacuum worker" in line] == []
    store.database.close()


# --- trouble


def test_a_restarted_server_is_found_again(postgres: PostgresServer, postgres_url: str) -> None:
    store = Predictions(Database(postgres_url))
    store.database.upgrade()
    store.insert([predict("a")], POSITION)
    for mode in ("fast", "immediate"):
        postgres.stop(mode)
        with pytest.raises(
            ServiceUnavailable, match=r"operations store postgresql.*\*\*\*@127.0.0.1.*refused"
        ) as raised:
            store.insert([predict("b")])
        assert PASSWORD not in str(raised.value)
        postgres.start()
        assert store.read_position(MODEL, POSITION.spool) == POSITION
        postgres.stop(mode)
        postgres.start()
        assert store.insert([predict("a")]).duplicates == 1
    store.database.close()


def test_a_server_that_is_not_there_does_not_show_the_password() -> None:
    store = Predictions(
        Database("postgresql://closedloop:s3cret@127.0.0.1:1/operations?password=s3cret2&sslmode=disable")
    )
    for use in (store.database.upgrade, lambda: store.read_position(MODEL, "none")):
        with pytest.raises(ServiceUnavailable, match="port 1 failed") as raised:
            use()
        assert "s3cret" not in str(raised.value)
        assert raised.value.__suppress_context__


def test_a_connection_that_is_cut_in_the_middle(postgres_url: str) -> None:
    store = Predictions(Database(postgres_url))
    store.database.upgrade()

    def cut(connection: sa.Connection) -> None:
        backend = connection.connection.driver_connection.info.backend_pid
        with contextlib.closing(Database(postgres_url)) as other, other.begin() as second:
            second.execute(sa.select(sa.func.pg_terminate_backend(backend)))

    sa.event.listen(store.database.engine, "commit", cut)
    with pytest.raises(ServiceUnavailable):
        store.insert([predict("a")], POSITION)
    sa.event.remove(store.database.engine, "commit", cut)
    assert store.read_position(MODEL, POSITION.spool) is None
    assert store.insert([predict("a")], POSITION).predictions == 1
    store.database.close()


def test_a_locked_database_is_unavailable(sqlite_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LOCK_WAIT_SECONDS", 0.1)
    store = Predictions(Database(f"sqlite:///{sqlite_file}"))
    with contextlib.closing(sqlite3.connect(sqlite_file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ServiceUnavailable, match="locked"):
            store.insert([predict("a")])
        assert store.read_position(MODEL, "none") is None  # reading goes on
    assert store.insert([predict("a")]).predictions == 1
    store.database.close()


def test_a_writer_has_the_lock_before_it_reads(sqlite_file: Path) -> None:
    """Else somebody could write between its reading and its writing, and SQLite would refuse it the latter."""
    store = Predictions(Database(f"sqlite:///{sqlite_file}"))
    store.insert([predict("a")])

    def intrude(*_: Any) -> None:
        with contextlib.closing(sqlite3.connect(sqlite_file, isolation_level=None, timeout=0)) as other:
            other.execute("DELETE FROM deployments")

    sa.event.listen(store.database.engine, "savepoint", intrude)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        store.insert([report("a")])
    sa.event.remove(store.database.engine, "savepoint", intrude)
    assert store.insert([report("a")]).outcomes == 1
    store.database.close()


def test_limits_reach_postgresql(postgres_url: str) -> None:
    store = Predictions(Database(f"{postgres_url}?connect_timeout=7"))
    store.database.upgrade()
    with store.database.begin(write=False) as connection:
        assert connection.execute(sa.text("SHOW lock_timeout")).scalar() == "10s"
        parameters = connection.connection.driver_connection.info.get_parameters()
    assert {name: parameters[name] for name in ("connect_timeout", "tcp_user_timeout")} == {
        "connect_timeout": "7",
        "tcp_user_timeout": "15000",
    }
    store.database.close()


def test_a_table_that_is_locked_on_postgresql_is_unavailable(postgres_url: str) -> None:
    holder, store = (
        Predictions(Database(postgres_url)),
        Predictions(Database(f"{postgres_url}?options=-c%20lock_timeout%3D100ms")),
    )
    holder.database.upgrade()
    with holder.database.begin() as connection:
        connection.execute(sa.text("LOCK TABLE predictions IN EXCLUSIVE MODE"))
        with pytest.raises(ServiceUnavailable, match="lock timeout"):
            store.insert([predict("a")])
    assert store.insert([predict("a")]).predictions == 1
    holder.database.close()
    store.database.close()


def test_a_full_disk_is_unavailable_until_there_is_room(sqlite_file: Path) -> None:
    store = Predictions(Database(f"sqlite:///{sqlite_file}"))
    limit = 40

    def restrict(connection: sqlite3.Connection, *_: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {limit}")

    sa.event.listen(store.database.engine, "checkout", restrict)
    records = [predict(f"{number:04}") for number in range(2_000)]
    with pytest.raises(ServiceUnavailable, match="full"):
        store.insert(records, POSITION)
    assert count(store, PREDICTIONS) == 0
    limit = 4_000
    assert store.insert(records, POSITION).predictions == 2_000
    store.database.close()


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "operations.db").write_bytes(b"not a database at all" * 100)
    store = Predictions(Database(f"sqlite:///{tmp_path / 'operations.db'}"))
    for use in (store.database.upgrade, lambda: store.read_position(MODEL, "none")):
        with pytest.raises(ServiceUnavailable, match="not a database"):
            use()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("mysql://user:s3cret@host/database", "found mysql, allowed are sqlite:///file and postgresql://"),
        ("postgresql+psycopg2://user:s3cret@host/database", "found postgresql"),
        ("s3cret", "it is not an address"),
        ("", "it is not an address"),
    ],
)
def test_another_kind_of_address_is_refused(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"operations\.url") as raised:
        Database(address)
    assert message in str(raised.value)
    assert "s3cret" not in str(raised.value)


def test_a_missing_driver_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"needs the Python package psycopg, which.* install closedloop\[postgres\]"):
        Database("postgresql://user@host/database")


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be made"):
        Database(f"sqlite:///{tmp_path / 'state/operations.db'}").upgrade()
