"""From logged predictions to a verdict, through the real store, registry and label rule."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import subprocess

import numpy as np
import pandas as pd
import pytest

from closedloop.adapters.mlflow import Tracking
from closedloop.adapters.onnxruntime import OnnxScorer
from closedloop.config.settings import load_settings
from closedloop.contract import MODEL_FILE, read_contract
from closedloop.core.training.estimators import encode_frame
from closedloop.processes import start_process
from closedloop.records import Outcome, Prediction, digest_position
from closedloop.store.checks import Checks, Retraining
from closedloop.store.database import Database
from closedloop.store.journal import Journal
from closedloop.store.predictions import Predictions
from tests.conftest import Project

pytestmark = pytest.mark.thorough

SNAPSHOT = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


def log_predictions(project: Project, rows: pd.DataFrame, at: dt.datetime, version: str) -> list[Prediction]:
    """As the service logs what it answers, at a simulated time; returns it."""
    folder = project.root / "models/candidate"
    contract = read_contract(folder)
    scores = OnnxScorer(folder / MODEL_FILE).score(encode_frame(contract.features, rows))
    names = list(contract.feature_names)
    values = rows[names].astype(object).where(rows[names].notna(), None).to_numpy()
    records = [
        Prediction(
            digest_position("test", at.isoformat(), customer),
            "r",
            contract.model_name,
            version,
            "champion",
            "http",
            at,
            tuple(row),
            float(score),
            int(score >= contract.threshold),
            0.5,
            customer_id=customer,
            features_as_of=SNAPSHOT,
        )
        for customer, row, score in zip(rows["customer_id"], values, scores, strict=True)
    ]
    store = open_store(project)
    assert store.insert(records).predictions == len(records)
    store.database.close()
    return records


def open_store(project: Project) -> Predictions:
    return Predictions(Database(f"sqlite:///{project.root / 'state/operations.db'}"))


def list_churned(project: Project, customers: set[str]) -> dict[str, int]:
    """By the rule's own words: no purchase in the 30 days from the snapshot, among those with one in the 60 before."""
    folder = project.root / "state/outcomes/shop_churn/raw/events"
    events = pd.concat([pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))])
    bought = events[events["event_type"] == "purchase"]
    before = bought[(bought["time"] >= SNAPSHOT - 60 * DAY) & (bought["time"] < SNAPSHOT)]
    after = bought[(bought["time"] >= SNAPSHOT) & (bought["time"] < SNAPSHOT + 30 * DAY)]
    active, stayed = set(before["customer_id"]) & customers, set(after["customer_id"])
    return {customer: int(customer not in stayed) for customer in active}


def read_champion(project: Project) -> str:
    store = open_store(project)
    deployed = Journal(store.database).read_deployment("shop_churn")
    store.database.close()
    assert deployed is not None
    return deployed.champion_version


def test_a_shift_is_noticed_and_outcomes_decide(shop_copy: Project) -> None:
    version = read_champion(shop_copy)
    rows = pd.read_parquet(shop_copy.root / "data/features/2024-01-01.parquet")

    log_predictions(shop_copy, rows, SNAPSHOT + DAY / 2, version)
    quiet = shop_copy.run("monitor", "--as-of", "2024-01-02", "--fail-on", "watch")
    assert "none: version" in quiet.output
    assert f"{len(rows):,} predictions" in quiet.output

    shifted = rows.assign(age=rows["age"] - 15, customer_id=[f"N{number}" for number in range(len(rows))])
    log_predictions(shop_copy, shifted, SNAPSHOT + 1.5 * DAY, version)
    noticed = shop_copy.run("monitor", "--as-of", "2024-01-03", "--fail-on", "watch", status=2)
    assert "age (" in noticed.output
    assert "GateFailed: the verdict is" in noticed.output
    assert shop_copy.run("monitor", "--as-of", "2024-01-03").output.splitlines()[0] == noticed.output.splitlines()[0]
    told = json.loads(shop_copy.run("monitor", "--as-of", "2024-01-03", "--json").stdout)
    assert noticed.output.startswith(f"{told['check']['verdict']}: version {told['check']['model_version']}")
    assert "age" in told["check"]["evidence"]["drift"]["drifted"]
    assert told["report"].startswith("report: state/monitoring/shop_churn/2024-01-03/report.html, MLflow run ")
    assert "  report: state/monitoring/shop_churn/2024-01-03/report.html" in noticed.output.splitlines()

    too_early = shop_copy.run("outcomes", "--as-of", "2024-01-30")
    assert too_early.output.count("0 outcomes of 0 snapshots stored")
    labelled = shop_copy.run("outcomes", "--as-of", "2024-01-31").output
    expected = list_churned(shop_copy, set(rows["customer_id"]))
    assert f"{len(expected):,} outcomes of 1 snapshot stored; left out: {len(rows):,} of customers" in labelled
    none = json.loads(shop_copy.run("outcomes", "--as-of", "2024-02-02", "--json").stdout)
    assert (none["stored"], len(none["snapshots"])) == (0, 1)
    store = open_store(shop_copy)
    found = store.list_outcomes("shop_churn", as_of=SNAPSHOT + 30 * DAY, horizon_days=30)
    store.database.close()
    assert dict(zip(found["customer_id"], found["outcome"], strict=True)) == expected

    shop_copy.run("monitor", "--as-of", "2024-01-31")
    checks = Checks(Database(f"sqlite:///{shop_copy.root / 'state/operations.db'}"))
    newest, *before = checks.list_checks("shop_churn")
    checks.database.close()
    assert [check.until for check in before] == [SNAPSHOT + 2 * DAY, SNAPSHOT + DAY]
    assert newest.since == SNAPSHOT + 2 * DAY
    few = "0 customers since the last window, 500 are needed"
    assert newest.evidence["reasons"] == [few, "outcomes are as expected"]
    realised = newest.evidence["realised"]
    assert newest.outcomes == realised["rows"] == len(expected)
    assert realised["accuracy"] == pytest.approx((found["decision"] == found["outcome"]).mean(), abs=1e-6)
    assert np.abs(realised["accuracy"] - realised["expected"]["accuracy"]) < 0.03
    assert not realised["breach"]

    shown = json.loads(shop_copy.run("status", "--json").output)
    assert shown["realised"] == realised
    assert shown["accuracy"]["whole"] == min(1_000, len(expected))
    assert abs(shown["accuracy"]["part"] / shown["accuracy"]["whole"] - realised["accuracy"]) < 0.06
    assert 0 < shown["labelled"]["part"] < shown["labelled"]["whole"]
    assert "age" in shown["drift"]["drifted"]
    assert shown["estimate"]["reference"]["accuracy"] > 0.5
    screen = shop_copy.run("status").output
    assert f"version {version} for" in screen
    assert "as of 2024-01-31" in screen
    assert re.search(r"accuracy \d\d\.\d% of the last", screen)


