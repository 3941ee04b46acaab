"""A table whose rows have a day: split, searched and refreshed by time; and features whose data stopped arriving."""

from __future__ import annotations

import csv
import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from closedloop.bootstrap import build_features, build_predictions, build_retraining_plan, load_run
from tests import online_rows
from tests.conftest import Project, create_project

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
    return online_rows.read_online(build_features(run), ids, as_of=run.params.as_of_at).state


@pytest.fixture(scope="module")
def visits(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The table, with a champion."""
    made = create_project(tmp_path_factory.mktemp("visits"))
    add_dataset(made, VISITS, LAST + dt.timedelta(days=1))
    made.run_stages("ingest", "validate", "features", "training-set", "train", "evaluate", "register")
    return made


def test_a_table_with_days_goes_the_whole_way_and_is_refreshed(visits):
    project = visits
    parts = {name: pd.read_parquet(project.root / f"data/training/{name}.parquet") for name in ("train", "test")}
    assert parts["train"]["event_timestamp"].max() < parts["test"]["event_timestamp"].min()
    assert project.read_json("metrics/registration.json")["alias"] == "champion"
    newest, older = f"M{DAYS * PER_DAY - 1:04}", "M0000"
    assert f"features of {LAST} online" in project.run("refresh", "--as-of", f"{LAST + dt.timedelta(days=1)}").output
    assert read_states(project, [newest, older], LAST).tolist() == ["fresh", "unknown"]


def test_days_that_are_over_are_scored_and_their_outcomes_come_from_a_file(visits):
    rows = pd.read_csv(visits.root / "rows.csv").head(3 * PER_DAY)
    rows.loc[PER_DAY:, "member"] = rows["member"].head(2 * PER_DAY).to_numpy()  # the same members come back
    for day, some in rows.groupby("day"):
        some.drop(columns="left").to_csv(visits.root / "day.csv", index=False)
        visits.run("score", "--input", "day.csv", "--output", f"scores-{day}.csv", "--as-of", str(day))
    as_of = FIRST + dt.timedelta(days=30)
    rows.to_csv(visits.root / "outcomes.csv", index=False)
    told = " ".join(visits.run("outcomes", "--input", "outcomes.csv", "--as-of", str(as_of)).output.split())
    assert f"{len(rows)} outcomes stored from outcomes.csv; 0 rows" in told
    again = visits.run("outcomes", "--input", "outcomes.csv", "--as-of", str(as_of), "--json").stdout
    assert json.loads(again) == {"rows": len(rows), "stored": 0, "unmatched": len(rows)}

    run = load_run(visits.root / "params.yaml", root=visits.root)
    known = build_predictions(run).list_outcomes("visits_churn", as_of=run.params.as_of_at, horizon_days=0)
    run.database.close()
    assert known["snapshot_at"].dt.date.nunique() == 3
    found = known.assign(day=known["snapshot_at"].dt.date.astype(str)).set_index(["customer_id", "day"])["outcome"]
    wanted = (rows.set_index(["member", "day"])["left"] == "yes").astype(int)
    assert found.sort_index().tolist() == wanted.sort_index().tolist()
    visits.run("monitor", "--as-of", str(as_of), "--no-report")


@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        ([("M0001", "2024-01-01", "yes"), ("M0001", "2024-01-01", "no")], "'M0001' is named with both outcomes"),
        ([("M0001", "2024-01-01", "maybe")], "row 1, column 'left': must be 'yes' (churned) or 'no' (stayed)"),
        ([("M0001", "2024-01-01", "yes"), ("", "2024-01-01", "no")], "row 2, column 'member': is empty"),
        ([("M0001", "the first", "no")], "column 'day': must be a date or time"),
    ],
)
def test_a_file_of_outcomes_that_is_wrong_stores_nothing(visits, rows, rule):
    pd.DataFrame(rows, columns=["member", "day", "left"]).to_csv(visits.root / "wrong.csv", index=False)
    told = visits.run("outcomes", "--input", "wrong.csv", "--as-of", "2024-03-01", status=1).output
    assert rule in " ".join(told.split())


def test_a_file_of_outcomes_names_predictions_that_were_given(visits):
    scored = visits.root / "one.csv"
    pd.read_csv(visits.root / "rows.csv").tail(2).to_csv(visits.root / "two.csv", index=False)
    visits.run("score", "--input", "two.csv", "--output", scored.name, "--as-of", "2024-02-09")
    ids = pd.read_csv(scored)["prediction_id"]
    ids.to_frame().assign(outcome=[1, 0]).to_csv(visits.root / "by_id.csv", index=False)
    assert "2 outcomes stored" in visits.run("outcomes", "--input", "by_id.csv", "--as-of", "2024-03-01").output
    pd.DataFrame({"prediction_id": ["f" * 48], "outcome": [1]}).to_csv(visits.root / "by_id.csv", index=False)
    told = visits.run("outcomes", "--input", "by_id.csv", "--as-of", "2024-03-01", status=1).output
    assert "was never given" in told
    pd.DataFrame({"who": ["M0001"]}).to_csv(visits.root / "by_id.csv", index=False)
    told = visits.run("outcomes", "--input", "by_id.csv", "--as-of", "2024-03-01", status=1).output
    assert "prediction_id or member, and outcome; found who" in " ".join(told.split())


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


def test_the_policy_is_obeyed_by_retrainings_and_named_on_the_card(visits: Project, monkeypatch) -> None:
    monkeypatch.setenv("CLOSEDLOOP_MONITORING__POLICY", "recalibrate")
    run = load_run(visits.root / "params.yaml", root=visits.root)
    assert build_retraining_plan(run)(run.params).model.recalibrates_only
    visits.run("evaluate")
    card = (visits.root / "reports/model_card.html").read_text(encoding="utf-8")
    assert "recalibrate on outcomes alone, and train nothing (monitoring.policy: recalibrate)" in card
    monkeypatch.delenv("CLOSEDLOOP_MONITORING__POLICY")
    run = load_run(visits.root / "params.yaml", root=visits.root)
    assert not build_retraining_plan(run)(run.params).model.recalibrates_only
