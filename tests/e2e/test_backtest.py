"""`closedloop backtest` on an event log and on a table with days: a table, a picture, a sentence, and clear errors."""

from __future__ import annotations

import csv
import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conftest import Project

BEGAN, DAYS = dt.date(2024, 1, 1), 420
GATES = {"accuracy_min": 0.0, "f1_weighted_min": 0.0, "roc_auc_min": 0.5, "calibration_error_max": 1.0}
COMMON: dict[str, Any] = {"source": {"type": "csv"}, "timezone": "UTC", "expectations": [], "gates": GATES}
ORDERS: dict[str, Any] = {
    "name": "orders",
    "model_name": "orders_churn",
    "description": "Orders of a shop.",
    "kind": "events",
    "columns": {"entity_id": "member", "time": "day"},
    "event_types": {"purchase": {"has_amount": False}},
    "label": {
        "event_type": "purchase",
        "horizon_days": 20,
        "active_days": 40,
        "snapshot_every_days": 20,
        "warmup_days": 40,
    },
    **COMMON,
}
VISITS: dict[str, Any] = {
    "name": "visits",
    "model_name": "visits_churn",
    "description": "Members of a gym, as each was on a day.",
    "kind": "table",
    "columns": {
        "entity_id": "member",
        "time": "day",
        "numeric": ["months"],
        "label": {"column": "left", "churned": "yes", "stayed": "no"},
    },
    **COMMON,
}


def write_orders(path: Path) -> None:
    """Half of the members order seldom and stop after a while; nothing changes."""
    draw = np.random.default_rng(5)
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["member", "day"])
        for number in range(500):
            every = 8 if number % 2 else 25
            days = np.cumsum(draw.exponential(every, DAYS // every * 2))
            for day in sorted({int(one) for one in days if one < DAYS}):
                lines.writerow([f"M{number:03}", BEGAN + dt.timedelta(days=day)])


def write_visits(path: Path, *, turn: int | None) -> None:
    """50 members a day; from the day ``turn`` on those who were long members leave, and no others."""
    draw = np.random.default_rng(7)
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["member", "day", "months", "left"])
        for number in range(50 * 120):
            day, months = number // 50, int(draw.integers(36))
            chance = months / 40 if turn is not None and day >= turn else 0.9 - months / 40
            left = "yes" if draw.random() < chance else "no"
            lines.writerow([f"M{number:04}", BEGAN + dt.timedelta(days=day), months, left])


def prepare(project: Project, config: dict[str, Any], days: int) -> Path:
    path = project.root / f"configs/datasets/{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    source = project.root / "rows.csv"
    project.change_params(
        {
            "dataset": config["name"],
            "as_of": str(BEGAN + dt.timedelta(days=days)),
            "data": {"source": str(source)},
            "features": {"window_days": [20, 40], "aggregations": ["count"]},
            "model": {"type": "logistic_regression"},
            "evaluation": {"bootstrap_samples": 100},
        }
    )
    return source


@pytest.mark.thorough
def test_an_event_log_whose_first_model_knew_little_is_retrained_by_the_calendar(project: Project) -> None:
    """Nothing changes, so nothing asks; a model that knows more of the same wins what its interval says."""
    write_orders(prepare(project, ORDERS, DAYS))
    output = project.run("backtest").output
    report = project.read_json("reports/backtest/backtest.json")
    assert list(report["policies"]) == ["never", "every_30_days", "drift", "outcomes", "recalibrate", "own"]
    assert report["picked"] == "every_30_days"
    found = report["policies"]["every_30_days"]
    assert (found["promoted"], found["gain"]["low"] > 0) == (1, True)
    assert [report["policies"][name]["promoted"] for name in ("drift", "outcomes", "recalibrate", "own")] == [0] * 4
    told = " ".join(output.split())
    assert report["sentence"] in told
    assert report["sentence"].startswith("Retrain every 30 days (monitoring.policy: every_30_days)")
    assert (project.root / "reports/backtest/backtest.png").stat().st_size > 10_000
    assert list((project.root / "state/backtest/orders_churn").iterdir()) == []
    short = project.run("backtest", "--horizon-days", "200", status=1).output
    assert "orders: the history is too short to compare policies" in short
    assert "at least 3 are needed" in short
    early = project.run("backtest", "--from", "2024-02-10", status=1).output
    assert "--from 2024-02-10: too few snapshots have closed by then to train a model" in early


@pytest.mark.thorough
def test_a_table_whose_concept_turns_picks_a_policy_that_retrains(project: Project) -> None:
    write_visits(prepare(project, VISITS, 120), turn=60)
    project.run("backtest", "--every", "7", "--retrain-days", "14")
    report = project.read_json("reports/backtest/backtest.json")
    assert report["picked"] in ("every_14_days", "outcomes", "own")
    assert report["policies"][report["picked"]]["gain"]["low"] > 0.01
    shown = project.run("backtest", "--every", "7", "--retrain-days", "14", "--json").output
    assert json.loads(shown[shown.index("{") :]) == report  # the same on each run
    with_horizon = project.run("backtest", "--horizon-days", "5", status=1).output
    assert "visits has no label rule, so it has no horizon" in with_horizon


def test_a_table_without_a_time_has_no_history(project: Project) -> None:
    columns = {key: value for key, value in VISITS["columns"].items() if key != "time"}
    write_visits(prepare(project, VISITS | {"columns": columns}, 120), turn=None)
    said = project.run("backtest", status=1).output
    assert "visits: a table without a time column has no history to replay; name it as columns.time" in said
