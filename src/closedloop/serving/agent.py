"""The process beside the workers: it alone talks to database and registry, so that neither can hold up an answer.

It drains the spools into the operations store, brings what the deployment row asks for to the state folder, and shows
the metrics of all workers.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from closedloop.adapters.store import Deployment, SpoolPosition
from closedloop.contract import check_digest
from closedloop.errors import ClosedloopError, DataError, ServiceUnavailable
from closedloop.files import replace_folder
from closedloop.serving.drain import RecordStore, drain_once, measure_depth
from closedloop.serving.metrics import WorkerMetrics
from closedloop.serving.slots import Refusal, Slot, Slots, read_slots, write_slots

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.5
ALIAS_SECONDS = 10.0
NICE = 10  # an answer goes before its way into the store: the spool can wait


class OperationsStore(RecordStore, Protocol):
    """What the agent needs of the operations store."""

    def upgrade(self) -> None:
        """Bring the schema up to date."""

    def read_deployment(self, model_name: str) -> Deployment | None:
        """The deployment row, None before the first release."""


class Registry(Protocol):
    """What the agent needs of the model registry."""

    def fetch_version(self, version: str, folder: Path) -> tuple[Path, str]:
        """Download a version's folder into ``folder``; returns where it is, and the digest that its tag says."""

    def read_champion_version(self) -> str | None:
        """The version that the alias names."""


class SlotFollower:
    """Keeps the slots file equal to the deployment row, as far as its versions can be had and hold.

    ``slot`` "challenger" answers with the challenger alone, where there is one: a proxy does the splitting.
    """

    def __init__(
        self, state_dir: Path, model_name: str, store: OperationsStore, registry: Registry, slot: str = "champion"
    ) -> None:
        self._state_dir, self._model_name, self._slot = state_dir, model_name, slot
        self._store, self._registry = store, registry
        self._note = ""
        self._alias_at = 0.0

    def step(self) -> None:
        """Look at the row once, and write the slots if anything has changed."""
        try:
            before = read_slots(self._state_dir)
        except DataError as error:
            logger.error("%s; it is written again", error)
            before = None
        try:
            row = self._store.read_deployment(self._model_name)
        except ServiceUnavailable as error:
            if before is not None:
                self._write(before, msgspec.structs.replace(before, notes=(f"operations store: {error}",)))
            return
        if row is None:
            return
        alone = self._slot == "challenger" and row.challenger_version is not None
        if alone:
            row = Deployment(row.model_name, row.revision, row.challenger_version or "", row.salt, row.updated_at)
        slots = self._build(row, before)
        if slots is not None:
            if not alone:
                self._check_alias(row)
            notes = (*slots.notes, self._note) if self._note else slots.notes
            self._write(before, msgspec.structs.replace(slots, notes=notes))

    def _write(self, before: Slots | None, slots: Slots) -> None:
        if slots != before:
            write_slots(self._state_dir, slots)
            logger.info("slots of revision %d are written", slots.revision)

    def _build(self, row: Deployment, before: Slots | None) -> Slots | None:
        """The slots of a row; what cannot be had keeps its slot as it was."""
        refused: list[Refusal] = []
        notes: list[str] = []
        champion = self._fetch(row.champion_version, before, refused, notes)
        champion = champion or (before.champion if before else None)
        if champion is None:
            logger.warning("revision %d cannot be served: %s %s", row.revision, refused, notes)
            return None
        challenger = None
        if row.challenger_version is not None:
            challenger = self._fetch(row.challenger_version, before, refused, notes)
        return Slots(
            row.revision,
            row.salt,
            champion,
            challenger,
            row.challenger_mode or "shadow",
            row.weight,
            tuple(refused),
            tuple(notes),
        )

    def _fetch(self, version: str, before: Slots | None, refused: list[Refusal], notes: list[str]) -> Slot | None:
        for slot in (before.champion, before.challenger) if before else ():
            if slot is not None and slot.version == version and Path(slot.folder).is_dir():
                return slot
        known = next((found for found in before.refused if found.version == version), None) if before else None
        if known is not None:  # not downloaded again twice a second
            refused.append(known)
            return None
        place = self._state_dir / "models" / version
        try:
            with replace_folder(place) as partial:
                found, tagged = self._registry.fetch_version(version, partial / "download")
                check_digest(found, tagged)
                for file in found.iterdir():
                    file.rename(partial / file.name)
                shutil.rmtree(partial / "download")
        except ServiceUnavailable as error:
            notes.append(f"registry: {error}")
            return None
        except (ClosedloopError, OSError) as error:
            refused.append(Refusal(version, str(error)))
            logger.error("version %s is refused: %s", version, error)
            return None
        return Slot(version, str(place), tagged)

    def _check_alias(self, row: Deployment) -> None:
        """Report an alias that somebody moved by hand; what serves is the row."""
        now = time.monotonic()
        if now < self._alias_at:
            return
        self._alias_at = now + ALIAS_SECONDS
        try:
            version = self._registry.read_champion_version()
        except ServiceUnavailable as error:
            self._note = f"registry: {error}"
            return
        same = version == row.champion_version
        self._note = "" if same else f"alias champion names version {version}, served is {row.champion_version}"


class Agent:
    """Runs the agent's two loops until it is told to stop, or the process ``parent`` has ended."""

    def __init__(
        self,
        state_dir: Path,
        model_name: str,
        store: OperationsStore,
        registry: Registry,
        *,
        parent: int | None = None,
        slot: str = "champion",
    ) -> None:
        self._state_dir, self._model_name, self._store = state_dir, model_name, store
        self._parent = parent
        self._follower = SlotFollower(state_dir, model_name, store, registry, slot)
        name = f"agent-{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self._metrics = WorkerMetrics(state_dir / "metrics", name)
        self._stopping = threading.Event()
        self._upgraded = False
        self._positions: Mapping[str, SpoolPosition] = {}

    def run(self) -> None:
        """Drain and follow, each in its own thread, until `stop`; then drain once more.

        Nicer to the workers once it has looked for a model: before, they may have nothing to answer with.
        """
        self._try(self._follower.step)
        os.nice(NICE)  # this thread, and so those that it starts
        drain = threading.Thread(target=self._repeat, args=(self._drain,), name="drain", daemon=True)
        drain.start()
        self._repeat(self._follower.step)
        drain.join(timeout=10)
        try:
            self._drain()
        except ServiceUnavailable as error:
            logger.warning("what is spooled waits for the next start: %s", error)

    def stop(self) -> None:
        """Let `run` return."""
        self._stopping.set()

    def _repeat(self, step: Callable[[], None]) -> None:
        """Call ``step`` again and again."""
        problem = ""
        while not self._stopping.is_set():
            # the server was killed, and its successor has an agent of its own
            if self._parent is not None and os.getppid() != self._parent:
                self.stop()
            problem = self._try(step, problem)
            self._stopping.wait(POLL_SECONDS)

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

    def _drain(self) -> None:
        spool = self._state_dir / "spool"
        try:
            if not self._upgraded:
                self._store.upgrade()
                self._upgraded = True
            result = drain_once(spool, self._store, self._model_name, report=self._count)
        except ServiceUnavailable:
            self._metrics.set("spool_depth_bytes", value=measure_depth(spool, self._positions))
            raise
        self._positions = result.positions
        self._metrics.set("spool_depth_bytes", value=result.depth_bytes)
        for problem in result.problems:
            logger.error("%s", problem)

    def _count(self, counts: Mapping[str, int]) -> None:
        for result, rows in counts.items():
            self._metrics.count("prediction_rows_total", result, by=rows)
