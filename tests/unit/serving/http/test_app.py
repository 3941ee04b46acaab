"""The ASGI application in this process: routes, refusals, tokens, limits, variants, and the log before the answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from prometheus_client import generate_latest

from closedloop.config.settings import ServingSettings
from closedloop.contract import digest_folder
from closedloop.records import Outcome, Prediction
from closedloop.serving.config import WorkerConfig
from closedloop.serving.exposition import build_registry
from closedloop.serving.http import exchange
from closedloop.serving.http.app import Application
from closedloop.serving.log import spool
from closedloop.serving.log.drain import list_spools, read_lines
from closedloop.serving.log.segments import list_segments
from closedloop.serving.logs import JsonFormatter
from closedloop.serving.slots.slots import RefusedVersion, Slot, Slots
from closedloop.serving.worker import Worker
from tests.model_folders import ROWS, expected_score, write_model_folder, write_online_rows, write_slots

ROW = ROWS[0]
FAILING = ROW | {"visits_30d": 21.0}  # the challenger's graph raises on it where `deploy` says so
SNAPSHOT = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
TABLE = "test_churn_test_churn_0"


def write_customers(path: Path) -> dict[str, Any]:
    """An online store that knows three customers, one of them of long ago, one without anything that can be read."""
    known = {"fresh": SNAPSHOT, "stale": SNAPSHOT - dt.timedelta(days=400), "broken": SNAPSHOT}
    write_online_rows(path, "test_churn", known)
    with contextlib.closing(sqlite3.connect(path)) as store, store:
        store.execute(f"UPDATE {TABLE} SET value = x'99' WHERE hex(entity_key) LIKE '%' || hex('broken')")
    return {"online_store": {"type": "sqlite", "path": str(path)}, "registry": {}}


def drop_customers(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as store, store:
        store.execute(f"DROP TABLE {TABLE}")


class Service:
    """A worker and its application, called without a socket."""

    def __init__(self, folder, **config: Any) -> None:
        self.state_dir = folder / "state"
        limits = {name: config.pop(name) for name in ServingSettings.model_fields if name in config}
        values = {"bundled_dir": folder / "bundled", "as_of": SNAPSHOT.date(), **config}
        settings = ServingSettings().model_copy(update=limits)
        given = WorkerConfig(model_name="test_churn", state_dir=self.state_dir, settings=settings, **values)
        self.worker = Worker(given)
        self.app = Application(self.worker)

    def call(self, *requests: Callable[[httpx.AsyncClient], Any]) -> list[httpx.Response]:
        """Send requests at once and stop."""

        async def send():
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                return await asyncio.gather(*[request(client) for request in requests])

        return asyncio.run(send())

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        (answer,) = self.call(lambda client: client.post(path, json=body, **options))
        return answer

    def get(self, path: str, **options: Any) -> httpx.Response:
        (answer,) = self.call(lambda client: client.get(path, **options))
        return answer

    def read_metric(self, name: str, **labels: str) -> float | None:
        self.worker.metrics.flush()
        return build_registry(self.state_dir / "metrics").get_sample_value(name, labels)

    def read_log(self) -> list[Any]:
        spools = list_spools(self.state_dir / "spool")
        return [line.record for spool in spools for segment in list_segments(spool) for line in read_lines(segment)]


@pytest.fixture
def make_service(tmp_path, monkeypatch):
    write_model_folder(tmp_path / "bundled")
    made: list[Service] = []

    def make(*, tokens: dict[str, list[str]] | None = None, **config: Any) -> Service:
        if tokens:
            monkeypatch.setenv("CLOSEDLOOP_SERVING__TOKENS", json.dumps(tokens))
        made.append(Service(tmp_path, **config))
        return made[-1]

    yield make
    for service in made:
        service.worker.log.close()
        service.worker.metrics.close()


@pytest.fixture
def service(make_service):
    return make_service()


def deploy(
    service, tmp_path, *, mode: str, weight: float = 0.0, bias: float = 2.0, fails_from: int | None = None
) -> None:
    """A challenger beside the champion; ``fails_from`` as in `write_model_folder`, of the challenger."""
    challenger = write_model_folder(tmp_path / "v2", bias=bias, fails_from=fails_from)
    folders = {"1": write_model_folder(tmp_path / "v1"), "2": challenger}
    one, two = (Slot(version, str(folder), digest_folder(folder)) for version, folder in folders.items())
    slots = Slots(3, "salt-3", one, two, mode, weight)
    write_slots(service.state_dir, slots)
    service.worker.slots.load_first()


def test_an_answer_has_the_score_and_is_logged_with_its_features(service):
    answer = service.post("/predict", {"features": ROW, "customer_id": "C1", "request_id": "r1"})
    assert answer.status_code == 200
    found = answer.json()
    assert found["probability"] == pytest.approx(expected_score(ROW), abs=1e-6)
    assert (found["prediction"], found["model_version"], found["variant"]) == (1, "bundled", "champion")
    assert (found["request_id"], found["features_as_of"]) == ("r1", None)
    assert found["latency_ms"] > 0
    (logged,) = service.read_log()
    assert isinstance(logged, Prediction)
    assert (logged.prediction_id, logged.customer_id) == (found["prediction_id"], "C1")
    assert logged.features == (6.0, 40.0, "plus")
    assert (logged.score, logged.decision) == (found["probability"], found["prediction"])


@pytest.mark.parametrize(("path", "body"), [("/predict", {"features": ROW}), ("/predict/batch", [{"features": ROW}])])
def test_the_time_that_a_client_takes_to_send_a_request_is_not_the_services(service, monkeypatch, path, body):
    now, sent, content = [100.0], [], json.dumps(body).encode()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    parts = [content[:9], content[9:]]

    async def receive():
        now[0] += 4.0
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    asyncio.run(service.app(scope, receive, send))
    assert sent[0]["status"] == 200
    answer = json.loads(sent[1]["body"])
    answered = answer["predictions"][0] if "predictions" in answer else answer
    assert (answered["latency_ms"], answer.get("total_latency_ms", 0.0)) == (0.0, 0.0)
    assert [record.latency_ms for record in service.read_log()] == [0.0]
    name = "prediction_request_latency_seconds"
    assert service.read_metric(f"{name}_bucket", le="0.0005") == service.read_metric(f"{name}_count") == 1
    assert service.read_metric(f"{name}_sum") == 0


def test_concurrent_requests_are_scored_together_and_each_gets_its_own(service):
    rows = [{**ROW, "visits_30d": float(visits)} for visits in range(20)]
    answers = service.call(*[lambda client, row=row: client.post("/predict", json={"features": row}) for row in rows])
    found = [answer.json()["probability"] for answer in answers]
    assert found == pytest.approx([expected_score(row) for row in rows], abs=1e-6)
    assert len({answer.json()["prediction_id"] for answer in answers}) == len(service.read_log()) == 20


def test_customers_of_the_online_store(make_service, tmp_path):
    service = make_service(online=write_customers(tmp_path / "online.db"))
    found = service.post("/predict", {"customer_id": "fresh"}).json()
    assert found["probability"] == pytest.approx(expected_score(ROW), abs=1e-6)
    assert found["features_as_of"] == "2024-01-01T00:00:00+00:00"
    for customer, rule in (
        ("nobody", "is known to the online store"),
        ("stale", "has fresh features; those in the"),
        ("broken", "has features that can be read"),
    ):
        refused = service.post("/predict", {"customer_id": customer})
        assert refused.status_code == 400
        (detail,) = refused.json()["error"]["details"]
        assert (detail["field"], detail["value"]) == ("customer_id", customer)
        assert detail["rule"].startswith(rule)
    drop_customers(tmp_path / "online.db")
    down = service.post("/predict", {"customer_id": "fresh"})
    assert (down.status_code, down.headers["retry-after"]) == (503, "1")
    assert "online store" in down.json()["error"]["message"]
    assert service.post("/predict", {"features": ROW}).status_code == 200


def test_without_an_online_store_customers_are_refused_with_the_way_out(service):
    answer = service.post("/predict", {"customer_id": "C1"})
    assert answer.status_code == 503
    assert "send features instead" in answer.json()["error"]["message"]


def test_a_batch_answers_each_item_for_itself(service):
    items = [{"features": ROW}, {"features": {}}, {"features": ROWS[1], "request_id": "b"}, 7]
    answer = service.post("/predict/batch", items)
    assert answer.status_code == 200
    found = answer.json()
    assert found["count"] == 4
    assert found["total_latency_ms"] > 0
    first, second, third, fourth = found["predictions"]
    assert first["probability"] == pytest.approx(expected_score(ROW), abs=1e-6)
    assert third["request_id"] == "b"
    assert {detail["field"] for detail in second["error"]["details"]} == {
        "features.visits_30d",
        "features.age",
        "features.plan",
    }
    assert fourth["error"]["code"] == "invalid_request"
    assert len(service.read_log()) == 2


@pytest.mark.parametrize("body", [[], {}, "x", [{"features": ROW}] * 4])
def test_a_batch_of_another_kind_or_size_is_refused(make_service, body):
    service = make_service(batch_items_max=3)
    answer = service.post("/predict/batch", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["details"][0]["rule"] == "array of 1 to 3 requests"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1}}', b"[" * 100_000, b"1e999", b'"\\ud800"'])
def test_a_body_that_is_not_json_is_refused(service, content):
    for path in ("/predict", "/predict/batch", "/outcomes"):
        (answer,) = service.call(lambda client, path=path: client.post(path, content=content))
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] in ("invalid_json", "invalid_request")


def test_limits_and_unknown_places(make_service):
    service = make_service(body_bytes_max=1000, queue_max=0)
    loaded = {"status": "ok", "model_loaded": True, "model_version": "bundled", "model_name": "test_churn"}
    digest = digest_folder(Path(service.worker.config.bundled_dir))
    assert service.get("/health").json() == loaded | {"folder_sha256": digest}
    assert make_service().get("/model/info").json()["model_name"] == "test_churn"
    busy = service.post("/predict", {"features": ROW})
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
    service = make_service(body_bytes_max=1000)
    assert service.post("/predict", {"customer_id": "x" * 1000}).status_code == 413

    async def stream():
        yield b"[" * 600
        yield b"[" * 600

    (chunked,) = service.call(lambda client: client.post("/predict", content=stream()))
    assert chunked.status_code == 413
    assert service.get("/nowhere").status_code == 404
    wrong = service.get("/predict")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


@contextlib.contextmanager
def fill_disk(monkeypatch):
    """No byte is free on the spool's disk within the block."""
    with monkeypatch.context() as full:
        full.setattr(spool, "CHECK_EVERY_SECONDS", 0.0)
        full.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=1))
        yield