def list_retrainings(project: Project) -> list[Retraining]:
    checks = Checks(Database(f"sqlite:///{project.root / 'state/operations.db'}"))
    found = checks.list_retrainings("shop_churn")
    checks.database.close()
    return found


def list_versions(project: Project) -> list[str]:
    tracking = Tracking(load_settings("local", folder=project.root / "configs"), "shop_churn")
    return sorted(str(found.version) for found in tracking.client.search_model_versions("name = 'shop_churn'"))


@pytest.mark.timeout(900)
def test_a_breach_retrains_once_whatever_dies_and_however_often_it_is_looked_at(shop_copy: Project) -> None:
    """Outcomes that are the opposite of every decision; the process that begins to retrain is killed."""
    version = read_champion(shop_copy)
    shop_copy.add_sources("pipelines")
    rows = pd.read_parquet(shop_copy.root / "data/features/2024-01-01.parquet")
    answered = log_predictions(shop_copy, rows, SNAPSHOT + DAY / 2, version)
    store = open_store(shop_copy)
    store.insert([Outcome(one.prediction_id, 1 - one.decision, SNAPSHOT + 30 * DAY) for one in answered])
    store.database.close()
    monitor = ["closedloop", "monitor", "--as-of", "2024-01-31", "--no-report"]
    run = {"cwd": shop_copy.root, "env": os.environ | {"CLOSEDLOOP_MONITORING__RETRAIN": "true"}, "text": True}

    with start_process(monitor, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **run) as first:
        assert first.stderr
        for line in first.stderr:  # the first word of a stage
            if "ingest  " in line:
                first.kill()
                break
    [open_one] = list_retrainings(shop_copy)
    assert open_one.state == "running"
    assert open_one.requested_by == "monitor"
    assert "outcomes: a recalibration would win back" in open_one.reason

    begun = [start_process(monitor, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **run) for _ in range(2)]
    told = [process.communicate()[0] for process in begun]
    assert [process.returncode for process in begun] == [0, 0], told
    assert all(f"retrain: version {version}" in output for output in told)
    assert sum(f"retraining {open_one.trigger_id} is registered" in output for output in told) == 1, told
    [ended] = list_retrainings(shop_copy)
    assert (ended.trigger_id, ended.state) == (open_one.trigger_id, "registered")
    assert list_versions(shop_copy) == [version, str(ended.model_version)]
    assert read_champion(shop_copy) == version

    again = subprocess.run(monitor, capture_output=True, check=True, **run)
    assert again.stdout.splitlines()[-1] == f"  retraining {ended.trigger_id} is registered"
    assert list_retrainings(shop_copy) == [ended]
    assert len(list_versions(shop_copy)) == 2


def test_a_wrong_call_says_what_is_allowed(project: Project) -> None:
    assert "give --as-of DATE" in project.run("monitor", status=1).output
    assert (
        "allowed are watch, alert, retrain"
        in project.run("monitor", "--as-of", "2024-01-02", "--fail-on", "panic", status=1).output
    )
    assert "allowed are whole days" in project.run("monitor", "--every", "soon", status=1).output
