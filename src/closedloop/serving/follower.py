"""What brings the versions that the deployment row asks for to the state folder, and says so in the slots file."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from closedloop.adapters.store import Deployment
from closedloop.contract import ModelContract, read_contract
from closedloop.errors import ClosedloopError, DataError, ServiceUnavailable
from closedloop.serving.downloads import Downloads, VersionSource, prune_downloads
from closedloop.serving.models import OtherFeatures
from closedloop.serving.slots import Refusal, Slot, Slots, load_slot, read_slots, write_slots

logger = logging.getLogger(__name__)


class DeploymentStore(Protocol):
    """Where the deployment row stands."""

    def read_deployment(self, model_name: str) -> Deployment | None:
        """The deployment row, None before the first release."""


class Registry(VersionSource, Protocol):
    """What is needed of the model registry."""

    def read_champion_version(self) -> str | None:
        """The version that the alias names."""


class _Superseded(Exception):
    """Another revision of the row was written while one of this was still being downloaded."""


@dataclass
class _Found:
    """What is told of the versions that cannot be had; ``other`` holds, and takes other features than those served."""

    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    other: Slot | None = None


class SlotFollower:
    """Keeps the slots file equal to the deployment row, as far as its versions can be had and hold.

    What does not hold is refused here, before a worker is told of it: else a worker that starts would find nothing in
    the file that it may serve, where its neighbours still have what served before.
    ``slot`` "challenger" answers with the challenger alone, where there is one: a proxy does the splitting.
    """

    def __init__(
        self, state_dir: Path, model_name: str, store: DeploymentStore, registry: Registry, slot: str = "champion"
    ) -> None:
        self._state_dir, self._model_name, self._slot = state_dir, model_name, slot
        self._store, self._registry = store, registry
        self._downloads = Downloads(registry, state_dir / "models")
        self._note = ""
        self._wanted: str | None = None  # the champion that the alias should name

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
            row = Deployment(row.model_name, row.revision, row.challenger_version or "", row.salt, row.updated_at)
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
            prune_downloads(self._state_dir / "models", [slot for slot in named if slot])
            logger.info("slots of revision %d are written", slots.revision)

    def _build(self, row: Deployment, before: Slots | None) -> Slots:
        """The slots of a row; what cannot be had keeps its slot as it was, which may be empty."""
        found = _Found()
        if before is not None and before.revision == row.revision:
            found.refused += before.refused  # not downloaded again twice a second; a new revision asks anew
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
        """The version's folder, which was proved to serve; ``beside`` is what its contract has to fit."""
        for slot in (before.champion, before.challenger) if before else ():
            if slot is not None and slot.version == version and Path(slot.folder).is_dir():
                return slot
        if any(refusal.version == version for refusal in found.refused):
            return None
        try:
            slot = self._downloads.fetch(version, lambda: self._is_current(row))
            if slot is None:
                raise _Superseded
            load_slot(slot, _read_contract(beside))
        except ServiceUnavailable as error:
            found.notes.append(f"registry: {error}")
        except OSError as error:  # a full disk says nothing of the version
            found.notes.append(f"state folder: {error.strerror}")
        except ClosedloopError as error:
            found.refused.append(Refusal(version, str(error)))
            found.other = slot if isinstance(error, OtherFeatures) else None
            logger.error("version %s is refused: %s", version, error)
        else:
            return slot
        return None

    def _is_current(self, row: Deployment) -> bool:
        with contextlib.suppress(ClosedloopError):  # a store that is away says nothing new
            found = self._store.read_deployment(self._model_name)
            return found is not None and found.revision == row.revision
        return True

    def check_alias(self) -> None:
        """Note, for the next step, an alias that somebody moved by hand; what serves is the row."""
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


def _read_contract(slot: Slot | None) -> ModelContract | None:
    if slot is None:
        return None
    with contextlib.suppress(OSError, DataError):  # what can be read no more cannot be kept to
        return read_contract(Path(slot.folder))
    return None
