"""Client traffic of a replay: start `closedloop serve` as a process, send requests over HTTP, count the answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from closedloop.errors import DataError, ServiceUnavailable, count_noun
from closedloop.processes import end_process, start_process

if TYPE_CHECKING:
    from closedloop.store.predictions import Predictions

# Few customers in a request: the service scores the canary's rows after the champion's, which adds to their latency.
BATCH_ITEMS = 25
DEADLINE_SECONDS = 300.0  # a machine that has other things to do is slow


class Traffic:
    """The service of the project in the working directory, on free ports, and one client.

    Parameters
    ----------
    clock_path
        The file that sets the service's clock.
    """

    def __init__(self, clock_path: Path, log_path: Path) -> None:
        self.port, self._metrics_port = find_free_ports(2)
        self.answered = self.failed = 0
        self.failures: list[str] = []
        self.served: dict[str, set[str]] = {}
        os.environ["CLOSEDLOOP_SERVING__PORT"] = str(self.port)
        os.environ["CLOSEDLOOP_SERVING__METRICS_PORT"] = str(self._metrics_port)
        command = [sys.executable, "-m", "closedloop.cli.main", "serve", "--clock", str(clock_path)]
        with log_path.open("ab") as log:
            self._process = start_process(command, stdout=log, stderr=log)
        self.log_path = log_path
        self._connection: http.client.HTTPConnection | None = None

    def wait_for(self, revision: int) -> None:
        """Wait until the service answers by that revision of the deployment row, or a later one.

        Raises
        ------
        ServiceUnavailable
            If it does not in five minutes.
        """
        end = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, found = self._call("GET", "/model/info")
                if status == 200 and found["revision"] >= revision:
                    # the agent's metrics page, which counts errors, may start later than the first answer
                    socket.create_connection(("127.0.0.1", self._metrics_port), timeout=5).close()
                    return
            time.sleep(0.1)
        raise ServiceUnavailable(f"the service does not serve revision {revision}: see {self.log_path}")

    def ask(self, customers: Sequence[str]) -> str:
        """Ask for a score of each customer; returns the id of the last prediction."""
        last = ""
        self._close()  # the service closes idle connections, perhaps just as the next request is sent
        for start in range(0, len(customers), BATCH_ITEMS):
            batch = customers[start : start + BATCH_ITEMS]
            try:
                status, found = self._call("POST", "/predict/batch", [{"customer_id": one} for one in batch])
            except (OSError, http.client.HTTPException) as error:
                status, found = 0, {"error": repr(error)}
            items = found["predictions"] if status == 200 else [found] * len(batch)
            wrong = [item for item in items if "error" in item]
            self.failed += len(wrong)
            self.answered += len(batch) - len(wrong)
            self.failures += [json.dumps(item)[:300] for item in wrong[: 20 - len(self.failures)]]
            for customer, item in zip(batch, items, strict=True):
                if "error" not in item:
                    self.served.setdefault(item["model_version"], set()).add(customer)
            last = next((item["prediction_id"] for item in reversed(items) if "error" not in item), last)
        return last

    def stop(self) -> None:
        """Stop the service after open requests have finished and spooled predictions have reached the store."""
        self._close()
        end_process(self._process, 60)

    def _call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            self._connection.request(method, path, None if body is None else json.dumps(body))
            answer = self._connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException):
            self._close()
            raise

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def wait_stored(store: Predictions, model_name: str, prediction_id: str, traffic: Traffic) -> None:
    """Wait until the last prediction is in the operations store; all earlier ones are there by then.

    Raises
    ------
    DataError
        If no request was answered, or the prediction is not there in five minutes.
    """
    if not prediction_id:
        first = [*traffic.failures, "none was sent"][0]
        said = f"{count_noun(traffic.failed, 'request')} failed, the first: {first}"
        raise DataError(f"the service answered no request ({said}); see {traffic.log_path.resolve()}")
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        if any(store.read_predictions(model_name, ids=[prediction_id])):
            return
        time.sleep(0.2)
    raise DataError(f"prediction {prediction_id} did not reach the operations store in five minutes")


def find_free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