def test_a_full_queue_empties_again_whatever_becomes_of_its_requests(make_service, monkeypatch):
    service = make_service(queue_max=3)

    def ask(body):
        answers = service.call(*[lambda client: client.post("/predict", json=body)] * 8)
        return sorted(answer.status_code for answer in answers)

    with fill_disk(monkeypatch):
        for _ in range(3):
            assert ask({}) == [400] * 8  # refused at once: none waits
            assert ask({"features": ROW}) == [429] * 5 + [503] * 3
    assert ask({"features": ROW}) == [200] * 3 + [429] * 5


def test_a_body_that_comes_too_slowly_is_given_up(service, monkeypatch):
    monkeypatch.setattr(exchange, "BODY_SECONDS", 0.02)

    async def stream():
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    (slow,) = service.call(lambda client: client.post("/predict", content=stream()))
    assert (slow.status_code, slow.json()["error"]["code"]) == (408, "timeout")
    assert service.post("/predict", {"features": ROW}).status_code == 200


def test_the_access_log_carries_the_ids_where_it_is_on(make_service, caplog):
    caplog.set_level("INFO", "closedloop.access")
    quiet = make_service()
    quiet.post("/predict", {"features": ROW})
    assert not [record for record in caplog.records if record.name == "closedloop.access"]
    service = make_service(access_log=True)
    answer = service.post("/predict", {"features": ROW, "request_id": "r1"}).json()
    refused = service.post("/predict", {}).json()
    lines = [json.loads(JsonFormatter().format(r)) for r in caplog.records if r.name == "closedloop.access"]
    assert (lines[0]["request_id"], lines[0]["prediction_id"]) == ("r1", answer["prediction_id"])
    assert lines[0]["message"].startswith("POST /predict 200 ")
    assert lines[1]["request_id"] == refused["request_id"]
    assert "prediction_id" not in lines[1]


