"""One worker: its model slots, its spool, its counters and its reader, put together from one file of plain values."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import gc
import os
import socket
from pathlib import Path
from typing import Any

from closedloop.adapters.online_store import OnlineReader, is_stale, open_online_reader
from closedloop.config.settings import read_serving_environment
from closedloop.serving.batching import Batcher
from closedloop.serving.clock import Clock
from closedloop.serving.config import WorkerConfig
from closedloop.serving.log.spool import SpoolWriter
from closedloop.serving.metrics import WorkerMetrics
from closedloop.serving.models import LoadedModel
from closedloop.serving.slots.holder import SlotHolder
from closedloop.serving.slots.slots import Serving


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
        beside.touch(0o600)  # before the key is in it
        beside.write_bytes(os.urandom(32))
        try:
            path.hardlink_to(beside)  # the first process wins, and nobody reads half a key
        finally:
            beside.unlink()
    return path.read_bytes()


def name_reason(text: str) -> str:
    """The kind of check that a version failed, as the metric has it."""
    kinds = {"digest:": "digest", "SHA-256": "digest", "golden rows": "golden rows", "contract": "contract"}
    return next((kind for words, kind in kinds.items() if words in text), "other")


class Worker:
    """Everything behind the application of one process; ``batcher`` answers requests in the way of their source."""

    def __init__(self, config: WorkerConfig, batcher: type[Batcher] = Batcher) -> None:
        self.config = config
        secrets = read_serving_environment()
        self.tokens = secrets.tokens
        state_dir, settings = config.state_dir, config.settings
        self.id_key = read_id_key(state_dir, secrets.id_key)
        self.slots = SlotHolder(state_dir, config.bundled_dir, range_margin=settings.range_margin)
        self.slots.load_first()
        name = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self.log = SpoolWriter(
            state_dir / "spool" / name,
            segment_bytes=settings.spool_segment_bytes,
            disk_free_bytes_min=settings.disk_free_bytes_min,
            bytes_max=settings.spool_bytes_max,
            drain_seconds_max=settings.drain_seconds_max,
            fsync_before_answer=settings.fsync_before_answer,
        )
        self.metrics = WorkerMetrics(state_dir / "metrics", name)
        self.clock = Clock(config.clock)
        self._readers: dict[str, OnlineReader] = {}
        self.batcher = batcher(
            self.log,
            self.metrics,
            id_key=self.id_key,
            reader=self._find_reader,
            is_stale=self._is_stale,
            clock=self.clock,
            sent_features=settings.count_sent_features,
        )
        self._shown: Serving | None = None
        self._refused: dict[str, str] = {}
        self.show_slots()
        self._following: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow the slots and to sync the spool; called again it does nothing."""
        if self._following is None:
            self.metrics.start()
            gc.freeze()  # what is loaded by now stays: the collector would walk through it again and again
            self._following = asyncio.get_running_loop().create_task(self._follow())
            if not self.config.settings.fsync_before_answer:
                self.log.start_syncing(self.config.settings.fsync_every_ms)

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
            for name in ("model_errors_total", "model_failed_customers_total"):
                self.metrics.count(name, version, variant, by=0)  # Prometheus sees no series' first count
        if self._shown is None or self._shown.champion is not serving.champion:
            self.metrics.use_reference(serving.champion.contract)
        self._shown = serving

    async def _follow(self) -> None:
        while True:
            await self.slots.follow()
            self.show_slots()

    def describe_slots(self, serving: Serving) -> dict[str, Any]:
        """The versions that serve here, since which revision, and those that were refused."""
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
            "model_name": self.config.model_name,
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

    def _is_stale(self, snapshot_at: dt.datetime) -> bool:
        now = self.clock()
        if self.config.as_of is not None:
            now = dt.datetime.combine(self.config.as_of, dt.time(), dt.UTC)
        return is_stale(snapshot_at, now, self.config.feature_max_age_days)
