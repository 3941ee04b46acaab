"""The agent is started once the service answers, with the parameters of the command beside it."""

from __future__ import annotations

import threading
from unittest import mock

import msgspec
import pytest
import uvicorn

from closedloop.serving import keeper, server, stream
from closedloop.serving.config import CONFIG_VARIABLE, WorkerConfig
from closedloop.serving.server import ServerConfig
from closedloop.serving.stream import StreamConfig


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
    keeper.keep_agent(stopping, "p.yaml", ("127.0.0.1", 3000))
    assert started_after == [4]
    assert set(asked) == {("127.0.0.1", 3000)}


def test_a_service_that_ends_before_it_answers_starts_no_agent(monkeypatch):
    stopping = threading.Event()
    stopping.set()
    monkeypatch.setattr(keeper.subprocess, "Popen", mock.Mock(side_effect=AssertionError("started")))
    keeper.keep_agent(stopping, "p.yaml", ("127.0.0.1", 1))


def test_the_agent_has_the_commands_own_parameters(monkeypatch):
    commands, stopping = [], threading.Event()

    def start(command):
        commands.append(command)
        stopping.set()
        return mock.Mock(pid=0, **{"poll.return_value": 0})

    monkeypatch.setattr(keeper.subprocess, "Popen", start)
    keeper.keep_agent(stopping, "/elsewhere/p.yaml")
    (command,) = commands
    assert command[command.index("serve-agent") + 1 :][:2] == ["--params", "/elsewhere/p.yaml"]


@pytest.fixture
def told(monkeypatch):
    """What the keeper is told by a process whose signals, logs and work are left out."""
    found = []
    for module in (server, stream):
        monkeypatch.setattr(module, "keep_agent", lambda _, params, *rest: found.append(params))
        monkeypatch.setattr(module.signal, "signal", lambda *_: None)
        monkeypatch.setattr(module.logging.config, "dictConfig", lambda _: None)
    monkeypatch.setenv(CONFIG_VARIABLE, "")  # so that what the server sets is undone
    return found


def test_the_server_hands_its_parameters_on(monkeypatch, tmp_path, told):
    monkeypatch.setattr(uvicorn, "run", lambda *_, **__: None)
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(ServerConfig("/elsewhere/p.yaml")))
    server.serve(tmp_path / "config.json")
    assert told == ["/elsewhere/p.yaml"]


def test_the_stream_worker_hands_its_parameters_on(monkeypatch, tmp_path, told):
    config = StreamConfig("", "in", "out", "dead", "group", WorkerConfig("m", str(tmp_path)), "/elsewhere/p.yaml")
    (tmp_path / "stream.json").write_bytes(msgspec.json.encode(config))
    monkeypatch.setattr(stream.sys, "argv", ["stream", str(tmp_path / "stream.json")])
    monkeypatch.setattr(stream, "run_stream", mock.AsyncMock())
    stream.main()
    assert told == ["/elsewhere/p.yaml"]
