"""The server around workers and agent: what it holds, and until when."""

from __future__ import annotations

import socket

import pytest

from closedloop.config.settings import ServingSettings
from closedloop.serving.config import WorkerConfig
from closedloop.serving.http.server import bind
from closedloop.serving.process import server


@pytest.mark.parametrize("workers", [1, 2])
def test_nobody_is_let_in_while_the_agent_stores_the_last_answers(monkeypatch, tmp_path, workers):
    """The workers have ended by then: who connected would wait for as long as the agent drains, for nothing."""
    refused = []

    def drain(stopping, *_):
        stopping.wait()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=60)
        refused.append(True)

    monkeypatch.setattr(server, "keep_agent", drain)
    monkeypatch.setattr(server, "keep_running", lambda *_: None)
    settings = ServingSettings(workers=workers)
    config = WorkerConfig(model_name="test_churn", state_dir=tmp_path, settings=settings)
    with bind("127.0.0.1", 0, "serving.port") as listener:
        listener.listen()
        address = listener.getsockname()
        with server.run_beside(config, listener):
            socket.create_connection(address, timeout=60).close()
    assert refused
