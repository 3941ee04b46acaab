"""Customers who ask the service over HTTP: `closedloop serve` as a process, and every answer counted."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from closedloop.errors import ServiceUnavailable

# Few in a request: a canary's rows are scored after the champion's, and must not look slow for that.
BATCH_ITEMS = 25
DEADLINE_SECONDS = 120.0


class Traffic:
    """The service of the project folder here, on free ports, and one client.

    Parameters
    ----------
    clock_path
        The file by which the service's clock is moved.
    """

    def __init__(self, clock_path: Path, log_path: Path) -> None:
        self.port, self._metrics_port = find_free_ports(2)
        self.answered = self.failed = 0
        self.failures: list[str] = []
        os.environ["CLOSEDLOOP_SERVING__PORT"] = str(self.port)
        os.environ["CLOSEDLOOP_SERVING__METRICS_PORT"] = str(self._metrics_port)
        command = [sys.executable, "-m", "closedloop.cli", "serve", "--clock", str(clock_path)]
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._log_path = log_path
        self._connection: http.client.HTTPConnection | None = None

    def wait_for(self, revision: int) -> None:
        """Until the service answers by that revision of the deployment row, or a later one.

        Raises
        ------
        ServiceUnavailable
            If it does not in two minutes.
        """
        end = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, found = self._call("GET", "/model/info")
                if status == 200 and found["revision"] >= revision:
                    # the agent's page, where errors are counted, may come later than the first answer
                    socket.create_connection(("127.0.0.1", self._metrics_port), timeout=5).close()
                    return
            time.sleep(0.1)
        raise ServiceUnavailable(f"the service does not serve revision {revision}: see {self._log_path}")

    def ask(self, customers: Sequence[str]) -> str:
        """Ask for a score of each customer; returns the id of the last prediction."""
        last = ""
        self._close()  # the service ends a connection that was idle for long, perhaps as the next request leaves
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
            last = next((item["prediction_id"] for item in reversed(items) if "error" not in item), last)
        return last

    def stop(self) -> None:
        """Let open requests finish, and what is spooled reach the store."""
        self._close()
        self._process.terminate()
        self._process.wait(60)

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


def find_free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
