"""``python -m tests.soak.hostile [MINUTES]``: clients that want to harm the service, beside honest ones.

With and without a token they send requests in a row, and read the answers or do not; trailers, heads and bodies that
do not end; half requests on the service's port and on the metrics port; and connections without any request. All may
have 512 descriptors, as a shell on some systems gives them. It fails if an honest request failed, or worker or agent
grew by over 20% of the memory that they had under honest load alone; and, unless ``--busy`` says that the machine has
other work, if ``/health`` once took a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from closedloop.processes import end_process, exit_on_signals, start_process
from tests.conftest import create_project
from tests.http_service import HttpService, Load, run_service, wait_until
from tests.model_folders import write_model_folder
from tests.soak.serving import read_memory_mb

TOKEN = "a-token-of-scope-predict"
DESCRIPTORS, HELD, CLIENTS = 512, 90, 4  # 4 processes hold 90 of each kind: 720 half requests, 360 without any
GROWTH_MAX, HEALTH_SECONDS_MAX = 1.2, 1.0
WARM_SECONDS, EVERY_SECONDS = 15.0, 1.0


# --- hostile clients: each sends what it is named by until it is cut off ----------------------------------------------


def send_in_a_row(client: socket.socket, token: bytes, *, reads: bool) -> None:
    """Requests without a pause, of which many come in one piece."""
    requests = (b"GET /model/info HTTP/1.1\r\nHost: a\r\n" + token + b"\r\n") * 1_000
    client.settimeout(0.2)
    end = time.monotonic() + 40
    while time.monotonic() < end:
        with contextlib.suppress(TimeoutError):
            client.send(requests)
        with contextlib.suppress(TimeoutError):
            if reads and not client.recv(1_000_000):
                return


def send_trailers(client: socket.socket, token: bytes) -> None:
    """Fields after the last chunk, without an end."""
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n" + token + b"\r\n1\r\n{\r\n0\r\n"
    client.sendall(head)
    while True:
        client.sendall(b"authorization: Bearer x\r\n" * 1_000)


def send_slowly(client: socket.socket, start: bytes, piece: bytes) -> None:
    """A head or a body, a piece at a time."""
    client.sendall(start)
    while True:
        time.sleep(random.uniform(0.2, 1))  # noqa: S311 - no secret
        client.sendall(piece)


def hold(address: tuple[str, int], start: bytes, count: int) -> None:
    """So many connections with the beginning of a request, opened again when they are cut off."""
    held: list[socket.socket] = []
    while True:
        for client in list(held):
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError, OSError):
                if client.recv(1_000):
                    continue
            if _is_gone(client):
                client.close()
                held.remove(client)
        while len(held) < count:
            with contextlib.suppress(OSError):
                client = socket.create_connection(address, timeout=5)
                client.sendall(start)
                held.append(client)
        time.sleep(0.5)


def _is_gone(client: socket.socket) -> bool:
    try:
        return client.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def again_and_again(address: tuple[str, int], attack: Callable[[socket.socket], None]) -> None:
    """One connection after the other."""
    while True:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=30) as client:
            attack(client)
        time.sleep(0.05)


def attack(port: int, metrics_port: int) -> None:
    """All of them, with and without a token, until this process is ended."""
    service, page = ("127.0.0.1", port), ("127.0.0.1", metrics_port)
    post = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 900000\r\n"
    jobs: list[Callable[[], None]] = [
        lambda: hold(service, b"GET /health HTTP/1.1\r\nHos", HELD),
        lambda: hold(service, b"", HELD),
        lambda: hold(page, b"GET /metrics HTTP/1.1\r\nHos", HELD),
    ]
    for token in (b"", b"Authorization: Bearer " + TOKEN.encode() + b"\r\n"):
        attacks: list[Callable[[socket.socket], None]] = [
            lambda client, token=token: send_in_a_row(client, token, reads=True),
            lambda client, token=token: send_in_a_row(client, token, reads=False),
            lambda client, token=token: send_trailers(client, token),
            lambda client, token=token: send_slowly(client, b"GET /health HTTP/1.1\r\n" + token, b"a: b\r\n"),
            lambda client, token=token: send_slowly(client, post + token + b"\r\n", b"{" * 100),
        ]
        jobs += [lambda one=one: again_and_again(service, one) for one in attacks]
        jobs.append(lambda token=token: hold(service, post + token + b"\r\n{", HELD // 2))
    for job in jobs:
        threading.Thread(target=job, daemon=True).start()
    while True:
        time.sleep(1)


# --- the honest ones, and what is looked at ---------------------------------------------------------------------------


@contextlib.contextmanager
def run_hostile(service: HttpService) -> Iterator[None]:
    """The hostile clients' processes, for the length of the block."""
    command = [sys.executable, "-m", "tests.soak.hostile", "attack", str(service.port), str(service.metrics_port)]
    clients = [start_process(command) for _ in range(CLIENTS)]
    try:
        yield
        assert all(client.poll() is None for client in clients), "a hostile client has ended"
    finally:
        for client in clients:
            end_process(client)


