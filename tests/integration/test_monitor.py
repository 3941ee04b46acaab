"""Monitors that are killed at every statement, and ten at once: one check, and at most one retraining."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa

from closedloop.contract import REFERENCE_FILE
from closedloop.core.evaluation.value import CustomerValue, KeptCustomer
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.loop.monitor.monitor import ValueSource, run_check
from closedloop.records import Outcome, Prediction, digest_position
from closedloop.serving.slots.slots import Slot
from closedloop.store.checks import NEXT_STATES, Checks, Retraining
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from closedloop.store.samples import Samples
from tests.model_folders import write_model_folder

pytestmark = pytest.mark.thorough

DAY = dt.timedelta(days=1)
NOW = dt.datetime(2024, 2, 1, tzinfo=dt.UTC)
MODEL = "test_churn"
EAGER = MonitoringPolicy(breaches=1, of_checks=1)


def make_rows(seed: int, ages: tuple[int, int]) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    score = rng.beta(1, 6, 1_000)
    values = {"visits_30d": rng.poisson(6, 1_000).astype(float), "age": rng.integers(*ages, 1_000).astype(float)}
    return pd.DataFrame({**values, "plan": "plus", "score": score, "churned": rng.random(1_000) < score})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    make_rows(1, (20, 70)).to_parquet(folder / REFERENCE_FILE)
    return folder


@pytest.fixture
def url(database: str) -> str:
    """A store with a day of customers who are older and nearer to a half than the reference: a retraining is due.

    Of the month's two the first was spent 20 days ago.
    """
    store, checks = Predictions(Database(database)), Checks(Database(database))
    store.database.upgrade()
    with store.database.begin() as connection:
        for table in ("retrainings", "checks", "outcomes", "predictions"):
            connection.execute(sa.text(f"DELETE FROM {table}"))
    rows = make_rows(2, (45, 80)).assign(score=lambda frame: 0.5 - frame["score"] / 4)
    fixed, known = ("r", MODEL, "7", "champion", "http", NOW - DAY / 2), {"features_as_of": NOW - DAY}
    store.insert(
        [
            Prediction(
                digest_position("row", number),
                *fixed,
                tuple(row[:3]),
                row.score,
                0,
                0.5,
                **known,
                customer_id=f"c{number}",
            )
            for number, row in enumerate(rows.itertuples(index=False))
        ]
    )
    store.database.close()
    first = Retraining("first", MODEL, "monitor", "drift", NOW - 20 * DAY, NOW - 20 * DAY, state="registered")
    checks.request_retraining(first)
    checks.database.close()
    return database


def monitor(
    url: str,
    model_dir: Path,
    *,
    die_at: int | None = None,
    as_of: dt.datetime = NOW,
    policy: MonitoringPolicy = EAGER,
    worth: ValueSource | None = None,
) -> Any:
    """One pass, which kills its process before its ``die_at``-th statement or commit."""
    checks, samples, done = Checks(Database(url)), Samples(Database(url)), iter(range(1_000))

    def step(*_: Any) -> None:
        if next(done) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for engine in (checks.database.engine, samples.database.engine):
        for event in ("before_cursor_execute", "commit"):
            sa.event.listen(engine, event, step)
    found = run_check(
        checks,
        samples,
        slot=Slot("7", str(model_dir), ""),
        as_of=as_of,
        now=dt.datetime.now(dt.UTC),
        policy=policy,
        worth=worth,
    )
    checks.database.close()
    samples.database.close()
    return found


def read(url: str) -> tuple[list[Any], list[Any]]:
    """The checks and the retrainings that they caused."""
    with contextlib.closing(Database(url)) as opened:
        checks = Checks(opened)
        return checks.list_checks(MODEL), checks.list_retrainings(MODEL)[:-1]


def assert_counted_once(url: str, model_dir: Path) -> None:
    """One retraining is open; once it has ended, the month's budget is spent, and not by more than it is."""
    with contextlib.closing(Database(url)) as opened:
        checks = Checks(opened)
        assert checks.count_retrainings(MODEL) == dict.fromkeys(NEXT_STATES, 0) | {"registered": 1, "requested": 1}
        asked = checks.list_retrainings(MODEL)[0]
        running = checks.advance_retraining(asked, "running", now=asked.updated_at)
        checks.advance_retraining(running, "registered", now=running.updated_at, model_version="8")
    of_any_age = MonitoringPolicy(model_age_days_max=1, cooldown_days=0)
    for days, verdict, said in ((1, "alert", "2 were asked for in the last 30 days"), (11, "retrain", "days old")):
        check, _ = monitor(url, model_dir, as_of=NOW + days * DAY, policy=of_any_age)
        assert check.verdict == verdict
        assert said in check.evidence["reasons"][-1]
    checks_found, caused = read(url)
    assert len(checks_found) == 3
    assert len(caused) == 2


