"""Keeps the agent running beside a process that answers."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from closedloop.serving.spool import has_lines

RESTART_SECONDS = 1.0
LAST_DRAIN_SECONDS = 40.0  # of what a store that was away has left; a pod has 60 for its whole end
END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
logger = logging.getLogger(__name__)


def keep_agent(stopping: threading.Event, params: str, spool: Path, after: tuple[str, int] | None = None) -> None:
    """Run the agent of this ``params.yaml`` beside the workers, and start it again if it ends.

    Its own start waits until the address ``after`` answers, if one is given: it would take the processor from the
    workers' start, which somebody waits for. Where there is none at the end, one is started that drains ``spool``.
    """
    _wait_for(after, stopping)
    command = [sys.executable, "-m", "closedloop.cli", "serve-agent", "--params", params]
    command += ["--parent", str(os.getpid())]
    while not stopping.is_set():
        agent = _start(command)
        while agent.poll() is None and not stopping.wait(0.2):
            pass
        if agent.poll() is None:
            _end(agent)
            return
        if not stopping.wait(RESTART_SECONDS):
            logger.error("the agent ended with status %s and is started again", agent.returncode)
    if has_lines(spool):
        _end(_start(command))


def _wait_for(address: tuple[str, int] | None, stopping: threading.Event) -> None:
    while address is not None and not stopping.wait(0.05):
        try:
            socket.create_connection(address, timeout=1).close()
            return
        except OSError:
            continue


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the agent; a signal to end waits until it listens, else it would end without its last drain."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        return subprocess.Popen(command)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(agent: subprocess.Popen[bytes]) -> None:
    agent.send_signal(signal.SIGTERM)
    try:
        agent.wait(LAST_DRAIN_SECONDS)
    except subprocess.TimeoutExpired:
        agent.kill()
