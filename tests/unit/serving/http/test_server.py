"""A port that is taken is named with its setting; the metrics page bounds what a client may hold."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import urllib.request

import pytest
import uvicorn
from prometheus_client import CollectorRegistry, Gauge

from closedloop.errors import ServiceUnavailable
from closedloop.serving.exposition import serve_metrics
from closedloop.serving.http.server import adopt, bind, run


@pytest.mark.parametrize("setting", ["serving.port", "serving.metrics_port", "exporter.port"])
def test_a_port_that_is_taken_is_named_with_its_setting(setting):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ServiceUnavailable, match=rf"^{setting} {port}: 127\.0\.0\.1 port {port} cannot be"
        ) as found:
            bind("127.0.0.1", port, setting)
    assert f"choose another by CLOSEDLOOP_{setting.upper().replace('.', '__')}" in str(found.value)


def test_half_requests_for_the_metrics_page_hold_no_threads():
    registry = CollectorRegistry()
    Gauge("there", "A gauge", registry=registry).set(1)
    port = serve_metrics(registry, "127.0.0.1", 0, "serving.metrics_port")
    threads = threading.active_count()
    with contextlib.ExitStack() as held:
        for _ in range(100):
            client = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            client.sendall(b"GET /metrics HTTP/1.1\r\nHos")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
            assert b"there 1.0" in page.read()
        assert threading.active_count() == threads


@pytest.mark.parametrize("inherited", [False, True])
def test_a_worker_that_starts_never_makes_the_shared_socket_block(monkeypatch, inherited):
    """Whether it blocks is of all processes that have it: another worker would wait in `accept`, and answer nobody."""
    blocking = []

    def look(_, sockets):
        blocking.extend(os.get_blocking(one.fileno()) for one in sockets)
        for copy in sockets[1:]:
            copy.close()

    monkeypatch.setattr(uvicorn.Server, "run", look)
    with bind("127.0.0.1", 0, "serving.port") as listener:
        assert not os.get_blocking(listener.fileno())
        with adopt(os.dup(listener.fileno())) if inherited else contextlib.nullcontext(listener) as taken:
            run(lambda *_: None, taken)
    assert blocking
    assert not any(blocking)
