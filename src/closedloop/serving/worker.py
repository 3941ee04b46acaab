"""One worker: its model slots, its spool, its counters and its reader, put together from one file of plain values."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import gc
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import msgspec

from closedloop.adapters.online import OnlineReader, open_online_reader, state_of
from closedloop.environment import ID_KEY_VARIABLE, TOKENS_VARIABLE
from closedloop.serving.batching import Batcher
from closedloop.serving.clock import Clock
from closedloop.serving.config import WorkerConfig
from closedloop.serving.metrics import WorkerMetrics
from closedloop.serving.models import LoadedModel
from closedloop.serving.slots import Serving, SlotHolder
from closedloop.serving.spool import SpoolWriter


def read_id_key(state_dir: Path, given: str) -> bytes:
    """The key that seals prediction ids: the given one, which replicas share, else one made for this state folder.

    It authenticates ids, and nothing else; a lost one only makes earlier ids unknown.
    """
    if given:
        return given.encode()[:64]
    path = state_dir / "id.key"
    state_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        beside = state_dir / f".id.key.{os.getpid()}"
        beside.write_bytes(os.urandom(32))
        beside.chmod(0o600)
        try:
            path.hardlink_to(beside)  # the first process wins, and nobody reads half a key
        finally:
            beside.unlink()
    return path.read_bytes()


def read_tokens() -> dict[str, tuple[str, ...]]:
    """Tokens and their scopes, as `export_secrets` has put them into the environment."""
    found = os.environ.get(TOKENS_VARIABLE)
    return msgspec.json.decode(found, type=dict[str, tuple[str, ...]]) if found else {}


def end_with_parent() -> None:
    """End when the process that started this one of several workers has ended, else it would keep the port for ever."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def name_reason(text: str) -> str:
    """The kind of check that a version failed, as the metric has it."""
    kinds = {"digest:": "digest", "SHA-256": "digest", "golden rows": "golden rows", "contract": "contract"}
    return next((kind for words, kind in kinds.items() if words in text), "other")


class Worker:
    """Everything behind the application of one process; ``batcher`` answers requests in the way of their source."""

    def __init__(self, config: WorkerConfig, batcher: type[Batcher] = Batcher) -> None:
        self.config = config
        self.tokens = read_tokens()
        state_dir = Path(config.state_dir)
        self.id_key = read_id_key(state_dir, os.environ.get(ID_KEY_VARIABLE, ""))
        bundled = Path(config.bundled_dir) if config.bundled_dir else None
        self.slots = SlotHolder(state_dir, bundled, range_margin=config.range_margin)
        self.slots.load_first()
        name = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self.log = SpoolWriter(
            state_dir / "spool" / name,
            segment_bytes=config.spool_segment_bytes,
            disk_free_bytes_min=config.disk_free_bytes_min,
            bytes_max=config.spool_bytes_max,
            fsync_before_answer=config.fsync_before_answer,
        )
        self.metrics = WorkerMetrics(state_dir / "metrics", name)
        self.clock = Clock(Path(config.clock) if config.clock else None)
        self._readers: dict[str, OnlineReader] = {}
        self.batcher = batcher(
            self.log,
            self.metrics,
            id_key=self.id_key,
            reader=self._find_reader,
            state_of=self._state_of,
            clock=self.clock,
        )
        self._shown: Serving | None = None
        self._refused: dict[str, str] = {}
        self.show_slots()
        self._following: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow the slots and to sync the spool; called again it does nothing."""
        if self._following is None:
            gc.freeze()  # what is loaded by now stays: the collector would walk through it again and again
            self._following = asyncio.get_running_loop().create_task(self._follow())
            if not self.config.fsync_before_answer:
                self.log.start_syncing(self.config.fsync_every_ms)

    async def stop(self) -> None:
        """Sync and close; what was answered is on disk then."""
        if self._following is not None:
            self._following.cancel()
        for reader in self._readers.values():
            await reader.close()
        self.log.close()
        self.batcher.observe()
        self.metrics.close()

    def show_slots(self) -> None:
        """Let metrics follow what serves now, and what was refused."""
        refused = dict(self.slots.refused)
        for version in refused.keys() - self._refused.keys():
            self.metrics.count("models_refused_total", name_reason(refused[version]))
        self._refused = refused
        serving = self.slots.serving
        if serving is None or serving is self._shown:
            return
        versions = {"champion": serving.champion.version}
        if serving.challenger is not None:
            versions[serving.slots.challenger_mode] = serving.challenger.version
        self.metrics.set_slots(versions)
        shown = [*versions.items()]
        if "canary" in versions:  # it scores what the champion answers, too
            shown.append(("shadow", versions["canary"]))
        for variant, version in shown:
            self.metrics.count("model_errors_total", version, variant, by=0)  # Prometheus sees no series' first count
        if self._shown is None or self._shown.champion is not serving.champion:
            self.metrics.use_reference(serving.champion.contract)
        self._shown = serving

    async def _follow(self) -> None:
        while True:
            await self.slots.follow()
            self.show_slots()

    def describe_slots(self, serving: Serving) -> dict[str, Any]:
        """What serves here, since which revision, and what was refused."""
        challenger = serving.challenger
        source = "operations store" if serving.slots.revision else "bundled"
        slots: dict[str, Any] = {
            "champion": {"version": serving.champion.version, "folder_sha256": serving.champion.folder_sha256}
        }
        if challenger is not None:
            slots["challenger"] = {
                "version": challenger.version,
                "folder_sha256": challenger.folder_sha256,
                "mode": serving.slots.challenger_mode,
                "weight": serving.slots.weight,
            }
        return {
            "model_version": serving.champion.version,
            "revision": serving.slots.revision,
            "source": source,
            "slots": slots,
            "refused": self.slots.refused,
            "notes": serving.slots.notes,
        }

    def _find_reader(self, model: LoadedModel) -> OnlineReader | None:
        contract = model.contract
        if self.config.online is None:
            return None
        if contract.feature_service not in self._readers:
            self._readers[contract.feature_service] = open_online_reader(
                self.config.online, contract.model_name, contract.feature_service, contract.feature_names
            )
        return self._readers[contract.feature_service]

    def _state_of(self, snapshot_at: dt.datetime) -> str:
        now = self.clock()
        if self.config.as_of is not None:
            now = dt.datetime.combine(self.config.as_of, dt.time(), dt.UTC)
        return state_of(snapshot_at, now, self.config.feature_max_age_days)
