"""The monitor while a campaign goes on: who was saved is no fault of the model, and a change is still seen."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.contract import REFERENCE_FILE
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.loop.monitor.monitor import run_check
from closedloop.records import Outcome, Prediction
from closedloop.serving.slots.slots import Slot
from closedloop.store.actions import Action, Actions, Campaign
from closedloop.store.checks import Check, Checks
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from closedloop.store.samples import Samples
from tests.model_folders import write_model_folder

DAY = dt.timedelta(days=1)
START = dt.datetime(2024, 3, 1, tzinfo=dt.UTC)
MODEL = "test_churn"
PEOPLE, CHOSEN = 6_000, 1_500


def make_people(seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    score = rng.beta(1, 3, PEOPLE)
    values = {"visits_30d": rng.poisson(6, PEOPLE).astype(float), "age": rng.integers(20, 70, PEOPLE).astype(float)}
    return pd.DataFrame({**values, "plan": "plus", "score": score, "churned": rng.random(PEOPLE) < score})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    make_people(1).to_parquet(folder / REFERENCE_FILE)
    return folder


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'operations.db'}")
    made.upgrade()
    yield made
    made.close()


def act(
    opened: Database,
    model_dir: Path,
    *,
    holdout: float = 0.1,
    recorded: bool = True,
    changed: float = 0.0,
    among: int = PEOPLE,
) -> Check:
    """Score everybody, treat the best, save 30 % of the treated, and check the month after.

    ``changed``: the share of those who would leave that stays by itself, ``among`` so many with the highest scores.
    """
    rng = np.random.default_rng(2)
    people = make_people(3).sort_values("score", ascending=False, ignore_index=True)
    held_out = np.isin(np.arange(CHOSEN), rng.permutation(CHOSEN)[: round(CHOSEN * holdout)])
    treated = np.r_[~held_out, np.zeros(PEOPLE - CHOSEN, dtype=bool)]
    stays = (treated & (rng.random(PEOPLE) < 0.3)) | ((rng.random(PEOPLE) < changed) & (np.arange(PEOPLE) < among))
    outcomes = people["churned"] & ~stays
    store = Predictions(opened)
    fixed = ("r", MODEL, "7", "champion", "batch", START)
    rows = enumerate(people.itertuples(index=False))
    made = [Prediction(f"{i:08x}", *fixed, tuple(row[:3]), row.score, 0, 0.5, customer_id=f"C{i}") for i, row in rows]
    store.insert(made)
    told = [Outcome(f"{i:08x}", int(left), START + 30 * DAY, "label rule") for i, left in enumerate(outcomes)]
    store.insert(told)
    if recorded:
        counts = (int((~held_out).sum()), int(held_out.sum()))
        rules: tuple[Any, ...] = ("c", MODEL, "7", START, 30, counts[0], holdout, "c", *counts, None, START)
        arms = np.where(held_out, "held_out", "treated")
        chosen = [Action(f"C{i}", i + 1, arms[i], people["score"][i], None, None, None, "") for i in range(CHOSEN)]
        Actions(opened).record_campaign(Campaign(*rules), chosen)
    policy = MonitoringPolicy(model_age_days_max=None)
    as_of = START + 31 * DAY
    check, _ = run_check(
        Checks(opened), Samples(opened), slot=Slot("7", str(model_dir), ""), as_of=as_of, now=as_of, policy=policy
    )
    return check


def test_a_successful_campaign_asks_for_no_retraining(opened: Database, model_dir: Path) -> None:
    check = act(opened, model_dir)
    assert check.verdict == "none"
    assert check.evidence["actions"] == {"treated": 1_350, "held_out": 150, "blinded": 0}
    assert check.outcomes == pytest.approx(PEOPLE, abs=10)
    assert "1,350 rows of treated customers left out" in check.evidence["reasons"][-1]
    realised = check.evidence["realised"]
    assert realised["churn_rate"] == pytest.approx(realised["expected"]["churn_rate"], abs=0.02)


def test_the_same_outcomes_without_a_record_of_the_actions_look_like_a_broken_model(
    opened: Database, model_dir: Path
) -> None:
    check = act(opened, model_dir, recorded=False)
    assert check.verdict == "retrain"
    assert "actions" not in check.evidence


def test_a_change_of_concept_is_seen_beside_the_campaign(opened: Database, model_dir: Path) -> None:
    assert act(opened, model_dir, changed=0.3).verdict == "retrain"


def test_a_change_that_shows_among_the_held_out_alone_is_seen(opened: Database, model_dir: Path) -> None:
    """Those with the highest scores do not leave as they used to; the gain of the few held out is too uncertain."""
    check = act(opened, model_dir, changed=0.4, among=CHOSEN)
    assert check.verdict == "retrain"
    gain = check.evidence["realised"]["gain"]
    assert gain["mean"] - 3 * gain["error"] < 0.002 < gain["low"]


def test_without_a_hold_out_the_monitor_says_that_it_cannot_tell(opened: Database, model_dir: Path) -> None:
    check = act(opened, model_dir, holdout=0.0)
    assert check.verdict == "cannot tell"
    assert "realised" not in check.evidence
    assert check.evidence["actions"]["blinded"] == PEOPLE
    assert "outcomes cannot be told apart from what it did" in check.evidence["reasons"][0]
