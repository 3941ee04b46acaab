"""The process beside the workers: it alone talks to database and registry, so that neither can hold up an answer.

It drains the spools into the operations store, brings what the deployment row asks for to the state folder, and shows
the metrics of all workers.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from closedloop.errors import ClosedloopError, ServiceUnavailable
from closedloop.serving.log.drain import drain_once
from closedloop.serving.log.progress import measure_waiting, read_progress
from closedloop.serving.metrics import WorkerMetrics
from closedloop.serving.process.children import LAST_DRAIN_SECONDS
from closedloop.serving.slots.follower import SlotFollower

if TYPE_CHECKING:
    from closedloop.adapters.mlflow import Tracking
    from closedloop.store.journal import Journal
    from closedloop.store.predictions import Predictions

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.5
ALIAS_SECONDS = 10.0
NICE = 10  # an answer goes before its way into the store: the spool can wait


class OperationsStore(NamedTuple):
    """The agent's access to the operations store; ``upgrade`` brings its schema up to date."""

    upgrade: Callable[[], None]
    records: Predictions
    deployments: Journal


class Agent:
    """Runs the agent's loops until it is told to stop, or the process ``parent`` has ended.

    Each has a thread, and the drain is the main one: a registry that hangs holds up neither what is stored, nor a
    version that is here already, nor the end.
    """

    def __init__(
        self,
        state_dir: Path,
        model_name: str,
        store: OperationsStore,
        registry: Tracking,
        *,
        parent: int | None = None,
        slot: str = "champion",
        last_drain_seconds: float = LAST_DRAIN_SECONDS - 5,
    ) -> None:
        self._state_dir, self._model_name, self._store = state_dir, model_name, store
        self._parent, self._last_drain_seconds = parent, last_drain_seconds
        self._follower = SlotFollower(state_dir, model_name, store.deployments, registry, slot)
        name = f"agent-{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self._metrics = WorkerMetrics(state_dir / "metrics", name)
        self._stopping = threading.Event()
        self._stopped_at = 0.0
        self._upgraded = False

    def run(self) -> None:
        """Follow the row, watch the alias and drain until `stop`; then drain once more, and again while that fails."""
        if not self._stopping.is_set():  # else it was told to end before it began: only the last drain is left
            threading.Thread(target=self._follow, name="follow", daemon=True).start()
        os.nice(NICE)  # this thread
        self._metrics.start()
        self._repeat(lambda: self._drain(self._stopping.is_set))
        self._drain_last()
        self._metrics.flush()

    def _drain_last(self) -> None:
        end = self._stopped_at + self._last_drain_seconds
        while True:
            try:
                self._drain(lambda: time.monotonic() >= end)
                return
            except ClosedloopError as error:
                if not isinstance(error, ServiceUnavailable) or self._is_orphan() or time.monotonic() >= end:
                    logger.warning("the last drain failed: %s", error)
                    return
            time.sleep(POLL_SECONDS)

    def _is_orphan(self) -> bool:
        """Whether the server was killed: its successor has an agent of its own."""
        return self._parent is not None and os.getppid() != self._parent

    def _follow(self) -> None:
        """Nicer to the workers once it has looked for a model: before, they may have nothing to answer with."""
        self._try(self._follower.step)
        os.nice(NICE)  # this thread, and so that one
        alias = (self._follower.check_alias, ALIAS_SECONDS)
        threading.Thread(target=self._repeat, args=alias, name="alias", daemon=True).start()
        self._repeat(self._follower.step)

    def stop(self) -> None:
        """Let `run` return."""
        if not self._stopping.is_set():
            self._stopped_at = time.monotonic()
        self._stopping.set()

    def _repeat(self, step: Callable[[], None], seconds: float = POLL_SECONDS) -> None:
        """Call ``step`` again and again."""
        problem = ""
        while not self._stopping.is_set():
            if self._is_orphan():
                self.stop()
            problem = self._try(step, problem)
            self._stopping.wait(seconds)

    def _try(self, step: Callable[[], None], before: str = "") -> str:
        """Call ``step``; returns its problem, which is logged unless it is the one ``before``: not twice a second."""
        try:
            step()
        except Exception as error:  # this process must outlive whatever a store or registry throws
            found = f"{type(error).__name__}: {error}"
            if found != before:
                logger.warning("%s", found, exc_info=not isinstance(error, ClosedloopError))
            return found
        return ""

    def _drain(self, stopped: Callable[[], bool]) -> None:
        spool = self._state_dir / "spool"
        try:
            if not self._upgraded:
                self._store.upgrade()
                self._upgraded = True
            problems = drain_once(spool, self._store.records, self._model_name, report=self._count, stopped=stopped)
        finally:  # whatever keeps it from the store, that much waits
            self._show_waiting()
        for problem in problems:
            logger.error("%s", problem)

    def _count(self, counts: Mapping[str, int]) -> None:
        for result, rows in counts.items():
            self._metrics.count("prediction_rows_total", result, by=rows)
        self._show_waiting()

    def _show_waiting(self) -> None:
        spool = self._state_dir / "spool"
        progress = read_progress(spool)
        waiting, rate = measure_waiting(spool, progress), progress.estimate_rate(time.monotonic())
        self._metrics.set("spool_depth_bytes", value=waiting)
        if rate:
            self._metrics.set("spool_drain_seconds", value=waiting / rate)
