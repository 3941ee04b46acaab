"""The workers of a service with several, and clients that know which of them answers them (on Linux)."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path

from tests.http_service import DEADLINE_SECONDS, HttpService, wait_until
from tests.model_folders import ROWS

WORKER = "closedloop.serving.process.server"


def find_owner(service: HttpService, client_port: int) -> int | None:
    """The worker that has accepted the connection from this port; None where it is gone, or waits to be accepted."""
    wanted = f":{service.port:04X}", f":{client_port:04X}"
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        _, server, client, _, _, _, _, _, _, inode, *_ = line.split()
        if server.endswith(wanted[0]) and client.endswith(wanted[1]):
            for worker in service.find_children(WORKER):
                with contextlib.suppress(OSError):  # it, or one of its descriptors, is gone meanwhile
                    for descriptor in Path(f"/proc/{worker}/fd").iterdir():
                        with contextlib.suppress(OSError):
                            if str(descriptor.readlink()) == f"socket:[{inode}]":
                                return worker
    return None


def visit(service: HttpService, count: int = 8) -> set[int | None]:
    """Open that many connections at once, ask one thing on each, and close them; the workers that answered."""
    with contextlib.ExitStack() as closing:
        connections = [closing.enter_context(contextlib.closing(service.connect())) for _ in range(count)]
        for connection in connections:
            connection.request("GET", "/health")
        owners = set()
        for connection in connections:
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            owners.add(find_owner(service, connection.sock.getsockname()[1]))
            answer.read()
        return owners


@dataclass
class Client:
    """Sends one request after the other on one connection, and connects again where its worker was killed."""

    service: HttpService
    killed: set[int]
    stopping: threading.Event
    owner: int | None = None
    answered: int = 0
    failure: str = ""

    def run(self) -> None:
        """Ask until stopped, or until an answer is missing that no kill explains."""
        while not self.stopping.is_set() and not self.failure:
            self.owner = None
            with contextlib.closing(self.service.connect()) as connection:
                try:
                    self._ask(connection)
                except (OSError, http.client.HTTPException) as error:
                    if self.owner is not None and self.owner not in self.killed:
                        self.failure = f"worker {self.owner} was not killed: {error!r}"

    def _ask(self, connection: http.client.HTTPConnection) -> None:
        while not self.stopping.is_set():
            connection.request("POST", "/predict", json.dumps({"features": ROWS[self.answered % len(ROWS)]}))
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                self.failure = f"{answer.status} {content[:200]!r}"
                return
            self.owner = self.owner or find_owner(self.service, connection.sock.getsockname()[1])
            self.answered += 1


@dataclass
class WorkerLoad:
    """Clients of a service with several workers; ``killed`` names the workers that a test has killed."""

    service: HttpService
    killed: set[int] = field(default_factory=set)
    clients: list[Client] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> WorkerLoad:
        self.clients = [Client(self.service, self.killed, self._stopping) for _ in range(8)]
        self._threads = [threading.Thread(target=client.run, daemon=True) for client in self.clients]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(DEADLINE_SECONDS)

    def wait_for_each(self, count: int) -> None:
        """Until each client has had that many more answers."""
        goals = [client.answered + count for client in self.clients]

        def is_reached() -> bool:
            assert not [client.failure for client in self.clients if client.failure]
            return all(client.answered >= goal for client, goal in zip(self.clients, goals, strict=True))

        wait_until(is_reached, f"{count} answers for each client, of {[client.owner for client in self.clients]}")