def test_nothing_that_a_client_sends_begins_a_line_of_the_log(make_service, caplog):
    forged = 'x\r\n\x1b[2K\u2028{"level": "error", "message": "forged"}\x00'
    caplog.set_level("INFO")
    service = make_service(access_log=True)
    for body in ({"features": ROW, "request_id": forged}, {"features": ROW, "customer_id": forged}, {forged: forged}):
        service.post("/predict", body)
    service.post("/outcomes", {"prediction_id": forged, "outcome": 1})
    headers = {"x-request-id": forged.encode(), "user-agent": forged.encode()}
    service.get("/no%0d%0a%7Bforged%00%1b%E2%80%A8", headers=headers)
    texts = [JsonFormatter().format(record) for record in caplog.records if record.name.startswith("closedloop")]
    assert sum("forged" in text for text in texts) >= 2  # it was written down, as what it is
    for text in texts:
        assert text.isascii()
        assert text.isprintable()
        assert json.loads(text)["level"] != "error"


def test_who_has_no_right_writes_no_line_to_the_log(make_service, caplog):
    caplog.set_level("INFO")
    service = make_service(tokens=TOKENS)
    for path in ("/model/info", "/predict", "/no"):
        service.get(path)
    assert [record for record in caplog.records if record.name.startswith("closedloop.serving.http")] == []


