"""A pod ends, or is killed, while PostgreSQL stores a tenth of what arrives: no answered prediction is lost.

The pod's terms are those of the rendered manifests: the bound of what may wait, the wait before its end, the time of
grace, and a volume that goes with it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.http_service import DEADLINE_SECONDS, HttpService, wait_until
from tests.integration.test_manifests import read_overlay
from tests.manifests import list_pods
from tests.model_folders import ROWS, write_model_folder
from tests.services import run_postgres

pytestmark = pytest.mark.thorough

NAME = "shop_churn"
LOAD_SECONDS, BATCH_ROWS, BATCHES_PER_SECOND = 40.0, 100, 20
STORED_PER_SECOND = BATCH_ROWS * BATCHES_PER_SECOND // 10
SLOW = f"""
CREATE FUNCTION wait_for_rows() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_sleep((SELECT count(*) FROM inserted) / {STORED_PER_SECOND}.0);
  RETURN NULL;
END $$;
CREATE TRIGGER slow AFTER INSERT ON predictions REFERENCING NEW TABLE AS inserted
FOR EACH STATEMENT EXECUTE FUNCTION wait_for_rows();
"""


@dataclass(frozen=True)
class PodTerms:
    """What a pod of the service is given."""

    drain_seconds_max: str
    wait_seconds: float
    grace_seconds: float


@pytest.fixture(scope="module")
def terms() -> PodTerms:
    (pod,) = (pod for name, _, pod in list_pods(read_overlay("production")) if name == "Deployment closedloop-stable")
    (box,) = pod["containers"]
    (bound,) = (one["value"] for one in box["env"] if one["name"] == "CLOSEDLOOP_SERVING__DRAIN_SECONDS_MAX")
    wait = float(box["lifecycle"]["preStop"]["exec"]["command"][-1])
    return PodTerms(bound, wait, pod["terminationGracePeriodSeconds"])


@dataclass
class Batches:
    """A client that sends batches at a steady rate, and keeps what became of each item."""

    service: HttpService
    answered: set[str] = field(default_factory=set)
    refused: int = 0

    def send(self, seconds: float) -> None:
        """Send one batch after the other, and wait where the service is quicker than the rate."""
        body = json.dumps([{"features": ROWS[n % len(ROWS)], "customer_id": f"C{n}"} for n in range(BATCH_ROWS)])
        connection = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=DEADLINE_SECONDS)
        start = time.monotonic()
        with contextlib.closing(connection):
            for number in range(int(seconds * BATCHES_PER_SECOND)):
                time.sleep(max(0.0, start + number / BATCHES_PER_SECOND - time.monotonic()))
                connection.request("POST", "/predict/batch", body)
                answer = connection.getresponse()
                content = json.loads(answer.read())
                assert answer.status in (200, 503), content
                found = content.get("predictions", [])
                items = [one["prediction_id"] for one in found if "prediction_id" in one]
                codes = {one["error"]["code"] for one in found if "error" in one} | {
                    content.get("error", {}).get("code")
                }
                assert codes <= {None, "unavailable"}
                self.answered.update(items)
                self.refused += BATCH_ROWS - len(items)


@dataclass
class SlowPod:
    """A pod of the service, its volume, and a store that is slow from the first prediction on."""

    service: HttpService
    engine: sa.Engine

    @property
    def volume(self) -> Path:
        return self.service.root / "pod"

    def read_stored(self) -> set[str]:
        with self.engine.connect() as connection:
            return set(connection.execute(sa.text("SELECT prediction_id FROM predictions")).scalars())

    def count_left(self) -> list[str]:
        """What the closing words say of records that are left."""
        return [line for line in self.service.read_log().splitlines() if "records left in" in line]


@pytest.fixture
def pod(project, tmp_path, terms) -> Iterator[SlowPod]:
    write_model_folder(tmp_path / "model", model_name=NAME, feature_service=f"{NAME}_0")
    with run_postgres(tmp_path) as postgres:
        url = postgres.create_database().replace("postgresql://", "postgresql+psycopg://")
        variables = {
            "CLOSEDLOOP_OPERATIONS__URL": url,
            "CLOSEDLOOP_SERVING__DRAIN_SECONDS_MAX": terms.drain_seconds_max,
            "CLOSEDLOOP_SERVING__STATE": str(project.root / "pod"),
        }
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        service = HttpService(project.root, variables, ("--model", str(tmp_path / "model")))
        service.start()
        try:
            wait_until(lambda: sa.inspect(engine).has_table("predictions"), "the store's tables")
            service.read_metric("spool_depth_bytes")  # the agent drains
            with engine.begin() as connection:
                connection.execute(sa.text(SLOW))
            yield SlowPod(service, engine)
        finally:
            kill_all(service)


def kill_all(service: HttpService) -> None:
    """End the server and its agent at once, as the end of a pod's grace does."""
    assert service.process is not None
    children = Path(f"/proc/{service.process.pid}/task").glob("*/children")
    found = [int(pid) for path in children for pid in path.read_text(encoding="utf-8").split()]
    for pid in (service.process.pid, *found):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    service.process.wait(DEADLINE_SECONDS)


def test_a_pod_that_ends_in_its_grace_time_has_stored_all_that_it_answered(pod, terms):
    client = Batches(pod.service)
    client.send(LOAD_SECONDS)
    at_end = len(client.answered - pod.read_stored())
    time.sleep(terms.wait_seconds)  # preStop
    assert pod.service.process is not None
    pod.service.process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        pod.service.process.wait(terms.grace_seconds - terms.wait_seconds)
    kill_all(pod.service)
    shutil.rmtree(pod.volume)
    stored = pod.read_stored()
    print(
        f"{len(client.answered)} predictions were answered and {client.refused} refused with 503; {at_end} waited when "
        f"the pod was told to end; {len(client.answered - stored)} are lost"
    )
    assert client.answered <= stored
    assert pod.count_left() == []
    assert client.refused > len(client.answered)  # a tenth is stored, and what may wait
    assert at_end > 0


def test_a_pod_that_is_killed_loses_no_more_than_waits_and_nothing_where_its_volume_outlives_it(pod, terms):
    """With an emptyDir what waits is lost: it is no more than the last drain would have stored. A volume keeps it."""
    client = Batches(pod.service)
    client.send(LOAD_SECONDS)
    kill_all(pod.service)
    at_risk = len(client.answered - pod.read_stored())
    pod.service.start()  # the next pod, with the volume of the one before
    wait_until(lambda: client.answered <= pod.read_stored(), "all that was answered, in the store")
    print(
        f"{len(client.answered)} predictions were answered and {client.refused} refused with 503; {at_risk} waited "
        "when the pod was killed: lost with an emptyDir, stored by the next pod from a volume that outlives it"
    )
    assert 0 < at_risk <= STORED_PER_SECOND * 35  # the time of the last drain
