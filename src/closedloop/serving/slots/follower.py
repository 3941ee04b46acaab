"""The follower: download and check the versions that the deployment row names, and write the slots file."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from closedloop.core.release.entries import Deployment
from closedloop.errors import ClosedloopError, DataError, ServiceUnavailable
from closedloop.serving.models import OtherFeatures
from closedloop.serving.slots.downloads import Downloads, prune_downloads, require_digest
from closedloop.serving.slots.proof import prove_slot
from closedloop.serving.slots.slots import MODELS_FOLDER, RefusedVersion, Slot, Slots, read_slots, write_slots

if TYPE_CHECKING:
    from closedloop.adapters.mlflow import Tracking
    from closedloop.store.journal import Journal

logger = logging.getLogger(__name__)


class _Superseded(Exception):
    """A newer revision of the row was written while a version of this one was still being downloaded."""


@dataclass
class _Found:
    """Notes on versions that cannot serve; ``other`` is a good version that takes other features than those served."""

    refused: list[RefusedVersion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    other: Slot | None = None


class SlotFollower:
    """Keeps the slots file equal to the deployment row, as far as its versions can be downloaded and pass their checks.

    The follower refuses a bad version before any worker hears of it. Otherwise a worker that starts would find no
    version in the file that it may serve, while the other workers still serve the earlier one.
    With ``slot`` "challenger" the service answers with the challenger alone, if there is one: a proxy splits requests.
    """

    def __init__(
        self,
        state_dir: Path,
        model_name: str,
        store: Journal,
        registry: Tracking,
        slot: str = "champion",
        prove: Callable[[Slot, Slot | None, Callable[[], bool]], bool] = prove_slot,
    ) -> None:
        self._state_dir, self._model_name, self._slot = state_dir, model_name, slot
        self._store, self._registry = store, registry
        self._prove = prove
        self._downloads = Downloads(registry, state_dir / MODELS_FOLDER)
        self._note = ""
        self._wanted: str | None = None  # the version that the alias champion should name

    def step(self) -> None:
        """Look at the row once, and write the slots if anything has changed."""
        try:
            before = read_slots(self._state_dir)
        except DataError as error:
            logger.error("%s; it is written again", error)
            before = None
        try:
            row = self._store.read_deployment(self._model_name)
        except ClosedloopError as error:
            if before is not None:
                self._write(before, msgspec.structs.replace(before, notes=(f"operations store: {error}",)))
            return
        if row is None:
            return
        alone = self._slot == "challenger" and row.challenger_version is not None
        self._wanted = None if alone else row.champion_version
        if alone:
            row = msgspec.structs.replace(
                row, champion_version=row.challenger_version, challenger_version=None, challenger_mode=None, weight=0.0
            )
        try:
            slots = self._build(row, before)
        except _Superseded:
            return
        notes = (*slots.notes, self._note) if self._note else slots.notes
        self._write(before, msgspec.structs.replace(slots, notes=notes))

    def _write(self, before: Slots | None, slots: Slots) -> None:
        if slots != before:
            write_slots(self._state_dir, slots)
            named = (slot for one in (before, slots) if one for slot in (one.champion, one.challenger, one.waiting))
            prune_downloads(self._state_dir / MODELS_FOLDER, [slot for slot in named if slot])
            logger.info("slots of revision %d are written", slots.revision)

    def _build(self, row: Deployment, before: Slots | None) -> Slots:
        """Build the slots of a row; a version that cannot be had leaves its slot as it was, perhaps empty."""
        found = _Found()
        if before is not None and before.revision == row.revision:
            found.refused += before.refused  # do not download them again in every step; a new revision tries again
            found.other = before.waiting
        kept = before.champion if before else None
        champion = self._fetch(row, row.champion_version, before, kept, found) or kept
        waiting = found.other
        if waiting is not None:
            found.notes.append(f"version {waiting.version} takes other features: start the service again to serve it")
        if champion is None:
            logger.warning("revision %d cannot be served: %s %s", row.revision, found.refused, found.notes)
        challenger = None
        if champion is not None and row.challenger_version is not None:
            challenger = self._fetch(row, row.challenger_version, before, champion, found)
        return Slots(
            row.revision,
            row.salt,
            champion,
            challenger,
            row.challenger_mode or "shadow",
            row.weight,
            tuple(found.refused),
            tuple(found.notes),
            waiting,
        )

    def _fetch(
        self, row: Deployment, version: str, before: Slots | None, beside: Slot | None, found: _Found
    ) -> Slot | None:
        """Fetch a version that is proved to serve; its contract has to fit that of ``beside``."""
        digest = row.digests.get(version)
        for slot in (before.champion, before.challenger) if before else ():
            same = slot is not None and slot.version == version and digest in (None, slot.folder_sha256)
            if slot is not None and same and Path(slot.folder).is_dir():
                return slot
        if any(refusal.version == version for refusal in found.refused):
            return None
        try:
            slot = self._downloads.fetch(version, lambda: self._is_current(row))
            if slot is None:
                raise _Superseded
            require_digest(slot, digest)
            if not self._prove(slot, beside, lambda: self._is_current(row)):
                raise _Superseded
        except ServiceUnavailable as error:
            found.notes.append(f"registry: {error}")
        except OSError as error:  # a full disk is no fault of the version
            found.notes.append(f"state folder: {error.strerror}")
        except ClosedloopError as error:
            found.refused.append(RefusedVersion(version, str(error)))
            found.other = slot if isinstance(error, OtherFeatures) else None
            logger.error("version %s is refused: %s", version, error)
        else:
            return slot
        return None

    def _is_current(self, row: Deployment) -> bool:
        with contextlib.suppress(ClosedloopError):  # the store cannot be reached: no newer revision is known
            found = self._store.read_deployment(self._model_name)
            return found is not None and found.revision == row.revision
        return True

    def check_alias(self) -> None:
        """Note for the next step if the alias champion was moved by hand; the row decides what serves."""
        wanted, self._note = self._wanted, ""
        if wanted is None:
            return
        try:
            version = self._registry.read_champion_version()
        except ServiceUnavailable as error:
            self._note = f"registry: {error}"
            return
        if version != wanted:
            self._note = f"alias champion names version {version}, served is {wanted}"