def test_a_score_that_is_no_number_is_neither_answered_nor_logged(service, caplog):
    """A model with a hole that no check has found; the requests beside it do not suffer."""

    class Holed:
        def __init__(self, scorer):
            self.score = lambda matrix: np.where(np.isnan(matrix[:, 0]), np.nan, scorer.score(matrix))

    slots = service.worker.slots
    champion = dataclasses.replace(slots.serving.champion, scorer=Holed(slots.serving.champion.scorer))
    slots.serving = slots.serving._replace(champion=champion)
    rows = [ROW, {**ROW, "visits_30d": None}, ROW]
    found = service.call(*[lambda client, row=row: client.post("/predict", json={"features": row}) for row in rows])
    assert [answer.status_code for answer in found] == [200, 500, 200]
    assert found[1].json()["error"]["code"] == "no_score"
    assert [record.score for record in service.read_log()] == [answer.json()["probability"] for answer in found[::2]]
    (error,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "which must be probabilities" in error.getMessage()
    assert error.request_id == found[1].json()["request_id"]


def test_without_a_model_nothing_is_ready(make_service):
    service = make_service(bundled_dir=None)
    unloaded = {"status": "ok", "model_loaded": False, "model_version": None, "folder_sha256": None}
    assert service.get("/health").json() == unloaded | {"model_name": "test_churn"}
    assert service.get("/readyz").status_code == 503
    assert service.post("/predict", {"features": ROW}).status_code == 503
    assert service.get("/model/info").status_code == 503


def test_what_a_service_without_a_model_has_refused_is_told_and_counted(make_service, tmp_path):
    write_slots(tmp_path / "state", Slots(1, "", None, refused=(RefusedVersion("7", "digest: another"),)))
    service = make_service(bundled_dir=None)
    answer = service.get("/model/info")
    assert answer.status_code == 503
    (detail,) = answer.json()["error"]["details"]
    assert (detail["value"], detail["rule"]) == ("7", "digest: another")
    assert service.read_metric("models_refused_total", reason="digest") == 1
    assert service.get("/readyz").status_code == 503


def test_requests_for_predictions_alone_are_counted(make_service):
    """Not the probes of a pod that waits for its first model."""
    service = make_service(bundled_dir=None)
    for path in ("/health", "/readyz", "/model/info", "/nowhere"):
        service.get(path)
    assert service.read_metric("prediction_requests_total", status="503") is None
    assert service.read_metric("prediction_request_latency_seconds_count") == 0
    service.post("/predict", {"features": ROW})
    service.post("/predict/batch", [{"features": ROW}])
    assert service.read_metric("prediction_requests_total", status="503") == 2
    assert service.read_metric("prediction_request_latency_seconds_count") == 2


def test_a_model_that_does_not_hold_is_not_ready(make_service, tmp_path):
    write_model_folder(tmp_path / "bundled", golden_shift=0.01)
    service = make_service()
    assert service.get("/health").json()["model_loaded"] is False
    assert service.get("/readyz").status_code == service.post("/predict", {"features": ROW}).status_code == 503


def test_a_full_disk_answers_503_and_recovers(service, monkeypatch):
    with fill_disk(monkeypatch):
        refused = service.post("/predict", {"features": ROW, "request_id": "mine"})
        assert (refused.status_code, refused.json()["request_id"]) == (503, "mine")
        whole = service.post("/predict/batch", [{"features": ROW}] * 2)
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "unavailable")
        mixed = service.post("/predict/batch", [{"features": ROW}, {}])
        codes = [item["error"]["code"] for item in mixed.json()["predictions"]]
        assert (mixed.status_code, codes) == (200, ["unavailable", "invalid_request"])
        assert service.read_log() == []
    assert service.post("/predict", {"features": ROW}).status_code == 200
    assert len(service.read_log()) == 1