def test_a_check_says_what_is_at_stake_where_the_data_set_has_a_value(url: str, model_dir: Path) -> None:
    value = CustomerValue(kept=KeptCustomer(column="age"), offer_cost=2, save_rate=0.2)
    rows = make_rows(2, (45, 80)).assign(score=lambda frame: 0.5 - frame["score"] / 4)
    few = MonitoringPolicy(window_rows_min=10_000)  # too few to judge drift by, so that the window goes on
    # a champion that takes other features says nothing
    first = monitor(url, model_dir, policy=few, worth=ValueSource(value, ("income",)))[0]
    assert (first.predictions, "money" in first.evidence) == (1_000, False)
    later = {"as_of": NOW + DAY, "policy": few}
    money = monitor(url, model_dir, **later, worth=ValueSource(value, ("age",)))[0].evidence["money"]
    assert (money["customers"], money["at_stake"]) == (1_000, pytest.approx(rows["score"] @ rows["age"]))
    assert money["offers"] == (rows["score"] * 0.2 * rows["age"] > 2).sum() > 0


def test_a_small_shop_is_judged_again_when_enough_outcomes_have_come(url: str, model_dir: Path) -> None:
    """400 outcomes are too few for any check, however often it looks, until 150 more are part of the same window."""
    few = MonitoringPolicy(effect_min=1, estimate_drop_min=1, model_age_days_max=None)
    with contextlib.closing(Database(url)) as opened:
        store = Predictions(opened)
        with opened.begin() as connection:
            connection.execute(sa.text("DELETE FROM predictions"))
            connection.execute(sa.text("DELETE FROM retrainings"))
        for days, first, rows in ((0, 0, 400), (70, 400, 150)):
            drawn = make_rows(3, (20, 70)).iloc[first : first + rows]
            fixed = ("r", MODEL, "7", "champion", "http", NOW + days * DAY)
            known = {"features_as_of": NOW + days * DAY}
            made = [
                Prediction(
                    digest_position("row", number),
                    *fixed,
                    tuple(row)[:3],
                    row.score,
                    0,
                    0.5,
                    **known,
                    customer_id=f"c{number}",
                )
                for number, row in zip(range(first, first + rows), drawn.itertuples(index=False), strict=True)
            ]
            outcomes = [
                Outcome(one.prediction_id, int(label), NOW) for one, label in zip(made, drawn["churned"], strict=True)
            ]
            store.insert([*made, *outcomes])
    found = [monitor(url, model_dir, as_of=NOW + days * DAY, policy=few)[0] for days in (1, 31, 61, 91, 101)]
    assert [one.verdict for one in found] == ["none", "none", "cannot tell", "cannot tell", "none"]
    assert [one.outcomes for one in found] == [0, 400, 400, 400, 550]
    assert "for 60 days there was too little to judge the model by" in found[2].evidence["reasons"][0]


def test_a_monitor_that_is_killed_at_any_step_is_made_good_by_the_next(url: str, model_dir: Path) -> None:
    survived = False
    for die_at in range(60):
        child = os.fork()
        if child == 0:
            failed = 1
            try:
                monitor(url, model_dir, die_at=die_at)
                failed = 0
            finally:
                os._exit(failed)
        _, status = os.waitpid(child, 0)
        checks, retrainings = read(url)
        assert len(checks) == len(retrainings) <= 1  # never one without the other
        if os.WIFEXITED(status):
            survived = os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert survived
    assert die_at > 8
    check, retraining = monitor(url, model_dir)
    assert ([check], [retraining]) == read(url)
    assert check.verdict == "retrain"
    assert retraining.trigger_id == check.check_id
    assert_counted_once(url, model_dir)


def test_ten_monitors_at_once_record_one_check_and_one_retraining(url: str, model_dir: Path) -> None:
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda _: monitor(url, model_dir), range(10)))
    (check,), (retraining,) = read(url)
    assert found == [(check, retraining)] * 10
    assert check.verdict == "retrain"
    assert check.predictions == 1_000
    assert_counted_once(url, model_dir)
