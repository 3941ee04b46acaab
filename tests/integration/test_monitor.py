"""Monitors that are killed at every statement, and ten at once: one check, and at most one retraining."""

from __future__ import annotations

import datetime as dt
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa

from closedloop.adapters.checks import Checks
from closedloop.adapters.samples import Samples
from closedloop.adapters.store import Store
from closedloop.contract import REFERENCE_FILE
from closedloop.core.monitoring import AlarmLimits, Policy
from closedloop.loop.monitor import run_check
from closedloop.records import Prediction, digest_position
from tests.model_folders import write_model_folder
from tests.services import run_postgres

pytestmark = pytest.mark.thorough

DAY = dt.timedelta(days=1)
NOW = dt.datetime(2024, 2, 1, tzinfo=dt.UTC)
MODEL = "test_churn"


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


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('monitor') / 'operations.db'}"
        return
    with run_postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server.create_database()


@pytest.fixture
def url(database: str) -> str:
    """A store with a day of customers who are older and nearer to a half than the reference: a retraining is due."""
    store = Store(database)
    store.upgrade()
    with store._begin() as connection:
        for table in ("retrainings", "checks", "outcomes", "predictions"):
            connection.execute(sa.text(f"DELETE FROM {table}"))
    rows = make_rows(2, (45, 80)).assign(score=lambda frame: 0.5 - frame["score"] / 4)
    fixed = ("r", MODEL, "7", "champion", "http", NOW - DAY / 2)
    store.insert(
        [
            Prediction(
                digest_position("row", number), *fixed, tuple(row[:3]), row.score, 0, 0.5, customer_id=f"c{number}"
            )
            for number, row in enumerate(rows.itertuples(index=False))
        ]
    )
    store.close()
    return database


def monitor(url: str, model_dir: Path, *, die_at: int | None = None) -> Any:
    """One pass, which kills its process before its ``die_at``-th statement or commit."""
    checks, samples, done = Checks(url), Samples(url), iter(range(1_000))

    def step(*_: Any) -> None:
        if next(done) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for engine in (checks._engine, samples._engine):
        for event in ("before_cursor_execute", "commit"):
            sa.event.listen(engine, event, step)
    found = run_check(
        checks,
        samples,
        model_dir=model_dir,
        version="7",
        as_of=NOW,
        now=dt.datetime.now(dt.UTC),
        limits=AlarmLimits(),
        policy=Policy(breaches=1, of_checks=1),
        window_days_max=31,
        sample_rows_max=20_000,
    )
    checks.close()
    samples.close()
    return found


def read(url: str) -> tuple[list[Any], list[Any]]:
    checks = Checks(url)
    found = checks.list_checks(MODEL), checks.list_retrainings(MODEL)
    checks.close()
    return found


def test_a_monitor_that_is_killed_at_any_step_is_made_good_by_the_next(url: str, model_dir: Path) -> None:
    survived = False
    for die_at in range(60):
        child = os.fork()
        if child == 0:
            monitor(url, model_dir, die_at=die_at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        checks, retrainings = read(url)
        assert len(checks) == len(retrainings) <= 1  # never one without the other
        if os.WIFEXITED(status):
            survived = True
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert survived
    assert die_at > 8
    check, retraining = monitor(url, model_dir)
    assert ([check], [retraining]) == read(url)
    assert check.verdict == "retrain"
    assert retraining.trigger_id == check.check_id


def test_ten_monitors_at_once_record_one_check_and_one_retraining(url: str, model_dir: Path) -> None:
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda _: monitor(url, model_dir), range(10)))
    (check,), (retraining,) = read(url)
    assert found == [(check, retraining)] * 10
    assert check.verdict == "retrain"
    assert check.predictions == 1_000