TOKENS = {"p": ["predict"], "o": ["outcomes"], "a": ["admin"]}


@pytest.mark.parametrize(
    ("token", "statuses"),
    [
        (None, {"/predict": 401, "/outcomes": 401, "/model/info": 401, "/nowhere": 401, "/docs": 401}),
        ("wrong", {"/predict": 401, "/outcomes": 401, "/model/info": 401, "/nowhere": 401, "/docs": 401}),
        ("p", {"/predict": 200, "/outcomes": 403, "/model/info": 200, "/nowhere": 404, "/docs": 200}),
        ("o", {"/predict": 403, "/outcomes": 404, "/model/info": 200, "/nowhere": 404, "/docs": 200}),
        ("a", {"/predict": 200, "/outcomes": 404, "/model/info": 200, "/nowhere": 404, "/docs": 200}),
    ],
)
def test_tokens_and_scopes(make_service, token, statuses):
    service = make_service(tokens=TOKENS)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    bodies = {"/predict": {"features": ROW}, "/outcomes": {"prediction_id": "f" * 48, "outcome": 1}}
    for path, status in statuses.items():
        send = (
            service.post(path, bodies[path], headers=headers) if path in bodies else service.get(path, headers=headers)
        )
        assert send.status_code == status, path
    assert service.get("/health").status_code == 200
    assert service.get("/readyz").status_code == 200


@pytest.mark.parametrize("given", ["Bearer", "Bearer pp", "Bearer P", "Basic p", "p", "Bearer p,o", b"Bearer \xff"])
def test_what_is_not_a_whole_token_is_refused(make_service, given):
    service = make_service(tokens=TOKENS)
    assert service.get("/model/info", headers={"authorization": given}).status_code == 401
    assert service.get("/model/info", headers={"authorization": "bearer  p"}).status_code == 200


