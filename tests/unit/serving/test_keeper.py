"""The agent is started once the service answers."""

from __future__ import annotations

import threading
from unittest import mock

from closedloop.serving import keeper


def test_the_agent_starts_once_the_port_answers_and_not_before(monkeypatch):
    asked, started_after = [], []

    def connect(address, timeout):
        asked.append(address)
        if len(asked) < 4:
            raise ConnectionRefusedError
        return mock.Mock()

    def start(command):
        started_after.append(len(asked))
        stopping.set()
        return mock.Mock(pid=0, **{"poll.return_value": 0})

    stopping = threading.Event()
    monkeypatch.setattr(keeper.socket, "create_connection", connect)
    monkeypatch.setattr(keeper.subprocess, "Popen", start)
    keeper.keep_agent(stopping, ("127.0.0.1", 3000))
    assert started_after == [4]
    assert set(asked) == {("127.0.0.1", 3000)}


def test_a_service_that_ends_before_it_answers_starts_no_agent(monkeypatch):
    stopping = threading.Event()
    stopping.set()
    monkeypatch.setattr(keeper.subprocess, "Popen", mock.Mock(side_effect=AssertionError("started")))
    keeper.keep_agent(stopping, ("127.0.0.1", 1))
