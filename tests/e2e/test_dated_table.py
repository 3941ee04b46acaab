"""A table whose rows have a day: split, searched and refreshed by time; and features whose data stopped arriving."""

from __future__ import annotations

import csv
import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from closedloop.bootstrap import build_features, load_run

FIRST, DAYS, PER_DAY = dt.date(2024, 1, 1), 40, 60
LAST = FIRST + dt.timedelta(days=DAYS - 1)
VISITS: dict[str, Any] = {
    "name": "visits",
    "model_name": "visits_churn",
    "description": "Members of a gym, as each was on a day.",
    "kind": "table",
    "source": {"type": "csv"},
    "timezone": "UTC",
    "columns": {
        "entity_id": "member",
        "time": "day",
        "numeric": ["months"],
        "categorical": ["plan"],
        "label": {"column": "left", "churned": "yes", "stayed": "no"},
    },
    "expectations": [],
    "gates": {"accuracy_min": 0.5, "f1_weighted_min": 0.5, "roc_auc_min": 0.6, "calibration_error_max": 0.2},
}
ORDERS: dict[str, Any] = {
    "name": "orders",
    "model_name": "orders_churn",
    "description": "Orders that stopped.",
    "kind": "events",
    "source": {"type": "csv"},
    "timezone": "UTC",
    "columns": {"entity_id": "member", "time": "day"},
    "event_types": {"purchase": {"has_amount": False}},
    "label": {"event_type": "purchase", "horizon_days": 10, "active_days": 30, "snapshot_every_days": 10},
    "expectations": [],  # no freshness among them: the gate of the features is the last one
    "feature_max_age_days": 5,
}


def write_rows(path: Path) -> None:
    draw = np.random.default_rng(7)
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["member", "day", "months", "plan", "left"])
        for number in range(DAYS * PER_DAY):
            months, plan = draw.integers(36), draw.choice(["monthly", "yearly"])
            left = draw.random() < (0.8 if plan == "monthly" else 0.2) * (1 - months / 60)
            day = FIRST + dt.timedelta(days=number // PER_DAY)
            lines.writerow([f"M{number:04}", day, months, plan, "yes" if left else "no"])


def add_dataset(project: Any, config: dict[str, Any], as_of: dt.date) -> None:
    path = project.root / f"configs/datasets/{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    source = project.root / "rows.csv"
    write_rows(source)
    project.change_params(
        {
            "dataset": config["name"],
            "as_of": str(as_of),
            "data": {"source": str(source)},
            "features": {"window_days": [7, 30]},
            "model": {"type": "logistic_regression"},
            "tuning": {
                "trials": 2,
                "folds": 2,
                "space": {"logistic_regression": {"C": {"type": "float", "low": 0.01, "high": 10.0, "log": True}}},
            },
            "evaluation": {"bootstrap_samples": 200},
        }
    )


def read_states(project: Any, ids: list[str], as_of: dt.date) -> pd.Series:
    run = load_run(project.root / "params.yaml", root=project.root, overrides={"as_of": str(as_of)})
    return build_features(run).read_online(ids, as_of=run.params.as_of_at).state


def test_a_table_with_days_goes_the_whole_way_and_is_refreshed(project):
    add_dataset(project, VISITS, LAST + dt.timedelta(days=1))
    project.run_stages("ingest", "validate", "features", "training-set", "train", "evaluate", "register")
    parts = {name: pd.read_parquet(project.root / f"data/training/{name}.parquet") for name in ("train", "test")}
    assert parts["train"]["event_timestamp"].max() < parts["test"]["event_timestamp"].min()
    assert project.read_json("metrics/registration.json")["alias"] == "champion"
    newest, older = f"M{DAYS * PER_DAY - 1:04}", "M0000"
    assert f"features of {LAST} online" in project.run("refresh", "--as-of", f"{LAST + dt.timedelta(days=1)}").output
    assert read_states(project, [newest, older], LAST).tolist() == ["fresh", "unknown"]


def test_a_table_that_is_too_old_is_not_brought_online(project):
    add_dataset(project, VISITS, LAST)
    late = LAST + dt.timedelta(days=32)
    output = " ".join(project.run("refresh", "--as-of", f"{late}", status=2).output.split())
    assert f"GateFailed: feature freshness: the newest snapshot is {LAST}, 32 days before as_of {late}" in output
    assert not (project.root / "state/feast/online.db").exists()


@pytest.mark.parametrize(("days", "status"), [(5, 0), (6, 2)])
def test_a_snapshot_of_today_from_events_that_stopped_is_not_brought_online(project, days, status):
    add_dataset(project, ORDERS, LAST)
    as_of = LAST + dt.timedelta(days=1 + days)
    output = " ".join(project.run("refresh", "--as-of", f"{as_of}", status=status).output.split())
    refused = f"GateFailed: feature freshness: the newest events are of {LAST}, {days} days before as_of {as_of}"
    assert (refused in output) == (status == 2)
    assert (project.root / "state/feast/online.db").exists() == (status == 0)