def test_no_page_and_no_line_that_a_client_may_read_shows_the_salt(make_service, tmp_path, caplog):
    caplog.set_level("DEBUG")
    service = make_service(tokens=TOKENS)
    deploy(service, tmp_path, mode="canary", weight=0.5)
    assert service.worker.slots.serving.slots.salt == "salt-3"
    admin = {"authorization": "Bearer a"}
    paths = ("/model/info", "/health", "/readyz", "/openapi.json", "/docs", "/nowhere")
    said = [service.get(path, headers=admin).text for path in paths]
    bodies: list[Any] = [{"features": ROW}, {"features": ROW, "customer_id": "C1"}, {}, {"salt": 1}]
    said += [service.post("/predict", body, headers=admin).text for body in bodies]
    service.worker.batcher.observe()
    service.worker.metrics.flush()
    page = generate_latest(build_registry(service.state_dir / "metrics")).decode()
    said += [page, str(service.read_log()), caplog.text]
    assert "salt-3" not in "".join(said)


def test_predictions_and_reports_keep_who_sent_them_by_a_digest(make_service):
    service = make_service(tokens={"p": ["predict"], "q": ["predict"], "o": ["outcomes"]})
    for token in "pqp":
        service.post("/predict", {"features": ROW}, headers={"authorization": f"Bearer {token}"})
    predictions = service.read_log()
    report = {"prediction_id": predictions[0].prediction_id, "outcome": 1}
    service.post("/outcomes", report, headers={"authorization": "Bearer o"})
    [outcome] = [record for record in service.read_log() if isinstance(record, Outcome)]
    clients = [one.client for one in predictions]
    assert clients[0] == clients[2] != clients[1]
    assert outcome.reported_by not in {None, *clients}
    assert {len(one) for one in (*clients, outcome.reported_by)} == {8}


def test_a_forced_version_needs_an_administrator_and_is_logged_as_forced(make_service, tmp_path):
    service = make_service(tokens=TOKENS)
    deploy(service, tmp_path, mode="canary", weight=0.0, fails_from=21)
    body, failing = {"features": ROW}, {"features": FAILING}
    wanted = {"x-model-version": "2"}
    assert service.post("/predict", body, headers={"authorization": "Bearer p", **wanted}).status_code == 403
    admin = {"authorization": "Bearer a"}
    found = service.post("/predict", body, headers={**admin, **wanted}).json()
    assert (found["model_version"], found["variant"]) == ("2", "canary")
    assert found["probability"] == pytest.approx(expected_score(ROW, 2.0), abs=1e-6)
    (logged,) = service.read_log()
    assert logged.forced
    assert service.post("/predict", failing, headers={**admin, **wanted}).status_code == 500
    service.post("/predict", failing, headers={**admin, "x-model-version": "1"})
    assert [record.variant for record in service.read_log()] == ["canary", "champion"]  # and nothing in shadow
    service.worker.batcher.observe()
    service.worker.metrics.flush()
    registry = build_registry(service.state_dir / "metrics")
    samples = [sample for family in registry.collect() for sample in family.samples if sample.value]
    counted = {(one.name, *one.labels.values()) for one in samples}
    assert {one for one in counted if one[0].startswith(("model_predictions", "model_errors", "feature"))} == {
        ("model_predictions_total", "2", "1", "forced"),
        ("model_errors_total", "2", "forced"),
        ("model_predictions_total", "1", "1", "forced"),
    }


def test_a_canary_answers_its_share_and_customers_stay(service, tmp_path):
    deploy(service, tmp_path, mode="canary", weight=0.25)
    items = [{"features": ROW, "customer_id": f"C{number}"} for number in range(800)]
    first = service.post("/predict/batch", items).json()["predictions"]
    versions = [answer["model_version"] for answer in first]
    # 800 draws of .25: 152 to 248 is 4 standard deviations
    assert 152 <= versions.count("2") <= 248
    again = [answer["model_version"] for answer in service.post("/predict/batch", items).json()["predictions"]]
    assert again == versions
    for answer in first:
        bias = {"1": 0.0, "2": 2.0}[answer["model_version"]]
        assert answer["probability"] == pytest.approx(expected_score(ROW, bias), abs=1e-6)


