"""A table with days whose concept turns: what a retraining trains on, beside a training on all rows before."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from closedloop.config.dataset import DatasetConfig, load_dataset
from closedloop.config.featureset import list_features
from closedloop.config.params import Params, parse_params
from closedloop.config.yaml import read_yaml
from closedloop.core.training.estimators import score
from closedloop.loop.retrain import plan_retraining
from closedloop.stages.parts.challengers import choose_challenger
from closedloop.stages.parts.fitting import fit
from closedloop.stages.training_set import PARTS, assign_parts

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
DAYS, PER_DAY, TURN, NOW = 400, 40, 280, 340
FIRST = pd.Timestamp("2024-01-01", tz="UTC")


def describe_table() -> tuple[DatasetConfig, Params]:
    telco = load_dataset("telco", ROOT / "configs/datasets")
    columns = telco.columns.model_copy(update={"time": "day", "numeric": ("months", "other"), "categorical": ()})
    values = read_yaml(ROOT / "params.yaml")
    values |= {"model": {"type": "hist_gradient_boosting"}, "as_of": str((FIRST + dt.timedelta(days=NOW)).date())}
    return telco.model_copy(update={"columns": columns}), parse_params(values, "a test")


def draw_rows(*, other_column: bool = False, seed: int = 11) -> pd.DataFrame:
    """From day ``TURN`` on, 70% of all, ``months`` means the opposite; or ``other`` counts, and ``months`` no more."""
    draw = np.random.default_rng(seed)
    day = np.repeat(np.arange(DAYS), PER_DAY)
    months, other = draw.normal(size=len(day)), draw.normal(size=len(day))
    turned = 1.5 * other if other_column else other - 1.5 * months
    odds = np.where(day < TURN, 1.5 * months + (0 if other_column else other), turned)
    return pd.DataFrame(
        {
            "customer_id": [f"M{number:05}" for number in range(len(day))],
            "event_timestamp": FIRST + pd.to_timedelta(day, unit="D"),
            "churned": draw.random(len(day)) < 1 / (1 + np.exp(-odds)),
            "months": months,
            "other": other,
        }
    )


@pytest.fixture(scope="module")
def known() -> Any:
    rows = draw_rows()
    now = FIRST + dt.timedelta(days=NOW)
    return rows[rows["event_timestamp"] < now].reset_index(drop=True), rows[rows["event_timestamp"] >= now]


def measure(params: Params, dataset: DatasetConfig, rows: dict[str, pd.DataFrame], later: pd.DataFrame) -> float:
    features = list_features(params, dataset)
    fitted = fit(params, features, {}, rows)
    chosen = choose_challenger(params, features, fitted, rows, "no champion")
    return float(roc_auc_score(later["churned"], score(chosen.pipeline, later)))


def test_a_retraining_knows_a_turn_as_well_as_a_training_on_all_rows_before(known: Any) -> None:
    (before, later), (dataset, params) = known, describe_table()
    planned = plan_retraining(params, dataset, window_days=None, split="customer")
    parts = assign_parts(planned, dataset, before)
    rows = {part: before[parts == part] for part in PARTS}
    assert rows["train"]["event_timestamp"].max() == before["event_timestamp"].max()
    whole = fit(params, list_features(params, dataset), {}, {"train": before, "validation": before})
    all_rows = roc_auc_score(later["churned"], score(whole.uncalibrated, later))
    assert measure(planned, dataset, rows, later) > all_rows - 0.01

    by_time = assign_parts(params, dataset, before)
    assert measure(params, dataset, {part: before[by_time == part] for part in PARTS}, later) < all_rows - 0.05


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_soon_after_another_column_took_over_a_retraining_knows_it_better_than_a_training_on_all_rows(
    seed: int,
) -> None:
    rows, (dataset, params) = draw_rows(other_column=True, seed=seed), describe_table()
    now = FIRST + dt.timedelta(days=TURN + 30)
    params = params.model_copy(update={"as_of": now.date()})
    before = rows[rows["event_timestamp"] < now].reset_index(drop=True)
    later = rows[rows["event_timestamp"] >= now]
    planned = plan_retraining(params, dataset, window_days=None, split="customer")
    parts = assign_parts(planned, dataset, before)
    whole = fit(params, list_features(params, dataset), {}, {"train": before, "validation": before})
    all_rows = roc_auc_score(later["churned"], score(whole.uncalibrated, later))
    assert measure(planned, dataset, {part: before[parts == part] for part in PARTS}, later) > all_rows + 0.03
