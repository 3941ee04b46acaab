"""Agent and workers are kept running, and are given the time for their last work at the end."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import socket
import sys
import threading
import time

import pytest

from closedloop.bootstrap import build_predictions, load_run, locate_serving_state
from closedloop.config.settings import StreamSettings
from closedloop.contract import digest_folder
from closedloop.records import Outcome, Prediction
from closedloop.scoring import stream
from closedloop.scoring.stream import StreamConfig
from closedloop.serving.log.progress import DrainProgress
from closedloop.serving.log.spool import SpoolWriter
from closedloop.serving.process.children import keep_agent, keep_running, report_waiting
from closedloop.serving.slots.slots import Slot, Slots, read_slots
from tests.model_folders import write_model_folder, write_slots

# It listens to signals only after a while, as a program that still imports does.
LISTENS_LATE = """
import signal, sys, time
from pathlib import Path
from closedloop.processes import END_SIGNALS, exit_on_signals
Path(sys.argv[1]).write_text("there")
time.sleep(0.5)
exit_on_signals(0)
try:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)
    time.sleep(1000)
finally:
    Path(sys.argv[1]).write_text("its last work is done")
"""


def wait_until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextlib.contextmanager
def keep(function, *arguments):
    stopping, found = threading.Event(), []
    thread = threading.Thread(target=lambda: found.append(function(stopping, *arguments)))
    thread.start()
    try:
        yield found
    finally:
        stopping.set()
        thread.join(120)
        assert not thread.is_alive()


def test_what_ends_is_started_again_and_that_is_said(tmp_path, caplog):
    code = f"open({str(tmp_path / 'starts')!r}, 'a').write('x'); raise SystemExit(3)"
    command = [sys.executable, "-c", code]
    with keep(lambda stopping: keep_running("worker", command, stopping, 1)):
        wait_until(lambda: (tmp_path / "starts").exists() and (tmp_path / "starts").read_text() == "xx")
    assert "the worker ended with status 3 and is started again" in caplog.text


def test_a_signal_to_end_waits_until_the_process_listens(tmp_path):
    command = [sys.executable, "-c", LISTENS_LATE, str(tmp_path / "work")]
    with keep(lambda stopping: keep_running("worker", command, stopping, 60)) as found:
        wait_until((tmp_path / "work").exists)
    assert found == [True]
    assert (tmp_path / "work").read_text() == "its last work is done"


def test_what_does_not_end_is_killed_and_that_is_said(tmp_path, caplog):
    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(tmp_path / 'there')!r}, 'w');"
    with keep(lambda stopping: keep_running("agent", [sys.executable, "-c", code + "signal.pause()"], stopping, 0.5)):
        wait_until((tmp_path / "there").exists)
    assert "the agent did not end within 0.5 s and was killed" in caplog.text


def test_what_the_last_drain_leaves_behind_is_counted_and_logged(tmp_path, caplog):
    writer = SpoolWriter(tmp_path / "one", 1_000_000)
    now = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    writer.append([Outcome(name, 1, now) for name in "abc"])
    writer.close()
    size = (tmp_path / "one/00000001.log").stat().st_size
    DrainProgress({"one": (1, size // 3)}).write(tmp_path)
    report_waiting(tmp_path)
    (left,) = [record.getMessage() for record in caplog.records]
    assert f"not in the operations store: 2 (bytes: {size - size // 3})" in left


@pytest.fixture
def run(monkeypatch, project):
    """The project; its parameters have another name, so that an agent that was not given them finds none."""
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("CLOSEDLOOP_SERVING__METRICS_PORT", "0")
    return load_run((project.root / "params.yaml").rename(project.root / "mine.yaml"))


def find_database(run):
    return run.settings.root / "state/operations.db"


@pytest.mark.thorough
def test_the_agent_starts_once_the_port_answers_and_not_before(run):
    spool = locate_serving_state(run) / "spool"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        told = (str(run.params_path), spool, listener.getsockname())
        with keep(keep_agent, *told):
            time.sleep(0.5)
            assert not find_database(run).exists()
            listener.listen()
            wait_until(find_database(run).exists)


def test_a_service_that_ends_before_it_answers_starts_no_agent(run):
    with keep(keep_agent, str(run.params_path), locate_serving_state(run) / "spool", ("127.0.0.1", 1)):
        pass
    assert not find_database(run).exists()


def test_a_service_that_ends_before_its_agent_starts_one_for_what_waits(run):
    """Of a container before, or answered just now: it goes with the pod."""
    spool = locate_serving_state(run) / "spool"
    writer = SpoolWriter(spool / "one", 1_000_000)
    now, name = dt.datetime(2024, 1, 1, tzinfo=dt.UTC), run.dataset.model_name
    writer.append([Prediction("a", "r1", name, "1", "champion", "http", now, (1.5,), 0.25, 0, 1.0)])
    writer.close()
    stopping = threading.Event()
    stopping.set()
    keep_agent(stopping, run.params_path, spool, ("127.0.0.1", 1))
    assert not (spool / "one").exists()
    with contextlib.closing(run.database):
        (stored,) = [found for some in build_predictions(run).read_predictions(name) for found in some]
    assert stored.prediction_id == "a"


@pytest.mark.parametrize("agent", [True, False])
def test_a_stream_worker_that_runs_the_agent_takes_up_what_waits_for_a_start(monkeypatch, run, tmp_path, agent):
    """Beside it others may have started before, with what served then."""
    model, state = write_model_folder(tmp_path / "5"), tmp_path / "state"
    waiting = Slot("5", str(model), digest_folder(model))
    waiting = write_slots(state, Slots(2, "salt", None, waiting=waiting)).waiting
    config = StreamConfig(model_name="m", state_dir=state, stream=StreamSettings(), params=run.params_path, agent=agent)
    (tmp_path / "stream.json").write_text(config.model_dump_json(), encoding="utf-8")
    found = []

    async def run_stream(*_):
        await asyncio.sleep(0)
        found.append(read_slots(state).champion)

    monkeypatch.setattr(stream, "run_stream", run_stream)  # there is no broker
    monkeypatch.setattr(stream, "handle_end_signals", lambda _: None)
    monkeypatch.setattr(logging.config, "dictConfig", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["stream", str(tmp_path / "stream.json")])
    stream.main()
    assert found == [waiting if agent else None]
