"""The server that ``closedloop serve`` becomes: workers and agent.

One worker answers in this process; several are processes of their own, which share the listening socket. The agent is
always a process of its own. Each is started again when it dies, and ends with the server.
"""

from __future__ import annotations

import contextlib
import logging.config
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from closedloop.processes import END_SIGNALS, end_with_parent, exit_on_signals
from closedloop.serving.config import CONFIG_VARIABLE, WorkerConfig, read_config
from closedloop.serving.http.server import GRACEFUL_SECONDS, adopt, bind, run
from closedloop.serving.logs import LOG_CONFIG
from closedloop.serving.process.children import keep_agent, keep_running


def serve(path: Path) -> None:
    """Serve what a config file says until told to stop: SIGTERM lets open requests finish.

    Raises
    ------
    ClosedloopError
        If the port cannot be taken, or a single worker cannot be put together: the spool cannot be made, a Bento's
        version file is broken.
    """
    config = read_config(path)
    settings = config.settings
    os.environ[CONFIG_VARIABLE] = str(path)
    logging.config.dictConfig(LOG_CONFIG)
    exit_on_signals(0)  # uvicorn raises the signal again once it has shut down: then the agent is ended too
    with bind(settings.host, settings.port, "serving.port") as listener, run_beside(config, listener):
        if settings.workers == 1:
            _answer(listener)
        else:
            threading.Event().wait()


@contextlib.contextmanager
def run_beside(config: WorkerConfig, listener: socket.socket) -> Iterator[None]:
    """Run the agent, and the workers where there are several, for the length of the block."""
    from closedloop.serving.slots.slots import take_up_waiting

    stopping, agent_stopping = threading.Event(), threading.Event()
    host, port, count = config.settings.host, config.settings.port, config.settings.workers
    given = (agent_stopping, config.params, config.state_dir / "spool", (host, port))
    agent = threading.Thread(target=keep_agent, args=given, name="agent")
    number = listener.fileno()
    command = [sys.executable, "-m", __name__, str(number), str(os.getpid())]
    kept = ("worker", command, stopping, GRACEFUL_SECONDS + 5.0, [number])
    workers = [threading.Thread(target=keep_running, args=kept) for _ in range(count if count > 1 else 0)]
    try:
        if config.agent:
            take_up_waiting(config.state_dir)
            agent.start()
        for worker in workers:
            worker.start()
        yield
    finally:
        stopping.set()
        for worker in workers:
            worker.join()
        listener.close()  # nobody accepts any more: a client would wait until the agent has drained
        agent_stopping.set()  # after the workers: it drains what they have answered last
        if config.agent:
            with contextlib.suppress(RuntimeError):  # SIGTERM arrived before the agent started: start it to drain
                agent.start()
            agent.join()


def _answer(listener: socket.socket) -> None:
    from closedloop.serving.http.app import create_application

    run(create_application(), listener)


def main() -> None:
    """One of several workers: ``python -m ... DESCRIPTOR PARENT``, the socket and the server that gave it."""
    logging.config.dictConfig(LOG_CONFIG)
    exit_on_signals(0)
    end_with_parent(int(sys.argv[2]))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)  # the server held them back until here
    _answer(adopt(int(sys.argv[1])))


if __name__ == "__main__":
    main()
