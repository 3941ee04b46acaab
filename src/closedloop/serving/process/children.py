"""Keeps the processes beside this one running: the agent, and the workers where there are several."""

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

from closedloop.processes import END_SIGNALS, end_process, start_process
from closedloop.serving.log.progress import count_waiting, measure_waiting, read_progress

RESTART_SECONDS = 1.0
LAST_DRAIN_SECONDS = 40.0  # for the agent to store what a slow store has left; a pod has 60 for its whole end
logger = logging.getLogger(__name__)


def keep_agent(stopping: threading.Event, params: Path, spool: Path, after: tuple[str, int] | None = None) -> None:
    """Run the agent of this ``params.yaml`` beside the workers until ``stopping`` is set.

    The agent starts once the address ``after`` answers, if one is given: its start would take the processor from the
    start of the workers, for which clients wait. If no agent runs at the end, one is started that drains ``spool``.
    """
    _wait_for(after, stopping)
    command = [sys.executable, "-m", "closedloop.cli.main", "serve-agent", "--params", str(params)]
    command += ["--parent", str(os.getpid())]
    ended = keep_running("agent", command, stopping, LAST_DRAIN_SECONDS)
    if not ended and measure_waiting(spool, read_progress(spool)):
        _end("agent", _start(command), LAST_DRAIN_SECONDS)
    report_waiting(spool)


def report_waiting(spool: Path) -> None:
    """Say how much of a spool is not stored now that its agent has ended."""
    progress = read_progress(spool)
    if lines := count_waiting(spool, progress):
        logger.error(
            "records left in %s, not in the operations store: %d (bytes: %d). The next start with this folder stores "
            "them; if the folder goes now, as a pod's emptyDir does, they are lost",
            spool, lines, measure_waiting(spool, progress),
        )  # fmt: skip


def keep_running(
    name: str, command: Sequence[str], stopping: threading.Event, seconds: float, descriptors: Sequence[int] = ()
) -> bool:
    """Run a command, and start it again when it ends; no other sign of life is asked for.

    Parameters
    ----------
    seconds
        For the process to end once ``stopping`` is set.
    descriptors
        That the process inherits.

    Returns
    -------
    bool
        Whether a process ran at the end, and was told to end.
    """
    while not stopping.is_set():
        child = _start(command, descriptors)
        while child.poll() is None and not stopping.wait(0.2):
            pass
        if child.poll() is None:
            _end(name, child, seconds)
            return True
        if not stopping.wait(RESTART_SECONDS):
            logger.error("the %s ended with status %s and is started again", name, child.returncode)
    return False


def _wait_for(address: tuple[str, int] | None, stopping: threading.Event) -> None:
    while address is not None and not stopping.wait(0.05):
        try:
            socket.create_connection(address, timeout=1).close()
            return
        except OSError:
            continue


def _start(command: Sequence[str], descriptors: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start a process; a signal to end waits until it listens, else it would end without its last work."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        return start_process(command, pass_fds=descriptors)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(name: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    if not end_process(process, seconds):
        logger.error("the %s did not end within %g s and was killed", name, seconds)
