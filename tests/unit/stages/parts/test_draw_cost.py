"""What a draw of the rows costs: the interval holds what training on all rows gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.config.dataset import load_dataset
from closedloop.config.featureset import list_features
from closedloop.config.params import parse_params
from closedloop.config.yaml import read_yaml
from closedloop.core.evaluation.metrics import list_log_losses
from closedloop.core.training.draw import draw_rows
from closedloop.core.training.estimators import score
from closedloop.stages.parts.draw_cost import measure_draw
from closedloop.stages.parts.fitting import Fitted, fit

ROOT = Path(__file__).parents[4]
TELCO = load_dataset("telco", ROOT / "configs/datasets")


@pytest.fixture(scope="module")
def setting() -> dict[str, Any]:
    """40,000 rows whose signal lies in many columns, 2,000 of which train a logistic regression."""
    values = read_yaml(ROOT / "params.yaml")
    values["model"] = {"type": "logistic_regression", "calibrate": False}
    params = parse_params(values | {"dataset": "telco"}, "a test")
    features = list_features(params, TELCO)
    draw, rows = np.random.default_rng(3), 60_000
    frame = pd.DataFrame({name: draw.normal(size=rows) for name in features.numeric})
    for name in features.categorical:
        frame[name] = draw.choice(list("abcdefgh"), rows)
    odds = frame[features.numeric[0]] + (frame[features.categorical[0]] == "a")
    frame["churned"] = draw.random(rows) < 1 / (1 + np.exp(-odds))
    frame.insert(0, "customer_id", [f"C{number}" for number in range(rows)])
    frame.insert(1, "event_timestamp", pd.Timestamp("2024-01-01", tz="UTC").as_unit("us"))
    train = frame.iloc[:40_000]
    rows = {"train": draw_rows(train, 2_000, salt="7"), "validation": frame[40_000:45_000], "test": frame[45_000:]}
    fitted = fit(params, features, {}, rows)
    return {"params": params, "features": features, "rows": rows, "all": rows | {"train": train}, "fitted": fitted}


def test_the_interval_holds_what_all_rows_would_gain(setting: dict[str, Any]) -> None:
    params, features, rows, fitted = (setting[name] for name in ("params", "features", "rows", "fitted"))
    found = measure_draw(params, features, fitted, rows)
    assert found is not None
    assert (found["rows"], found["known_rows"]) == (2_000, 40_000)
    cost, low, high = found["cost"]
    assert low < cost < high
    assert cost > 0.01
    assert found["cost"] == pytest.approx([0.95 * value for value in found["half"]])
    test = rows["test"]
    whole = fit(params, features, {}, setting["all"])
    losses = [list_log_losses(test["churned"].to_numpy(), score(one.pipeline, test)).mean() for one in (fitted, whole)]
    assert low < losses[0] - losses[1] < high


def test_without_a_draw_there_is_no_cost(setting: dict[str, Any]) -> None:
    assert measure_draw(setting["params"], setting["features"], setting["fitted"], setting["all"]) is None


def test_where_only_another_part_is_drawn_training_costs_nothing(setting: dict[str, Any]) -> None:
    train = setting["all"]["train"]
    rows = setting["all"] | {"train": draw_rows(train, len(train), salt="7")}
    assert measure_draw(setting["params"], setting["features"], setting["fitted"], rows) is None


def test_a_recalibration_is_not_trained_on_the_draw(setting: dict[str, Any]) -> None:
    recalibrated = Fitted(*[None] * 6, kind="recalibration of version 2")  # type: ignore[arg-type]
    found = measure_draw(setting["params"], setting["features"], recalibrated, setting["rows"])
    assert found == {"rows": 2_000, "known_rows": 40_000, "why": "a recalibration of version 2 is not trained on it"}
