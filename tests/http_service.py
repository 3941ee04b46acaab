"""The service as processes, and clients that load it over loopback, for tests."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from closedloop.processes import start_process
from tests.model_folders import ROWS
from tests.services import find_free_port

DEADLINE_SECONDS = 300.0  # of a wait, on a machine that has other things to do
NOTHING: dict[str, Any] = {}


def wait_until(condition: Any, what: str, *, seconds: float = DEADLINE_SECONDS) -> Any:
    """Poll until ``condition()`` is true; returns its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen in {seconds:g} s")


@dataclass
class HttpService:
    """`closedloop serve` in a project folder, on free ports."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    port: int = field(default_factory=find_free_port)
    metrics_port: int = field(default_factory=find_free_port)
    process: subprocess.Popen[bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()  # words before the command

    def start(self) -> None:
        """Start it and wait until it is ready."""
        environment = {
            **os.environ,
            "CLOSEDLOOP_SERVING__PORT": str(self.port),
            "CLOSEDLOOP_SERVING__METRICS_PORT": str(self.metrics_port),
            **self.environment,
        }
        with (self.root / "service.log").open("ab") as log:
            self.process = start_process(
                [sys.executable, "-m", "closedloop.cli.main", *self.before, "serve", *self.arguments],
                cwd=self.root,
                env=environment,
                stdout=log,
                stderr=log,
            )
        wait_until(self._is_ready, "readiness of the service", seconds=300)  # a model may come from afar

    def kill(self) -> None:
        """Kill the server as nothing can prevent; its agent notices by itself."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_SECONDS)

    def stop(self) -> None:
        """Stop it in good order."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(DEADLINE_SECONDS)

    def connect(self) -> http.client.HTTPConnection:
        """A connection that opens with its first request."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_SECONDS)

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request on a connection of its own."""
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, None if body is None else json.dumps(body), self.headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def read_metric(self, series: str) -> float:
        """The value of a series on the live page, once it is there: the agent comes after the workers.

        The series has the name and the labels that the code counts by; on the page are a prefix and the model's name.
        """
        name, _, labels = series.rstrip("}").partition("{")
        pattern = re.compile(rf'closedloop_{name}{{model_name="[^"]+"{"," * bool(labels)}{re.escape(labels)}}} (\S+)')

        def read() -> str | None:
            connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=DEADLINE_SECONDS)
            with contextlib.closing(connection), contextlib.suppress(OSError):
                connection.request("GET", "/metrics")
                lines = connection.getresponse().read().decode().splitlines()
                return next((found[1] for found in map(pattern.fullmatch, lines) if found), None)
            return None

        return float(wait_until(read, f"a value of {series}"))

    def find_children(self, word: str) -> list[int]:
        """The ids of the server's own processes whose commands have this word (on Linux)."""
        assert self.process is not None
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and word.encode() in (path / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(path.name))
        return sorted(found)

    def read_log(self) -> str:
        """All that its processes wrote."""
        return (self.root / "service.log").read_text(encoding="utf-8", errors="replace")

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.read_log()
        try:
            return self.call("GET", "/readyz")[0] == 200
        except (OSError, http.client.HTTPException):
            return False


@dataclass
class Load:
    """Clients that send requests one after the other until stopped; every answer is kept, or only counted.

    With ``customers`` they send ids alone; ``pause_seconds`` lies before each request. Where one ``may_refuse``, a 503
    ends no client: it is kept apart.
    """

    service: HttpService
    clients: int = 4
    keep: bool = True
    rows: Sequence[dict[str, Any]] = ROWS
    customers: Sequence[str] = ()
    pause_seconds: float = 0
    may_refuse: bool = False
    answers: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._send, args=[n], daemon=True) for n in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let every client end with the answer that it waits for."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(DEADLINE_SECONDS)

    def wait_for(self, count: int) -> None:
        """Until that many more requests have been answered."""
        goal = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= goal or self.failures, f"{count} answers")

    def _build(self, number: int) -> dict[str, Any]:
        if self.customers:
            return {"customer_id": self.customers[number % len(self.customers)]}
        return {"features": self.rows[number % len(self.rows)], "customer_id": f"C{number % 9_973}"}

    def _send(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=DEADLINE_SECONDS)
        with contextlib.closing(connection):
            while not self._stopping.wait(self.pause_seconds):
                body = {**self._build(number), "request_id": uuid.uuid4().hex}
                number += self.clients  # each of them has requests of its own
                try:
                    connection.request("POST", "/predict", json.dumps(body), self.service.headers)
                    answer = connection.getresponse()
                    content = answer.read()
                except (OSError, http.client.HTTPException) as error:
                    self.failures.append(repr(error))
                    return
                if answer.status == 503 and self.may_refuse:
                    self.refused.append(json.loads(content))
                    continue
                if answer.status != 200:
                    self.failures.append(f"{answer.status} {content[:200]!r}")
                    return
                kept = {**json.loads(content), "row": body.get("features"), "customer": body["customer_id"]}
                self.answers.append(kept if self.keep else NOTHING)