def test_a_shadow_scores_everything_and_answers_nothing(service, tmp_path):
    deploy(service, tmp_path, mode="shadow")
    answers = [service.post("/predict", {"features": row}).json() for row in ROWS]
    assert {answer["model_version"] for answer in answers} == {"1"}
    logged = service.read_log()
    shadows = {record.answered_id: record for record in logged if record.variant == "shadow"}
    assert len(logged) == 2 * len(shadows) == 6
    for answer, row in zip(answers, ROWS, strict=True):
        shadow = shadows[answer["prediction_id"]]
        assert shadow.model_version == "2"
        assert shadow.score == pytest.approx(expected_score(row, 2.0), abs=1e-6)


def test_in_canary_the_challenger_scores_in_shadow_whom_the_champion_answered(service, tmp_path):
    deploy(service, tmp_path, mode="canary", weight=0.5)
    for number in range(40):
        service.post("/predict", {"features": ROW, "customer_id": f"C{number}"})
    logged = service.read_log()
    by_variant = {
        name: {r.customer_id for r in logged if r.variant == name} for name in ("champion", "canary", "shadow")
    }
    assert by_variant["shadow"] == by_variant["champion"]
    assert len(by_variant["canary"]) == 40 - len(by_variant["champion"]) > 0
    assert {record.model_version for record in logged if record.variant == "shadow"} == {"2"}
    assert all(record.latency_ms >= 0 for record in logged)


def test_errors_of_what_serves_are_shown_before_there_are_any(service, tmp_path):
    """Prometheus takes the first count that it sees of a series for where it began."""
    deploy(service, tmp_path, mode="canary", weight=0.5)
    service.worker.show_slots()
    shown = [("bundled", "champion"), ("1", "champion"), ("2", "canary"), ("2", "shadow")]
    found = [service.read_metric("model_errors_total", model_version=one, variant=other) for one, other in shown]
    assert found == [0, 0, 0, 0]


@pytest.mark.parametrize(("mode", "variant"), [("shadow", "shadow"), ("canary", "canary")])
def test_a_model_that_fails_is_counted_under_its_version_and_variant(service, tmp_path, mode, variant):
    deploy(service, tmp_path, mode=mode, weight=1.0 if mode == "canary" else 0.0, fails_from=21)
    assert service.post("/predict", {"features": ROW}).status_code == 200
    status = service.post("/predict", {"features": FAILING}).status_code
    assert status == (200 if mode == "shadow" else 500)
    assert service.read_metric("model_errors_total", model_version="2", variant=variant) == 1


def test_outcomes_of_given_predictions_alone_are_taken(service):
    prediction_id = service.post("/predict", {"features": ROW}).json()["prediction_id"]
    taken = service.post("/outcomes", {"prediction_id": prediction_id, "outcome": 1})
    assert (taken.status_code, taken.json()) == (202, {"accepted": 1, "refused": []})
    forged = service.post("/outcomes", {"prediction_id": "0" * 48, "outcome": 1})
    assert forged.status_code == 404
    many = service.post(
        "/outcomes",
        [
            {"prediction_id": prediction_id, "outcome": 0},
            {"prediction_id": prediction_id, "outcome": 2},
            {"prediction_id": prediction_id, "outcome": 0.5, "when": "now"},
            {"outcome": 1},
            None,
        ],
    )
    assert many.status_code == 202
    assert many.json()["accepted"] == 1
    assert [refusal["item"] for refusal in many.json()["refused"]] == [1, 2, 3, 4]
    outcomes = [record.outcome for record in service.read_log() if isinstance(record, Outcome)]
    assert outcomes == [1, 0]


