"""The commands of docs/actions.md on a released model: reasons of a file, of an answer and of a logged prediction."""

from __future__ import annotations

import datetime as dt
import json
import re
import shlex
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from closedloop.bootstrap import build_predictions, build_releases, load_run
from closedloop.release.moves import deploy_champion
from closedloop.serving.models import load_model
from tests.http_service import run_service, wait_until
from tests.releases import register_folder
from tests.trained_folders import list_values, write_trained_folder

pytestmark = pytest.mark.thorough

PAGE = Path(__file__).parents[2] / "docs" / "actions.md"
NAME = "shop_churn"


def read_commands() -> list[str]:
    return [found.strip() for found in re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)]


def test_the_commands_of_the_page_give_the_same_reasons_through_every_door(project, tmp_path):
    trained = write_trained_folder(
        tmp_path / "model",
        "hist_gradient_boosting",
        model_name=NAME,
        calibrated=True,
        reasons={"visits": ("visits_7d", "visits_30d")},
    )
    run = load_run(project.root / "params.yaml", root=project.root)
    releases, store = build_releases(run), build_predictions(run)
    register_folder(releases, trained.folder, "1", f"{NAME}_0")
    deploy_champion(releases, "1", now=dt.datetime.now(dt.UTC), actor="a test", reason="for the test")
    rows = trained.frame.head(50)
    rows.assign(customer_id=[f"C{row}" for row in range(50)]).to_parquet(project.root / "customers.parquet")
    score, ask, why = read_commands()[:3]

    project.run(*shlex.split(score)[1:])
    scored = pd.read_csv(project.root / "scores.csv")
    explainer = load_model(trained.folder, version="1", folder_sha256=None).explainer
    assert scored["raw_score"].to_numpy() == pytest.approx(trained.read_raw_scores(rows), abs=1e-5)

    with run_service(project.root) as service:
        features = {"features": list_values(rows, 0), "explain": 3}
        command = shlex.split(ask.replace(":3000/", f":{service.port}/"))
        place = command.index("-d") + 1
        assert json.loads(command[place]) == {"customer_id": "C1", "explain": 3}
        command[place] = json.dumps(features)  # no online store knows the test's customers
        answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        shown = answer["explanation"]
        assert shown["base"] == pytest.approx(explainer.base)
        assert [one["reason"] for one in shown["reasons"]] == scored.loc[
            0, ["reason_1", "reason_2", "reason_3"]
        ].tolist()
        sizes = [scored.loc[0, f"reason_{number}_contribution"] for number in (1, 2, 3)]
        assert [one["contribution"] for one in shown["reasons"]] == pytest.approx(sizes, abs=1e-9)
        status, refused = service.call("POST", "/predict", {**features, "explain": 21})
        assert (status, refused["error"]["details"][0]["rule"]) == (400, "whole number from 1 to 20")
        described = service.call("GET", "/openapi.json")[1]["components"]["schemas"]
        limits = described["ScoringRequest"]["properties"]["explain"]["anyOf"][0]
        assert (limits["minimum"], limits["maximum"]) == (1, 20)
        assert "explanation" not in described["PredictAnswer"]["required"]
        wait_until(lambda: any(store.read_predictions(NAME, ids=[answer["prediction_id"]])), "the answer in the store")

    table = project.run(*shlex.split(why.replace("PREDICTION_ID", answer["prediction_id"]))[1:]).output
    for one in shown["reasons"]:
        (line,) = [line for line in table.splitlines() if line.startswith(one["reason"] + " ")]
        assert line.endswith(f"{one['contribution']:+.4f}")
        assert one["feature"] in line
    assert f"{shown['raw_score']:+.4f}" in table
    everything = json.loads(project.run("why", "--json", answer["prediction_id"]).output)
    assert everything["contributions"]["features"][:3] == shown["reasons"]
