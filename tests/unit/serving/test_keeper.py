"""The agent is started once the service answers, with the command's own parameters, and for a last drain at the end."""

from __future__ import annotations

import contextlib
import datetime as dt
import signal
import threading
from unittest import mock

import msgspec
import pytest
import uvicorn

from closedloop.bootstrap import build_store, load_run, locate_serving_state
from closedloop.contract import digest_folder
from closedloop.records import Prediction
from closedloop.serving import keeper, server, stream
from closedloop.serving.config import CONFIG_VARIABLE, WorkerConfig
from closedloop.serving.server import ServerConfig
from closedloop.serving.slots import Slot, Slots, read_slots, write_slots
from closedloop.serving.spool import SpoolWriter
from closedloop.serving.stream import StreamConfig
from tests.model_folders import write_model_folder


def test_the_agent_starts_once_the_port_answers_and_not_before(monkeypatch, tmp_path):
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
    keeper.keep_agent(stopping, "p.yaml", tmp_path, ("127.0.0.1", 3000))
    assert started_after == [4]
    assert set(asked) == {("127.0.0.1", 3000)}


def test_a_service_that_ends_before_it_answers_starts_no_agent(monkeypatch, tmp_path):
    stopping = threading.Event()
    stopping.set()
    monkeypatch.setattr(keeper.subprocess, "Popen", mock.Mock(side_effect=AssertionError("started")))
    keeper.keep_agent(stopping, "p.yaml", tmp_path, ("127.0.0.1", 1))


@pytest.mark.parametrize("lying", ["one/00000001.log", "waiting-1700000000.log"])
def test_a_service_that_ends_before_its_agent_starts_one_for_what_waits(monkeypatch, tmp_path, lying):
    """Of a container before, or answered just now: it goes with the pod."""
    (tmp_path / lying).parent.mkdir(exist_ok=True)
    (tmp_path / lying).write_bytes(b"a line\n")
    agent, stopping = mock.Mock(), threading.Event()
    stopping.set()
    monkeypatch.setattr(keeper.subprocess, "Popen", lambda _: agent)
    keeper.keep_agent(stopping, "p.yaml", tmp_path, ("127.0.0.1", 1))
    assert agent.method_calls == [
        mock.call.send_signal(signal.SIGTERM),
        mock.call.wait(keeper.LAST_DRAIN_SECONDS),
    ]


def test_an_agent_that_is_told_to_end_before_it_listens_drains_once(monkeypatch, project):
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("CLOSEDLOOP_SERVING__METRICS_PORT", "0")
    monkeypatch.setattr(keeper, "LAST_DRAIN_SECONDS", 600.0)  # it ends by itself, however slow this machine is
    agents, start = [], keeper.subprocess.Popen
    monkeypatch.setattr(keeper.subprocess, "Popen", lambda command: agents.append(start(command)) or agents[-1])
    run = load_run(project.root / "params.yaml")
    spool = locate_serving_state(run) / "spool"
    writer = SpoolWriter(spool / "one", 1_000_000)
    now, name = dt.datetime(2024, 1, 1, tzinfo=dt.UTC), run.dataset.model_name
    writer.append([Prediction("a", "r1", name, "1", "champion", "http", now, (1.5,), 0.25, 0, 1.0)])
    writer.close()
    stopping = threading.Event()
    stopping.set()
    keeper.keep_agent(stopping, str(project.root / "params.yaml"), spool)
    assert [agent.returncode for agent in agents] == [0]
    assert not (spool / "one").exists()
    with contextlib.closing(build_store(run)) as store:
        (stored,) = [found for some in store.read_predictions(name) for found in some]
    assert stored.prediction_id == "a"


def test_the_agent_has_the_commands_own_parameters(monkeypatch, tmp_path):
    commands, stopping = [], threading.Event()

    def start(command):
        commands.append(command)
        stopping.set()
        return mock.Mock(pid=0, **{"poll.return_value": 0})

    monkeypatch.setattr(keeper.subprocess, "Popen", start)
    keeper.keep_agent(stopping, "/elsewhere/p.yaml", tmp_path)
    (command,) = commands
    assert command[command.index("serve-agent") + 1 :][:2] == ["--params", "/elsewhere/p.yaml"]


@pytest.fixture
def told(monkeypatch):
    """What the keeper is told by a process whose signals, logs and work are left out."""
    found = []
    for module in (server, stream):
        monkeypatch.setattr(module, "keep_agent", lambda _, params, spool, *rest: found.append((params, spool)))
        monkeypatch.setattr(module.signal, "signal", lambda *_: None)
        monkeypatch.setattr(module.logging.config, "dictConfig", lambda _: None)
    monkeypatch.setenv(CONFIG_VARIABLE, "")  # so that what the server sets is undone
    return found


def test_the_server_hands_its_parameters_on(monkeypatch, tmp_path, told):
    monkeypatch.setattr(uvicorn, "run", lambda *_, **__: None)
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(ServerConfig("/elsewhere/p.yaml", str(tmp_path))))
    server.serve(tmp_path / "config.json")
    assert told == [("/elsewhere/p.yaml", tmp_path / "spool")]


@pytest.mark.parametrize("agent", [True, False])
def test_before_workers_start_who_runs_the_agent_takes_up_what_waits_for_a_start(monkeypatch, tmp_path, told, agent):
    """Beside it others may have started before, with what served then."""
    model = write_model_folder(tmp_path / "5")
    waiting = Slot("5", str(model), digest_folder(model))
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(ServerConfig("p.yaml", str(tmp_path), agent=agent)))
    config = StreamConfig("", "in", "out", "dead", "group", WorkerConfig("m", str(tmp_path)), "p.yaml", agent=agent)
    (tmp_path / "stream.json").write_bytes(msgspec.json.encode(config))
    found = []

    async def run_stream(*_):
        found.append(read_slots(tmp_path).champion)

    monkeypatch.setattr(uvicorn, "run", lambda *_, **__: found.append(read_slots(tmp_path).champion))
    monkeypatch.setattr(stream, "run_stream", run_stream)
    monkeypatch.setattr(stream.sys, "argv", ["stream", str(tmp_path / "stream.json")])
    for start in (lambda: server.serve(tmp_path / "config.json"), stream.main):
        write_slots(tmp_path, Slots(2, "salt", None, waiting=waiting))
        start()
    assert found == [waiting if agent else None] * 2


def test_the_stream_worker_hands_its_parameters_on(monkeypatch, tmp_path, told):
    config = StreamConfig("", "in", "out", "dead", "group", WorkerConfig("m", str(tmp_path)), "/elsewhere/p.yaml")
    (tmp_path / "stream.json").write_bytes(msgspec.json.encode(config))
    monkeypatch.setattr(stream.sys, "argv", ["stream", str(tmp_path / "stream.json")])
    monkeypatch.setattr(stream, "run_stream", mock.AsyncMock())
    stream.main()
    assert told == [("/elsewhere/p.yaml", tmp_path / "spool")]
