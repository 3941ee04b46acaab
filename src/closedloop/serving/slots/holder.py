"""A worker's change to the versions that the slots file names, without losing a request."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from pathlib import Path

from closedloop.errors import DataError
from closedloop.serving.models import LoadedModel
from closedloop.serving.requests import RequestChecker
from closedloop.serving.slots.slots import (
    SLOTS_FILE,
    RefusedVersion,
    Serving,
    Slot,
    Slots,
    load_slot,
    read_bundled,
    read_slots,
)

logger = logging.getLogger(__name__)
POLL_SECONDS, RETRY_SECONDS = 0.25, 30.0


class SlotHolder:
    """The slots of one worker: the versions that serve now, and those that it refused.

    Parameters
    ----------
    state_dir
        The folder of the agent's slots file.
    bundled_dir
        A model folder to serve until the agent first writes the slots file; None if there is none.
    range_margin
        As `RequestChecker` takes it.
    """

    def __init__(self, state_dir: Path, bundled_dir: Path | None, *, range_margin: float) -> None:
        self.serving: Serving | None = None
        self.refused: dict[str, str] = {}
        self._state_dir, self._bundled_dir, self._range_margin = state_dir, bundled_dir, range_margin
        self._seen: tuple[int, int] | None = None
        self._retry_at = math.inf
        self._bundled: LoadedModel | None = None

    def load_first(self) -> None:
        """Serve the versions that served last, else the bundled model, else none until the agent has written."""
        self._seen = self._stat()
        try:
            slots = read_slots(self._state_dir)
        except DataError as error:
            logger.error("the last slots cannot be read: %s", error)
            slots = None
        if slots is not None:
            self._load_slots(slots)
        if self.serving is None and self._bundled_dir is not None:
            refused, retry_at = self.refused if slots is not None else {}, self._retry_at
            known = tuple(RefusedVersion(version, reason) for version, reason in refused.items())
            self._load_slots(Slots(0, "", read_bundled(self._bundled_dir), refused=known))
            self._bundled = self.serving.champion if self.serving else None
            self._retry_at = min(self._retry_at, retry_at)  # do not delay the retry of a wanted version

    async def follow(self) -> None:
        """Wait until the agent writes the slots file, and load the new versions while requests are answered.

        The agent has already proved these versions. If one cannot be loaded here, memory or file handles may have run
        out, so it is tried again.
        """
        while (seen := self._stat()) == self._seen and time.monotonic() < self._retry_at:
            await asyncio.sleep(POLL_SECONDS)
        self._retry_at = time.monotonic() + RETRY_SECONDS
        try:
            slots = read_slots(self._state_dir)
            if slots is not None:
                await asyncio.to_thread(self._load_slots, slots)
        except Exception:  # whatever failed, the present versions go on serving
            logger.exception("the wanted slots could not be loaded")
        self._seen = seen

    def _stat(self) -> tuple[int, int] | None:
        try:
            found = (self._state_dir / SLOTS_FILE).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino

    def _load_slots(self, slots: Slots) -> None:
        """Replace the serving versions by these slots; a refused model leaves its slot as it is."""
        before = self.serving
        refused = {refusal.version: refusal.reason for refusal in slots.refused}
        kept = before.champion if before else None
        champion = None if slots.champion is None else self._load(slots.champion, before, kept, refused)
        if champion is None:
            self._record_refused(refused, slots)
            return
        challenger = None
        if slots.challenger is not None:
            kept = before.challenger if before and before.challenger else None
            challenger = self._load(slots.challenger, before, kept, refused, beside=champion)
            if challenger is kept and kept is not None and kept.version != slots.challenger.version:
                challenger = None  # the old challenger's release is over, even if the new one is refused
        checker = before.checker if before and before.champion is champion else None
        checker = checker or RequestChecker(champion.contract, self._range_margin)
        self.serving = Serving(slots, champion, challenger, checker)
        self._record_refused(refused, slots)
        logger.info(
            "serving revision %d: champion %s, challenger %s",
            slots.revision,
            champion.version,
            challenger.version if challenger else None,
        )

    def _record_refused(self, refused: dict[str, str], slots: Slots) -> None:
        """Note the refused versions; those that only this worker refuses are tried again."""
        alone = len(refused) > len(slots.refused)
        self.refused, self._retry_at = refused, time.monotonic() + RETRY_SECONDS if alone else math.inf

    def _load(
        self,
        slot: Slot,
        before: Serving | None,
        kept: LoadedModel | None,
        refused: dict[str, str],
        *,
        beside: LoadedModel | None = None,
    ) -> LoadedModel | None:
        loaded = before.select(slot.version) if before else None
        if loaded is not None and slot.folder_sha256 in ("", loaded.folder_sha256):
            return loaded
        # a new version need not fit the bundled model, which serves only until a row names a version
        reference = beside or (before.champion if before and before.champion is not self._bundled else None)
        try:
            return load_slot(slot, reference.contract if reference else None)
        except DataError as error:
            refused[slot.version] = str(error)
            logger.error("version %s is refused: %s", slot.version, error)
            return kept
