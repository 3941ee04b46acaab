"""Keeps the agent running beside a process that answers."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading

RESTART_SECONDS = 1.0
LAST_DRAIN_SECONDS = 40.0  # of what a store that was away has left; a pod has 60 for its whole end
logger = logging.getLogger(__name__)


def keep_agent(stopping: threading.Event, params: str, after: tuple[str, int] | None = None) -> None:
    """Run the agent of this ``params.yaml`` beside the workers, and start it again if it ends.

    Its own start waits until the address ``after`` answers, if one is given: it would take the processor from the
    workers' start, which somebody waits for.
    """
    while after is not None and not stopping.wait(0.05):
        try:
            socket.create_connection(after, timeout=1).close()
            break
        except OSError:
            continue
    command = [sys.executable, "-m", "closedloop.cli", "serve-agent", "--params", params]
    command += ["--parent", str(os.getpid())]
    while not stopping.is_set():
        agent = subprocess.Popen(command)
        while agent.poll() is None and not stopping.wait(0.2):
            pass
        if agent.poll() is None:
            agent.send_signal(signal.SIGTERM)
            try:
                agent.wait(LAST_DRAIN_SECONDS)
            except subprocess.TimeoutExpired:
                agent.kill()
        elif not stopping.wait(RESTART_SECONDS):
            logger.error("the agent ended with status %s and is started again", agent.returncode)
