"""The figure of the next period: the same recipe, a horizon earlier, on the same test rows."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.config.dataset import load_dataset
from closedloop.config.featureset import FeatureSet, list_features
from closedloop.config.params import Params, parse_params
from closedloop.config.yaml import read_yaml
from closedloop.core.evaluation.metrics import measure_classification
from closedloop.core.training.estimators import score
from closedloop.core.training.splits import split_held_out
from closedloop.stages.parts.fitting import Fitted, fit
from closedloop.stages.parts.next_period import measure_next_period, name_period, split_earlier

ROOT = Path(__file__).parents[4]
SHOP, TELCO = (load_dataset(name, ROOT / "configs/datasets") for name in ("shop", "telco"))
DATED = TELCO.model_copy(update={"columns": TELCO.columns.model_copy(update={"time": "day"})})
NEWEST = dt.datetime(2024, 6, 1, tzinfo=dt.UTC)
HORIZON = dt.timedelta(days=30)
FRACTIONS = {"test": 0.2, "validation": 0.2}


def make_params(by: str = "customer") -> Params:
    values = read_yaml(ROOT / "params.yaml")
    values["model"] = {"type": "logistic_regression", "calibrate": False}
    return parse_params({**values, "split": {"by": by}}, "a test")


def make_rows(features: FeatureSet, *, turns_at: int) -> dict[str, pd.DataFrame]:
    """800 customers at 6 snapshots a horizon apart; from ``turns_at`` on the first feature means the opposite."""
    draw = np.random.default_rng(3)
    times, ids = np.repeat(np.arange(6), 800), np.tile([f"C{number}" for number in range(800)], 6)
    frame = pd.DataFrame({name: draw.normal(size=len(ids)) for name in features.numeric})
    for name in features.categorical:
        frame[name] = draw.choice(["a", "b"], len(ids))
    sign = np.where(times < turns_at, 2, -2)
    frame["churned"] = draw.random(len(ids)) < 1 / (1 + np.exp(-sign * frame[features.numeric[0]]))
    frame.insert(0, "customer_id", ids)
    frame.insert(1, "event_timestamp", [pd.Timestamp(NEWEST) - int(5 - time) * HORIZON for time in times])
    parts = split_held_out(ids.tolist(), frame["event_timestamp"], fractions=FRACTIONS, salt="1")
    return {part: frame[parts == part] for part in ("train", "validation", "test")}


@pytest.fixture(scope="module")
def turned() -> tuple[Params, FeatureSet, dict[str, pd.DataFrame], Fitted]:
    """A model that knows a turn at the newest snapshot, whose labels were not known a horizon before."""
    params = make_params()
    features = list_features(params, SHOP)
    rows = make_rows(features, turns_at=5)
    recent = rows | {"train": rows["train"][rows["train"]["event_timestamp"] == pd.Timestamp(NEWEST)]}
    return params, features, rows, fit(params, features, {}, recent)


def test_a_turn_that_today_knows_the_next_period_does_not(turned: Any) -> None:
    params, features, rows, fitted = turned
    found = measure_next_period(params, SHOP, features, fitted, rows)
    today = measure_classification(rows["test"]["churned"], score(fitted.pipeline, rows["test"]), fitted.threshold)
    assert found["judged"] == "today"
    assert found["until"] == f"{NEWEST - HORIZON:%Y-%m-%d}"
    assert found["figures"]["rows"] == len(rows["test"])
    assert today["roc_auc"] > 0.8
    assert found["figures"]["roc_auc"] < 0.2


def test_a_horizon_earlier_no_newer_label_trains_and_no_customer_does_both(turned: Any) -> None:
    params, _, rows, _ = turned
    earlier = split_earlier(params, SHOP, rows["train"], first_test=pd.Timestamp(NEWEST))
    assert earlier["train"]["event_timestamp"].max() == pd.Timestamp(NEWEST - HORIZON)
    assert set(earlier["validation"]["event_timestamp"]) == {pd.Timestamp(NEWEST - HORIZON)}
    assert not set(earlier["train"]["customer_id"]) & set(earlier["validation"]["customer_id"])
    of_table = split_earlier(params, DATED, rows["train"], first_test=pd.Timestamp(NEWEST))
    assert of_table["train"]["event_timestamp"].max() < pd.Timestamp(NEWEST)


@pytest.mark.parametrize(
    ("by", "dataset", "judged"),
    [
        ("customer", SHOP, "today"),
        ("time", SHOP, "next period"),
        ("customer", DATED, "today"),
        ("time", DATED, "next period"),
        ("customer", TELCO, "no time"),
    ],
)
def test_what_the_gates_judge_has_a_name(by: str, dataset: Any, judged: str) -> None:
    assert name_period(make_params(by), dataset) == judged


def test_where_there_is_no_such_figure_it_says_why(turned: Any) -> None:
    params, features, rows, fitted = turned
    asked = {"params": make_params("time"), "fitted": fitted, "rows": rows}
    cases: list[tuple[dict[str, Any], str]] = [
        (asked, "no rows of today"),
        ({"fitted": Fitted(*[None] * 6, kind="recalibration of version 2")}, "a recalibration of version 2 has no"),
        ({"rows": rows | {"train": rows["train"].tail(30)}}, "fewer than 10 rows of a class"),
    ]
    for changes, said in cases:
        given = {"params": params, "fitted": fitted, "rows": rows} | changes
        found = measure_next_period(given["params"], SHOP, features, given["fitted"], given["rows"])
        assert said in found["why"]
        assert "figures" not in found
