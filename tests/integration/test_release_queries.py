"""What a rollout is decided on: arms from the store on SQLite and PostgreSQL, errors from pages as they are shown."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from prometheus_client import generate_latest

from closedloop.adapters.prometheus import ErrorCounts
from closedloop.core.release.types import ArmEvidence
from closedloop.errors import ServiceUnavailable
from closedloop.records import Prediction
from closedloop.serving.exposition import build_registry, name_registry
from closedloop.serving.metrics import WorkerMetrics
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from closedloop.store.release_queries import Arm, ReleaseQueries

pytestmark = pytest.mark.thorough

NAME = "shop_churn"
NOW = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


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
        "customer_id": f"C{number}",
        "features_as_of": NOW,
    }
    return Prediction(f"p{number}", **(values | changes))


OURS = Arm("2", "1", shadow=False)


@pytest.fixture
def opened(url: str) -> Iterator[tuple[Predictions, ReleaseQueries]]:
    with closing(Database(url)) as database:
        database.upgrade()
        yield Predictions(database), ReleaseQueries(database, sources=("http", "stream"))


def test_an_arm_is_what_a_version_did_since_the_step_began(opened: tuple[Predictions, ReleaseQueries]) -> None:
    store, arms = opened
    assert arms.summarise(NAME, OURS, since=NOW) == ArmEvidence(scores=(0,) * 20)
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
    store.insert([predict(300, 0.5, source="stream")])
    found = arms.summarise(NAME, OURS, since=NOW)
    # hundredths that are edges are told by integers
    hundredths = np.array([round(score * 100) for score in [*scores, 0.5]])
    expected = np.bincount(np.minimum(hundredths // 5, 19), minlength=20)
    assert found.scores == tuple(expected)
    # 95% of 101 is 95.95: the 96th, counted from 1
    assert (found.requests, found.customers, found.errors, found.latency_p95_ms) == (101, 101, 0, 95.0)
    assert arms.summarise(NAME, OURS._replace(shadow=True), since=NOW).requests == 1


def test_a_customer_counts_once_by_its_first_request_and_once_a_day_in_the_sample(
    opened: tuple[Predictions, ReleaseQueries],
) -> None:
    store, arms = opened
    store.insert([predict(number, 0.1) for number in range(20)])
    again = [
        predict(1_000 + number, 0.99, customer_id="C3", latency_ms=9_000.0, predicted_at=NOW + DAY * (number % 3 + 0.1))
        for number in range(999)
    ]
    store.insert(again)
    found = arms.summarise(NAME, OURS, since=NOW)
    assert (found.requests, found.customers, found.latency_p95_ms) == (22, 20, 18.0)
    assert found.scores == (0, 0, 20, *[0] * 17)
    # behind a proxy a customer meets both versions, and is the first one's
    arms = ReleaseQueries(store.database, sticky=False)
    store.insert([predict(5_000, 0.1, customer_id="C3", model_version="1", variant="champion", predicted_at=NOW + DAY)])
    store.insert([predict(5_001, 0.1, customer_id="C4", model_version="1", variant="champion", predicted_at=NOW - DAY)])
    theirs = Arm("1", "2", shadow=False)
    assert arms.summarise(NAME, theirs, since=NOW).customers == 0
    assert arms.summarise(NAME, OURS, since=NOW).customers == 20


def test_requests_from_before_the_service_had_taken_a_step_up_count_for_neither_version(
    opened: tuple[Predictions, ReleaseQueries],
) -> None:
    store, arms = opened
    late = {"model_version": "1", "variant": "champion"}
    store.insert([predict(number, 0.1, **late) for number in range(30)])
    dealt = {"predicted_at": NOW + DAY / 24, "latency_ms": 4.0}
    store.insert([predict(100 + number, 0.9, customer_id=f"C{number}", **dealt) for number in range(10)])
    ours, theirs = (arms.summarise(NAME, arm, since=NOW) for arm in (OURS, Arm("1", "2", shadow=False)))
    assert (ours.customers, ours.latency_p95_ms, theirs.customers) == (10, 4.0, 20)


def test_what_was_answered_by_an_earlier_revision_belongs_to_the_step_before(
    opened: tuple[Predictions, ReleaseQueries],
) -> None:
    store, arms = opened
    for revision, customers in ((4, 40), (5, 20), (6, 3), (None, 7)):  # None: a service that keeps none
        place = 100 * (revision or 0)
        store.insert([predict(place + number, 0.1, revision=revision, client="a") for number in range(customers)])
    arm = OURS._replace(revision=5)
    assert arms.summarise(NAME, arm, since=NOW).customers == 30
    assert arms.count_clients(NAME, arm, since=NOW) == {"a": 30}
    assert arms.summarise(NAME, OURS, since=NOW).customers == 70


def test_ids_that_the_online_store_does_not_know_count_nowhere(opened: tuple[Predictions, ReleaseQueries]) -> None:
    store, arms = opened
    store.insert([predict(number, 0.1) for number in range(20)])
    sent = {"features_as_of": None, "latency_ms": 9_000.0}
    store.insert([predict(2_000 + number, 0.99, customer_id=f"X{number}", **sent) for number in range(500)])
    store.insert([predict(3_000 + number, 0.99, customer_id=None, **sent) for number in range(500)])
    found = arms.summarise(NAME, OURS, since=NOW)
    assert (found.requests, found.customers, found.latency_p95_ms) == (20, 20, 18.0)
    trusting = ReleaseQueries(store.database, sent_features=True)
    assert trusting.summarise(NAME, OURS, since=NOW).customers == 1_020


def test_a_clients_part_can_be_left_out(opened: tuple[Predictions, ReleaseQueries]) -> None:
    store, arms = opened
    store.insert([predict(number, 0.1, client="a") for number in range(20)])
    slow = {"client": "b", "latency_ms": 9_000.0, "predicted_at": NOW + DAY / 2}
    store.insert([predict(1_000 + number, 0.99, customer_id=f"C{number}", **slow) for number in range(30)])
    store.insert([predict(2_000, 0.1, client=None)])
    assert arms.count_clients(NAME, OURS, since=NOW) == {"a": 20, "b": 10, None: 1}
    assert arms.summarise(NAME, OURS, since=NOW).latency_p95_ms == 9_000.0
    without = arms.summarise(NAME, OURS, since=NOW, without="b")
    assert (without.requests, without.customers, without.latency_p95_ms) == (21, 21, 19.0)


def test_traffic_is_counted_by_customer_and_day_since_it_began(
    opened: tuple[Predictions, ReleaseQueries],
) -> None:
    store, arms = opened
    asked = {"since": NOW - 14 * DAY, "until": NOW}
    assert arms.measure_traffic(NAME, **asked) is None
    early = NOW.replace(hour=0, minute=0, second=0) - 3 * DAY
    for day in range(3):
        for again in range(2):  # who asks twice a day counts once
            numbers = [1_000 * (2 * day + again) + number for number in range(30)]
            at = {"predicted_at": early + day * DAY + again * DAY / 4}
            store.insert([predict(one, 0.1, customer_id=f"C{one % 1_000}", **at) for one in numbers])
    store.insert([predict(9_000, 0.1, variant="shadow", predicted_at=early)])
    store.insert([predict(9_001, 0.1, customer_id="forced", forced=True, predicted_at=early)])
    assert arms.measure_traffic(NAME, **asked) == pytest.approx(90 / ((NOW - early) / DAY))


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
    metrics.count("model_failed_customers_total", "2", "canary", by=3)
    metrics.flush()
    pages["/metrics"] = generate_latest(name_registry(build_registry(tmp_path / "metrics"), NAME, aliases=True))
    before = counts.read_totals()
    assert before == {"2/canary": 3.0}
    metrics.count("model_failed_customers_total", "2", "canary", by=4)
    metrics.count("model_failed_customers_total", "1", "champion")
    metrics.flush()
    pages["/metrics"] = generate_latest(name_registry(build_registry(tmp_path / "metrics"), NAME, aliases=True))
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
    series = 'closedloop_model_failed_customers_total{namespace="here"}[3600s]'
    assert query == f"sum by (model_version, variant) (increase({series}))"
    pages["/api/v1/query"] = b'{"status":"error"}'
    with pytest.raises(ServiceUnavailable, match="its answer is not Prometheus'"):
        counts.read_since({}, 3_600, version="2")


def test_a_version_that_prometheus_does_not_know_is_no_version_without_errors(pages: dict[str, Any]) -> None:
    counts = ErrorCounts(pages["address"], "")
    other = b'{"data":{"result":[{"metric":{"model_version":"21","variant":"canary"},"value":[1,"0"]}]}}'
    for answer, found in ((b'{"data":{"result":[]}}', {}), (other, {"21/canary": 0.0})):
        pages["/api/v1/query"] = answer
        assert counts.read_since({}, 180, version="2") == found  # it may not have been scraped twice yet
        with pytest.raises(
            ServiceUnavailable, match=r"it knows no closedloop_model_failed_customers_total\{\} of version 2;"
        ):
            counts.read_since({}, 181, version="2")


def test_a_page_that_is_away_is_an_outage() -> None:
    with pytest.raises(ServiceUnavailable, match=r"metrics at http://127.0.0.1:1/metrics"):
        ErrorCounts("", "http://127.0.0.1:1/metrics").read_totals()
