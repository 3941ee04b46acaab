"""Reasons in answers of the ASGI application: what is asked for, what is refused, and what it costs the others."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from closedloop.cli import options
from closedloop.config.settings import ServingSettings
from closedloop.core.training.estimators import encode_frame
from closedloop.rules import REASONS_MAX
from closedloop.serving.config import WorkerConfig
from closedloop.serving.http.app import Application
from closedloop.serving.models import load_model
from closedloop.serving.worker import Worker
from tests.model_folders import ROWS, write_model_folder
from tests.trained_folders import Trained, list_values, make_people, write_trained_folder

GROUPS = {"visits": ("visits_7d", "visits_30d")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Trained:
    return write_trained_folder(
        tmp_path_factory.mktemp("model") / "bundled", "hist_gradient_boosting", calibrated=True, reasons=GROUPS
    )


def post(folder: Path, state_dir: Path, path: str, body: Any) -> Any:
    """The status and answer of one request to a worker with a bundled model."""
    settings = ServingSettings(range_margin=10.0)
    config = WorkerConfig(model_name="test_churn", state_dir=state_dir, settings=settings, bundled_dir=folder)
    app = Application(Worker(config))

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as client:
            return await client.post(path, json=body)

    answer = asyncio.run(send())
    return answer.status_code, answer.json()


def test_an_answer_has_as_many_reasons_as_it_was_asked_for(trained: Trained, tmp_path: Path) -> None:
    frame, _ = make_people(40, 5)
    raw_scores = trained.read_raw_scores(frame)
    explainer = load_model(trained.folder, version="1", folder_sha256=None).explainer
    contributions = explainer.weigh(encode_frame(trained.contract.features, frame))
    items: list[Any] = [{"features": list_values(frame, row), "explain": 1 + row % 5} for row in range(40)]
    items[7] = {"features": list_values(frame, 7)}
    items[8] = {"features": {}, "explain": 3}
    status, answer = post(trained.folder, tmp_path, "/predict/batch", items)
    assert status == 200
    for row, one in enumerate(answer["predictions"]):
        if row in (7, 8):
            assert "explanation" not in one
            continue
        explanation = one["explanation"]
        assert explanation["raw_score"] == pytest.approx(raw_scores[row], abs=1e-5)
        assert len(explanation["reasons"]) == 1 + row % 5
        named = {reason["reason"]: reason for reason in explanation["reasons"]}
        sums = {
            "visits": contributions[row, 1] + contributions[row, 2],
            "age": contributions[row, 0],
            "empty": 0.0,
            "plan": contributions[row, 4],
            "city": contributions[row, 5],
        }
        strongest = sorted(sums, key=lambda name: (-abs(sums[name]), name))
        assert list(named) == strongest[: len(named)]
        for name, reason in named.items():
            assert reason["contribution"] == pytest.approx(sums[name], abs=1e-9)
            assert reason["value"] == list_values(frame, row)[reason["feature"]]
    explanation = answer["predictions"][4]["explanation"]
    found = sum(reason["contribution"] for reason in answer["predictions"][4]["explanation"]["reasons"])
    assert explanation["base"] + found == pytest.approx(raw_scores[4], abs=1e-5)  # all five reasons were asked for


def test_one_customer_is_explained_as_in_a_batch(trained: Trained, tmp_path: Path) -> None:
    row = {"features": list_values(trained.frame, 0), "explain": 3}
    (status, one), (_, many) = (
        post(trained.folder, tmp_path, path, body) for path, body in (("/predict", row), ("/predict/batch", [row]))
    )
    assert status == 200
    assert one["explanation"] == many["predictions"][0]["explanation"]
    status, plain = post(trained.folder, tmp_path, "/predict", {"features": row["features"]})
    assert status == 200
    assert set(one) - set(plain) == {"explanation"}
    assert (plain["probability"], plain["prediction"]) == (one["probability"], one["prediction"])


@pytest.mark.parametrize("explain", [0, 21, -1, True, 2.5, "3", [3], {}])
def test_other_numbers_of_reasons_are_refused(trained: Trained, tmp_path: Path, explain: Any) -> None:
    row = {"features": list_values(trained.frame, 0), "explain": explain}
    status, answer = post(trained.folder, tmp_path, "/predict", row)
    assert status == 400
    (breach,) = answer["error"]["details"]
    assert (breach["field"], breach["rule"]) == ("explain", "whole number from 1 to 20")
    _, answer = post(trained.folder, tmp_path, "/predict/batch", [row])
    assert answer["predictions"][0]["error"]["details"] == [breach]


def test_a_version_without_reasons_refuses_them_before_it_scores(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    row = {"features": ROWS[0], "explain": 3}
    for path, body in (("/predict", row), ("/predict/batch", [row])):
        status, answer = post(folder, tmp_path / "state", path, body)
        assert (status, answer["error"]["code"]) == (400, "no_reasons")
        assert answer["error"]["details"][0]["rule"].startswith("version bundled gives no reasons: train and release")
    assert not [path for path in (tmp_path / "state" / "spool").rglob("*") if path.is_file() and path.stat().st_size]
    assert post(folder, tmp_path / "state", "/predict", {"features": ROWS[0]})[0] == 200


def test_the_command_lines_limit_is_the_services() -> None:
    assert options.REASONS_MAX == REASONS_MAX


def test_a_service_that_explains_nothing_imports_nothing_for_it(trained: Trained, tmp_path: Path) -> None:
    script = f"""
import asyncio, json, sys
from closedloop.serving.config import WorkerConfig
from closedloop.serving.http.app import Application
from closedloop.serving.worker import Worker

config = WorkerConfig(model_name="test_churn", state_dir={str(tmp_path)!r}, bundled_dir={str(trained.folder)!r})
app = Application(Worker(config))
NAMES = ("closedloop.core.reasons", "closedloop.adapters.onnx_explainer", "closedloop.serving.http.explaining")

def ask(path, body):
    sent = []
    async def receive():
        return {{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}}
    async def send(message):
        sent.append(message)
    scope = {{"type": "http", "method": "POST", "path": path, "headers": []}}
    asyncio.run(app(scope, receive, send))
    loaded = sorted(name for name in sys.modules if name.startswith(NAMES))
    print(sent[0]["status"], bool(loaded), any(name in sys.modules for name in ("onnx", "sklearn", "pandas")))

row = {{"features": {list_values(trained.frame, 0)!r}}}
ask("/predict", row)
ask("/predict/batch", [row])
ask("/predict", {{**row, "explain": 3}})
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["200 False False", "200 False False", "200 True False"]


def test_scores_do_not_depend_on_reasons(trained: Trained, tmp_path: Path) -> None:
    rows = [{"features": list_values(trained.frame, row)} for row in range(20)]
    plain = post(trained.folder, tmp_path, "/predict/batch", rows)[1]
    told = post(trained.folder, tmp_path, "/predict/batch", [row | {"explain": 20} for row in rows])[1]
    scores = [[one["probability"] for one in answer["predictions"]] for answer in (plain, told)]
    np.testing.assert_array_equal(*scores)