def test_outcomes_in_bulk_are_held_up(make_service):
    service = make_service(outcomes_per_minute=5)
    prediction_id = service.post("/predict", {"features": ROW}).json()["prediction_id"]
    item = {"prediction_id": prediction_id, "outcome": 1}
    assert service.post("/outcomes", [item] * 3).status_code == 202
    assert service.post("/outcomes", [item] * 5).status_code == 429
    assert service.post("/outcomes", [item] * 2).status_code == 202
    held = service.post("/outcomes", item)
    assert held.status_code == 429
    assert int(held.headers["retry-after"]) >= 1


def test_a_list_of_outcomes_that_could_never_be_taken_is_not_told_to_wait(make_service):
    service = make_service(outcomes_per_minute=5)
    prediction_id = service.post("/predict", {"features": ROW}).json()["prediction_id"]
    refused = service.post("/outcomes", [{"prediction_id": prediction_id, "outcome": 1}] * 6)
    assert refused.status_code == 413
    assert "retry-after" not in refused.headers
    (detail,) = refused.json()["error"]["details"]
    assert (detail["field"], detail["value"]) == ("", 6)
    assert detail["rule"].startswith("at most 5 outcomes")


@pytest.mark.parametrize("value", [True, False, 1.0, "1", None, 2, [1]])
def test_an_outcome_is_0_or_1_and_nothing_like_it(service, value):
    prediction_id = service.post("/predict", {"features": ROW}).json()["prediction_id"]
    refused = service.post("/outcomes", {"prediction_id": prediction_id, "outcome": value})
    assert refused.status_code == 400
    (detail,) = refused.json()["error"]["details"]
    assert (detail["field"], detail["rule"]) == ("outcome", "0 (stayed) or 1 (churned)")
    assert detail["value"] == ("array" if value == [1] else value)


def test_model_info_shows_the_contract_and_what_was_refused(service, tmp_path):
    deploy(service, tmp_path, mode="shadow")
    write_model_folder(tmp_path / "v3", golden_shift=0.1)
    slots = msgspec.structs.replace(
        service.worker.slots.serving.slots,
        revision=4,
        champion=Slot("3", str(tmp_path / "v3"), digest_folder(tmp_path / "v3")),
    )
    write_slots(service.state_dir, slots)
    service.worker.slots.load_first()
    info = service.get("/model/info").json()
    assert info["model_version"] == "1"
    assert info["refused"]["3"].startswith("golden rows: row 0 scores")
    assert [feature["name"] for feature in info["contract"]["features"]] == ["visits_30d", "age", "plan"]
    assert "golden_rows" not in info["contract"]
    assert service.post("/predict", {"features": ROW}).json()["model_version"] == "1"


def test_the_description_names_every_route_and_limit(service):
    described = service.get("/openapi.json").json()
    assert set(described["paths"]) == set(service.app.routes) - {"/docs"}
    schemas = described["components"]["schemas"]
    features = schemas["Features"]["properties"]
    number = {"type": "number", "minimum": 0, "maximum": 40}
    assert features["visits_30d"] == {"anyOf": [number, {"type": "null"}]}
    assert features["plan"] == {"anyOf": [{"enum": ["basic", "plus"]}, {"type": "null"}]}
    assert (schemas["Batch"]["minItems"], schemas["Batch"]["maxItems"]) == (
        1,
        service.worker.config.settings.batch_items_max,
    )
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described)))
    assert references == set(schemas)
    for name, path in (("ModelInfo", "/model/info"), ("Document", "/openapi.json")):
        answer, kinds = service.get(path).json(), {"string": str, "integer": int, "object": dict, "array": list}
        found = {part: kinds[one["type"]] for part, one in schemas[name]["properties"].items()}
        assert {part: type(answer[part]) for part in found} == found
    assert "there is no gRPC" in described["info"]["description"]
    assert service.get("/docs").headers["content-type"].startswith("text/html")
    assert "{%" not in service.get("/docs").text


def test_the_examples_of_the_description_are_answered(service):
    for path in ("/predict", "/predict/batch"):
        content = service.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]["content"]
        answered = service.post(path, content["application/json"]["example"])
        assert answered.status_code == 200
        assert "error" not in answered.text
