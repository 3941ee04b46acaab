"""Checks and retrainings in the operations store, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import dataclasses
import datetime as dt
import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from closedloop.errors import DataError, ServiceUnavailable
from closedloop.store.checks import NEXT_STATES, Check, Checks, Retraining, RetrainingChanged, name_check
from closedloop.store.database import Database
from closedloop.store.migrations.tables import RETRAININGS

pytestmark = pytest.mark.thorough

DAY = dt.timedelta(days=1)
NOW = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
MODEL = "shop_churn"


@pytest.fixture
def checks(database: str) -> Iterator[Checks]:
    made = Checks(Database(database))
    made.database.upgrade()
    with made.database.begin() as connection:
        connection.exec_driver_sql("DELETE FROM retrainings")
        connection.exec_driver_sql("DELETE FROM checks")
    yield made
    made.database.close()


def check(day: int = 0, **changes: Any) -> Check:
    as_of = NOW + day * DAY
    values: dict[str, Any] = {
        "check_id": name_check(changes.get("model_name", MODEL), as_of),
        "model_name": MODEL,
        "model_version": "7",
        "as_of": as_of,
        "since": as_of - DAY,
        "until": as_of,
        "predictions": 2_000,
        "outcomes": 0,
        "verdict": "retrain",
        "evidence": {"drifted": ["orders"], "p_value": 0.25, "nothing": None},
        "recorded_at": NOW,
    }
    return Check(**(values | changes))


def ask(cause: Check | None = None, **changes: Any) -> Retraining:
    values: dict[str, Any] = {
        "trigger_id": cause.check_id if cause else "by-hand-1",
        "model_name": MODEL,
        "requested_by": "monitor" if cause else "ann",
        "reason": "drift in 3 of 3 checks",
        "as_of": cause.as_of if cause else NOW,
        "updated_at": NOW,
        "check_id": cause.check_id if cause else None,
    }
    return Retraining(**(values | changes))


def test_a_check_and_its_retraining_come_back_as_they_were(checks: Checks) -> None:
    found = check()
    asked = ask(found, data_start_date=dt.date(2023, 10, 1), data_end_date=dt.date(2023, 12, 30))
    assert checks.record_check(found, asked) == (found, asked)
    assert checks.list_checks(MODEL) == [found]
    assert checks.list_retrainings(MODEL) == [asked]
    assert checks.read_retraining(found.check_id) == asked


def test_what_nobody_closes_lets_go_of_its_connections(checks: Checks, database: str) -> None:
    forgotten = Checks(Database(database))
    forgotten.list_checks(MODEL)
    pool: Any = forgotten.database.engine.pool
    assert pool.checkedin() == 1
    del forgotten
    gc.collect()
    assert pool.checkedin() == 0


def test_the_first_check_of_a_moment_is_the_one(checks: Checks) -> None:
    first, second = check(verdict="alert"), check(verdict="retrain", recorded_at=NOW + DAY)
    checks.record_check(first)
    assert checks.record_check(second, ask(second)) == (first, None)
    assert checks.list_checks(MODEL) == [first]
    assert checks.list_retrainings(MODEL) == []


def test_another_model_has_checks_of_its_own(checks: Checks) -> None:
    other = check(model_name="other_churn")
    checks.record_check(check())
    assert checks.record_check(other, ask(other, model_name="other_churn"))[0] == other
    assert checks.list_checks("other_churn") == [other]
    assert checks.list_retrainings(MODEL) == []


@pytest.mark.parametrize("state", ["requested", "running", "registered", "refused", "failed"])
def test_a_check_starts_no_second_retraining_while_one_is_open(checks: Checks, state: str) -> None:
    checks.request_retraining(ask(state=state))
    found = check()
    stored, caused = checks.record_check(found, ask(found))
    assert stored == found
    assert caused == (None if state in ("requested", "running") else ask(found))


def test_ten_monitors_at_once_record_one_check_and_one_retraining(checks: Checks, database: str) -> None:
    together = threading.Barrier(10)

    def record(number: int) -> tuple[Check, Retraining | None]:
        mine = Checks(Database(database))
        found = check(evidence={"monitor": number})
        together.wait()
        try:
            return mine.record_check(found, ask(found, reason=f"monitor {number}"))
        finally:
            mine.database.close()

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(record, range(10)))
    (stored,), (asked,) = checks.list_checks(MODEL), checks.list_retrainings(MODEL)
    assert answers == [(stored, asked)] * 10
    assert asked.reason == f"monitor {stored.evidence['monitor']}"


def test_monitors_of_different_moments_at_once_start_one_retraining(checks: Checks, database: str) -> None:
    together = threading.Barrier(8)

    def record(day: int) -> Retraining | None:
        mine = Checks(Database(database))
        found = check(day)
        together.wait()
        try:
            return mine.record_check(found, ask(found))[1]
        finally:
            mine.database.close()

    with ThreadPoolExecutor(8) as pool:
        caused = [retraining for retraining in pool.map(record, range(8)) if retraining]
    assert len(checks.list_checks(MODEL)) == 8
    assert caused == checks.list_retrainings(MODEL)
    assert len(caused) == 1


def test_a_check_whose_retraining_cannot_be_stored_is_not_stored(checks: Checks) -> None:
    found = check()
    with pytest.raises(DataError):
        checks.record_check(found, ask(found, check_id="of no check"))
    assert checks.list_checks(MODEL) == []


def test_an_unknown_verdict_is_refused(checks: Checks) -> None:
    with pytest.raises(DataError, match="known_verdict"):
        checks.record_check(check(verdict="panic"))


def test_checks_are_listed_from_the_newest_up_to_a_moment(checks: Checks) -> None:
    for day in (0, 2, 1):
        checks.record_check(check(day))
        checks.request_retraining(ask(trigger_id=f"t{day}", as_of=NOW + day * DAY))
    assert [found.as_of for found in checks.list_checks(MODEL, until=NOW + DAY)] == [NOW + DAY, NOW]
    assert [found.as_of for found in checks.list_checks(MODEL, limit=2)] == [NOW + 2 * DAY, NOW + DAY]
    assert [found.trigger_id for found in checks.list_retrainings(MODEL, until=NOW + DAY)] == ["t1", "t0"]
    assert [found.trigger_id for found in checks.list_retrainings(MODEL, limit=1)] == ["t2"]


def test_a_trigger_id_is_requested_once(checks: Checks) -> None:
    first = ask()
    assert checks.request_retraining(first) == first
    assert checks.request_retraining(ask(reason="again")) == first
    with pytest.raises(DataError, match="unknown: there is none"):
        checks.read_retraining("unknown")


def test_a_retraining_goes_through_its_states(checks: Checks) -> None:
    asked = checks.request_retraining(ask())
    running = checks.advance_retraining(asked, "running", now=NOW + DAY)
    assert running == dataclasses.replace(asked, state="running", updated_at=NOW + DAY)
    failed = checks.advance_retraining(running, "failed", now=NOW + 2 * DAY, detail="no disk")
    assert failed.detail == "no disk"
    again = checks.advance_retraining(failed, "running", now=NOW + 3 * DAY)
    ended = checks.advance_retraining(again, "registered", now=NOW + 4 * DAY, model_version="8")
    assert ended == dataclasses.replace(asked, state="registered", updated_at=NOW + 4 * DAY, model_version="8")
    assert checks.read_retraining("by-hand-1") == ended


def test_steps_that_do_not_follow_are_refused(checks: Checks) -> None:
    for number, (state, following) in enumerate(NEXT_STATES.items()):
        asked = checks.request_retraining(ask(trigger_id=f"t{number}", state=state))
        for wrong in set(NEXT_STATES) - set(following):
            with pytest.raises(DataError, match=f"is {state}: found {wrong}"):
                checks.advance_retraining(asked, wrong, now=NOW)
        assert checks.read_retraining(f"t{number}") == asked


@pytest.mark.parametrize("start", ["requested", "running"])
def test_of_runners_that_claim_at_once_one_wins(checks: Checks, database: str, start: str) -> None:
    asked = checks.request_retraining(ask(state=start))
    together = threading.Barrier(8)

    def claim(number: int) -> bool:
        mine = Checks(Database(database))
        together.wait()
        try:
            mine.advance_retraining(asked, "running", now=NOW, detail=f"runner {number}")
        except RetrainingChanged:
            return False
        finally:
            mine.database.close()
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(claim, range(8))) == 1


def test_a_retraining_that_is_not_there_cannot_be_moved(checks: Checks) -> None:
    with pytest.raises(DataError, match="none with this trigger id"):
        checks.advance_retraining(ask(trigger_id="gone"), "running", now=NOW)


def test_a_database_that_is_away_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "operations.db").write_bytes(b"this is not a database " * 50)
    away = Checks(Database(f"sqlite:///{tmp_path / 'operations.db'}"))
    with pytest.raises(ServiceUnavailable):
        away.record_check(check())
    away.database.close()


@pytest.mark.parametrize("wrong", ["../../x", "-rf", "a/b", "$(id)", "a b", "", "a\n", "x" * 200])
def test_an_id_that_becomes_a_path_or_a_command_is_checked_where_it_is_read(checks: Checks, wrong: str) -> None:
    """Whoever can write the store alone gives no process another folder or option."""
    with pytest.raises(DataError, match="a trigger id is up to 128 letters"):
        checks.request_retraining(ask(trigger_id=wrong))
    asked = checks.request_retraining(ask(trigger_id="by-hand-1.a_b"))
    with checks.database.begin() as connection:
        connection.execute(sa.update(RETRAININGS).values(model_version=wrong))
    with pytest.raises(DataError, match="is no number of the registry"):
        checks.read_retraining(asked.trigger_id)