@dataclass
class FullLoad:
    """As many requests as a worker can answer, by one thread that waits for whichever of its connections is ready."""

    service: HttpService
    connections: int = 16
    answered: list[str] = field(default_factory=list)
    refused: list[bytes] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> FullLoad:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(DEADLINE_SECONDS)

    def wait_for(self, count: int) -> None:
        """Until that many more requests have been answered."""
        goal = len(self.answered) + count
        wait_until(lambda: len(self.answered) >= goal or not self._thread.is_alive(), f"{count} answers")

    def _run(self) -> None:
        bodies = [json.dumps({"features": row, "request_id": "#" * 32}) for row in ROWS]
        requests = [
            f"POST /predict HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode().split(b"#" * 32)
            for body in bodies
        ]
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as closing:
            for number in range(self.connections):
                address = ("127.0.0.1", self.service.port)
                client = closing.enter_context(socket.create_connection(address, timeout=DEADLINE_SECONDS))
                selector.register(client, selectors.EVENT_READ, requests[number % len(requests)])
                self._ask(client, requests[number % len(requests)])
            while selector.get_map() and not self._stopping.is_set():
                for key, _ in selector.select(0.1):
                    try:
                        answer = self._receive(key.fileobj)
                        if answer.startswith(b"HTTP/1.1 200 "):
                            self.answered.append(answer.partition(b'"request_id":"')[2][:32].decode())
                        else:
                            self.refused.append(answer)
                        self._ask(key.fileobj, key.data)
                    except OSError:  # the server is gone
                        selector.unregister(key.fileobj)

    @staticmethod
    def _ask(client: socket.socket, request: list[bytes]) -> None:
        client.sendall(uuid.uuid4().hex.encode().join(request))

    @staticmethod
    def _receive(client: socket.socket) -> bytes:
        answer = b""
        while not answer.endswith(b"}"):  # head and body are two pieces
            piece = client.recv(65_536)
            if not piece:
                raise ConnectionError("no whole answer")
            answer += piece
        return answer


class OpenRequests:
    """Requests of which a service has the head and half of the body, until it is sent the rest."""

    def __init__(self, service: HttpService, count: int = 16) -> None:
        self._body = json.dumps({"features": ROWS[0]}).encode()
        head = b"POST /predict HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(self._body)
        self._clients = [
            socket.create_connection(("127.0.0.1", service.port), timeout=DEADLINE_SECONDS) for _ in range(count)
        ]
        for client in self._clients:
            client.sendall(head + self._body[:20])
        for _ in range(5):  # what came before it has been read
            assert service.call("GET", "/health")[0] == 200

    def finish(self) -> list[str]:
        """Send the rest; the ids of the requests, each of which has to be answered."""
        answered = []
        for client in self._clients:
            with client:
                client.sendall(self._body[20:])
                answer = b"".join(iter(lambda: client.recv(65_536), b""))  # noqa: B023
            assert answer.startswith(b"HTTP/1.1 200 "), answer
            answered.append(json.loads(answer.partition(b"\r\n\r\n")[2])["request_id"])
        return answered


@contextlib.contextmanager
def run_service(root: Path, *arguments: str, **environment: str) -> Iterator[HttpService]:
    """The service for the length of the block."""
    service = HttpService(root, environment, arguments)
    try:
        service.start()
        yield service
    finally:
        service.stop()
