"""The start page says what stands, and links only to what is there."""

from __future__ import annotations

import contextlib
import datetime as dt
import html
import json
import re
from pathlib import Path

import pytest

from closedloop.loop.start_page import write_start_page
from closedloop.loop.status.overview import Sources, describe_nothing, gather
from closedloop.store.checks import Checks
from closedloop.store.database import Database
from closedloop.store.journal import Journal
from closedloop.store.status_queries import StatusQueries
from tests.loops import HORIZON_DAYS, NAME, fill

NOW = dt.datetime(2024, 3, 1, 12, tzinfo=dt.UTC)
EMPTY = describe_nothing(NAME, horizon_days=HORIZON_DAYS, now=NOW, as_of=NOW)


@pytest.fixture
def folder(tmp_path):
    with contextlib.chdir(tmp_path):
        yield tmp_path


def write(folder: Path, view=EMPTY) -> tuple[str, list[str]]:
    """The page's text, and where its links go."""
    places = {
        "root": folder,
        "monitoring": folder / "state/monitoring",
        "replay": folder / "workspaces/loop/shop/loop.html",
    }
    page = write_start_page(view, **places, tracking=folder / "mlflow.db").read_text(encoding="utf-8")
    text = " ".join(html.unescape(re.sub("<[^>]+>", " ", page.split("</style>")[-1])).split())
    return text, re.findall(r'href="([^"]+)"', page)


def test_a_page_is_linked_when_it_is_there_and_opens_from_where_the_start_page_lies(folder):
    assert write(folder)[1] == []
    paths = ["reports/model_card.html", "reports/data_quality.html", "reports/data_docs/index.html"]
    paths += ["dvc_plots/index.html", "reports/test/roc.png", "state/monitoring/2024-02-01/report.html"]
    paths += ["state/monitoring/2024-03-01/report.html", "workspaces/loop/shop/loop.html", "mlflow.db"]
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    links = write(folder)[1]
    assert links.pop() == "http://127.0.0.1:5000/"
    found = [(folder / "reports" / link).resolve().relative_to(folder.resolve()).as_posix() for link in links]
    assert found == [path for path in paths if path not in ("state/monitoring/2024-02-01/report.html", "mlflow.db")]


def test_it_says_what_stands(folder):
    assert write(folder)[0].startswith(f"{NAME} No version of {NAME} is registered. No check was made yet. Pages")
    url = f"sqlite:///{folder / 'operations.db'}"
    fill(url, NOW)
    database = Database(url)
    sources = Sources(Journal(database), Checks(database), StatusQueries(database))
    view = gather(sources, NAME, horizon_days=HORIZON_DAYS, now=NOW, as_of=NOW)
    (folder / "metrics").mkdir()
    (folder / "metrics/eval_metrics.json").write_text('{"roc_auc": 0.8944, "accuracy": 0.8851}', encoding="utf-8")
    told = (
        f"Version 3 of {NAME} has been the champion since 2024-01-21 12:00 UTC. "
        "The last run's model has a ROC AUC of 0.894 and an accuracy of 88.5% on the test rows. "
        "Version 4 is being released: canary_5. The last check, as of "
        "2024-03-01, says 'alert' of version 3 after 2,000 predictions: drift in the newest check: "
        "purchase_count_30d (0.25). 60,000 is at stake with 2,000 customers; 310 offers would bring about 2,501. "
        "The last retraining failed."
    )
    assert told in write(folder, view)[0]


def test_it_says_what_to_type_next_in_the_projects_folder(folder):
    (folder / "Makefile").touch()
    workspace = folder / "workspaces/members"
    (workspace / "metrics").mkdir(parents=True)
    serving = {"serving": {"snapshot": "2024-01-01"}}
    (workspace / "metrics/training_set.json").write_text(json.dumps(serving), encoding="utf-8")
    assert "What to type next" not in write(folder)[0]
    with contextlib.chdir(workspace):
        told = write(folder)[0].partition("in the project's folder: ")[2]
    assert told == (
        "MLflow: make ui DATASET=members Serve: make serve DATASET=members Score: make score DATASET=members "
        "INPUT=workspaces/members/data/features/2024-01-01.parquet OUTPUT=workspaces/members/data/scores.parquet "
        "Watch: make demo DATASET=members; make status DATASET=members "
        "Release: closedloop --dataset members release history"
    )


def test_a_run_that_a_gate_stopped_is_told(folder):
    (folder / "metrics").mkdir()
    gates = {"accuracy": {"blocking": True, "passed": False}, "lift": {"blocking": True, "passed": True}}
    (folder / "metrics/gates.json").write_text(json.dumps({"gates": gates}), encoding="utf-8")
    assert "The last run was stopped by the gate accuracy (reports/model_card.html)." in write(folder)[0]
    (folder / "metrics/data_quality.json").write_text('{"failed_critical": 2}', encoding="utf-8")
    assert "The last run was stopped by the data gate (2 expectations," in write(folder)[0]