def find_agent(server: int) -> int:
    """The agent's process."""
    for path in Path(f"/proc/{server}/task").glob("*/children"):
        for child in path.read_text().split():
            if b"serve-agent" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError("there is no agent")


def time_health(service: HttpService) -> float:
    """Seconds until ``/health`` has answered, on a connection of its own."""
    start = time.monotonic()
    assert service.call("GET", "/health")[0] == 200
    return time.monotonic() - start


def watch(service: HttpService, seconds: float) -> tuple[list[float], list[float], list[float]]:
    """The memory of worker and agent, and how long ``/health`` took, again and again."""
    assert service.process is not None
    server = service.process.pid
    agent, worker_mb, agent_mb, health = find_agent(server), [], [], []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        health.append(time_health(service))
        worker_mb.append(read_memory_mb(server))
        agent_mb.append(read_memory_mb(agent))
        time.sleep(EVERY_SECONDS)
    return worker_mb, agent_mb, health


def main(arguments: list[str]) -> None:
    """Run it once, and print the figures."""
    if arguments[:1] == ["attack"]:
        attack(int(arguments[1]), int(arguments[2]))
    busy = "--busy" in arguments
    minutes = float(next((one for one in arguments if one != "--busy"), 5))
    exit_on_signals()
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    variables = {"CLOSEDLOOP_SERVING__TOKENS": json.dumps({TOKEN: ["predict"]})}
    with tempfile.TemporaryDirectory() as folder:
        root = create_project(Path(folder) / "project").root
        model = write_model_folder(Path(folder) / "model", model_name="shop_churn")
        with run_service(root, "--model", str(model), **variables) as service:
            service.headers = {"Authorization": f"Bearer {TOKEN}"}
            wait_until(lambda: service.read_metric("spool_depth_bytes") >= 0, "the agent's page")
            with Load(service, keep=False, pause_seconds=0.01) as load:
                before = [max(figures) for figures in watch(service, WARM_SECONDS)]
                answered_before = len(load.answers)
                with run_hostile(service):
                    worker_mb, agent_mb, health = watch(service, 60 * minutes)
                answered = len(load.answers) - answered_before
            stored = service.read_metric('prediction_rows_total{result="stored"}')
            log = service.read_log()
            failures = load.failures
    figures = {
        "minutes": minutes, "honest_requests": answered, "honest_failures": len(failures), "rows_stored": stored,
        "worker_mb": {"honest": before[0], "most": max(worker_mb), "last": worker_mb[-1]},
        "agent_mb": {"honest": before[1], "most": max(agent_mb), "last": agent_mb[-1]},
        "health_seconds": {"honest": before[2], "most": max(health), "median": sorted(health)[len(health) // 2]},
        "worker_mb_by_tenth": [round(max(part), 1) for part in np.array_split(worker_mb, 10)],
        "health_seconds_by_tenth": [round(max(part), 2) for part in np.array_split(health, 10)],
        "tracebacks": log.count("Traceback"), "load": os.getloadavg()[0],
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    assert not failures, failures[:3]
    assert answered
    assert "Traceback" not in log
    assert max(worker_mb) <= GROWTH_MAX * before[0], "the worker grows"
    assert max(agent_mb) <= GROWTH_MAX * before[1], "the agent grows"
    assert busy or max(health) < HEALTH_SECONDS_MAX, "/health took too long"
    print(f"{answered} honest requests beside hostile clients: none failed, memory and /health within their limits")


if __name__ == "__main__":
    main(sys.argv[1:])
