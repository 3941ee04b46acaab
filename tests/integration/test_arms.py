"""What a rollout is decided on: arms from the store on SQLite and PostgreSQL, errors from pages as they are shown."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from prometheus_client import generate_latest

from closedloop.adapters.arms import Arms
from closedloop.adapters.prometheus import ErrorCounts
from closedloop.adapters.store import Store
from closedloop.core.rollout import ArmEvidence
from closedloop.errors import ServiceUnavailable
from closedloop.records import Prediction
from closedloop.serving.exposition import build_registry
from closedloop.serving.metrics import WorkerMetrics

pytestmark = pytest.mark.thorough

NAME = "shop_churn"
NOW = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'operations.db'}"
    made: str = request.getfixturevalue("postgres").create_database()
    return made


def predict(number: int, score: float, **changes: Any) -> Prediction:
    values: dict[str, Any] = {
        "request_id": "r",
        "model_name": NAME,
        "model_version": "2",
        "variant": "canary",
        "source": "http",
        "predicted_at": NOW,
        "features": (1.0,),
        "score": score,
        "decision": 0,
        "latency_ms": float(number),
        "customer_id": f"C{number % 40}",
    }
    return Prediction(f"p{number}", **(values | changes))


def test_an_arm_is_what_a_version_did_since_the_step_began(url: str) -> None:
    store, arms = Store(url), Arms(url, sources=("http", "stream"))
    store.upgrade()
    assert arms.summarise(NAME, "2", shadow=False, since=NOW) == ArmEvidence(scores=(0,) * 20)
    scores = np.random.default_rng(7).uniform(size=100).round(2).tolist()
    scores[:4] = [0.0, 0.05, 0.95, 1.0]  # edges belong to the bin above, and 1 to the last
    store.insert([predict(number, score) for number, score in enumerate(scores)])
    strange: tuple[dict[str, Any], ...] = (
        {"model_version": "1"},
        {"variant": "shadow"},
        {"model_name": "bank_churn"},
        {"forced": True},
        {"source": "batch"},
        {"source": "edge"},
        {"predicted_at": NOW - dt.timedelta(microseconds=1)},
    )
    store.insert([predict(200 + number, 0.5, **changes) for number, changes in enumerate(strange)])
    store.insert([predict(300, 0.5, customer_id=None, source="stream")])
    found = arms.summarise(NAME, "2", shadow=False, since=NOW)
    # hundredths that are edges are told by integers
    hundredths = np.array([round(score * 100) for score in [*scores, 0.5]])
    expected = np.bincount(np.minimum(hundredths // 5, 19), minlength=20)
    assert found.scores == tuple(expected)
    # 95% of 101 is 95.95: the 96th, counted from 1
    assert (found.requests, found.customers, found.errors, found.latency_p95_ms) == (101, 40, 0, 95.0)
    assert arms.summarise(NAME, "2", shadow=True, since=NOW).requests == 1
    behind_a_proxy = Arms(url, sources=("http",))
    assert behind_a_proxy.summarise(NAME, "2", shadow=False, since=NOW).requests == 100
    for one in (store, arms, behind_a_proxy):
        one.close()


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[dict[str, bytes]]:
    """A server of these pages by path; "address" is its own."""
    shown: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown["asked"] = self.path
            self.send_response(200)
            self.end_headers()
            self.wfile.write(shown[self.path.split("?")[0]])

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    shown["address"] = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield shown
    server.shutdown()
    server.server_close()


def test_errors_are_read_from_the_services_own_page(pages: dict[str, Any], tmp_path: Path) -> None:
    metrics = WorkerMetrics(tmp_path / "metrics", "w1")
    counts = ErrorCounts("", f"{pages['address']}/metrics")
    metrics.count("model_errors_total", "2", "canary", by=3)
    pages["/metrics"] = generate_latest(build_registry(tmp_path / "metrics"))
    before = counts.read_totals()
    assert before == {"2/canary": 3.0}
    metrics.count("model_errors_total", "2", "canary", by=4)
    metrics.count("model_errors_total", "1", "champion")
    pages["/metrics"] = generate_latest(build_registry(tmp_path / "metrics"))
    assert counts.read_since(before, 60, version="2") == {"1/champion": 1.0, "2/canary": 4.0}
    assert counts.read_since({"2/canary": 100.0}, 60, version="2")["2/canary"] == 7.0  # counted anew since
    metrics.close()


def test_prometheus_is_asked_for_the_increase(pages: dict[str, Any]) -> None:
    counts = ErrorCounts(pages["address"] + "/", "", 'namespace="here"')
    answer = b'{"data":{"result":[{"metric":{"model_version":"2","variant":"canary"},"value":[1,"2.5"]}]}}'
    pages["/api/v1/query"] = answer
    assert counts.read_totals() == {}
    assert counts.read_since({}, 3_600, version="2") == {"2/canary": 2.5}
    (query,) = parse_qs(urlsplit(pages["asked"]).query)["query"]
    assert query == 'sum by (model_version, variant) (increase(model_errors_total{namespace="here"}[3600s]))'
    pages["/api/v1/query"] = b'{"status":"error"}'
    with pytest.raises(ServiceUnavailable, match="its answer is not Prometheus'"):
        counts.read_since({}, 3_600, version="2")


def test_a_version_that_prometheus_does_not_know_is_no_version_without_errors(pages: dict[str, Any]) -> None:
    counts = ErrorCounts(pages["address"], "")
    other = b'{"data":{"result":[{"metric":{"model_version":"21","variant":"canary"},"value":[1,"0"]}]}}'
    for answer, found in ((b'{"data":{"result":[]}}', {}), (other, {"21/canary": 0.0})):
        pages["/api/v1/query"] = answer
        assert counts.read_since({}, 180, version="2") == found  # it may not have been scraped twice yet
        with pytest.raises(ServiceUnavailable, match=r"it knows no model_errors_total\{\} of version 2;"):
            counts.read_since({}, 181, version="2")


def test_a_page_that_is_away_is_an_outage() -> None:
    with pytest.raises(ServiceUnavailable, match=r"metrics at http://127.0.0.1:1/metrics"):
        ErrorCounts("", "http://127.0.0.1:1/metrics").read_totals()
