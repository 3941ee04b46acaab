"""The slots file, which names the versions that serve.

The agent writes the file from the operations store's deployment row; a worker never asks a database. A restart begins
with the last file written, even while store or registry cannot be reached.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from closedloop.contract import VERSION_FILE, ModelContract
from closedloop.core.release.assignment import is_canary
from closedloop.errors import ClosedloopError, DataError
from closedloop.files import replace_file
from closedloop.records import Variant, Version
from closedloop.rules import Breach, RefusedRequest, ScoringRequest
from closedloop.serving.models import LoadedModel, check_compatible, load_model
from closedloop.serving.requests import RequestChecker

logger = logging.getLogger(__name__)
SLOTS_FILE, MODELS_FOLDER = "slots.json", "models"  # of the state folder
BUNDLED = "bundled"


class Slot(msgspec.Struct, frozen=True):
    """A version, and the folder that the agent downloaded it to."""

    version: str
    folder: str
    folder_sha256: str


class _Packaged(msgspec.Struct, frozen=True):
    version: Version
    folder_sha256: str


def read_bundled(model_dir: Path) -> Slot:
    """Read a model folder that no deployment row names; its version is the packaged one, or `BUNDLED` if it has none.

    Raises
    ------
    DataError
        If the file beside it was not written by `closedloop package`.
    """
    path = model_dir.parent / VERSION_FILE
    try:
        packaged = msgspec.json.decode(path.read_bytes(), type=_Packaged)
    except FileNotFoundError:
        return Slot(BUNDLED, str(model_dir), "")
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path}: {error}") from error
    return Slot(packaged.version, str(model_dir), packaged.folder_sha256)


class RefusedVersion(msgspec.Struct, frozen=True):
    """A version that may not serve, and why."""

    version: str
    reason: str


class Slots(msgspec.Struct, frozen=True):
    """The slots of one revision of the deployment row; ``champion`` is None if the version that it names cannot be had.

    ``notes`` are the agent's messages for people, such as an alias moved by hand or a registry that does not answer.
    ``waiting`` is the row's champion if it takes other features than the serving one; it waits for a restart.
    """

    revision: int
    salt: str
    champion: Slot | None
    challenger: Slot | None = None
    challenger_mode: Literal["shadow", "canary"] = "shadow"
    weight: float = 0.0
    refused: tuple[RefusedVersion, ...] = ()
    notes: tuple[str, ...] = ()
    waiting: Slot | None = None


class Serving(NamedTuple):
    """The models and checker for a request; replaced as a whole, so that each answer belongs to one version."""

    slots: Slots
    champion: LoadedModel
    challenger: LoadedModel | None
    checker: RequestChecker

    def select(self, version: str) -> LoadedModel | None:
        """The loaded model of that version, or None."""
        return next((model for model in (self.champion, self.challenger) if model and model.version == version), None)


def assign(request: ScoringRequest, serving: Serving, version: str | None) -> tuple[LoadedModel, Variant]:
    """The model that answers a request.

    Raises
    ------
    RefusedRequest
        If the requested version does not serve.
    """
    champion, challenger, slots = serving.champion, serving.challenger, serving.slots
    if version is not None:
        model = serving.select(version)
        if model is None:
            known = ", ".join(model.version for model in (champion, challenger) if model is not None)
            breach = Breach("x-model-version", version[:80], f"one of {known}")
            raise RefusedRequest("unknown_version", "that version does not serve", (breach,))
        return model, "champion" if model is champion else "canary"
    if challenger is not None and slots.challenger_mode == "canary":
        key = request.customer_id or request.request_id
        if is_canary(slots.salt, key, slots.weight):
            return challenger, "canary"
    return champion, "champion"


def load_slot(slot: Slot, beside: ModelContract | None) -> LoadedModel:
    """Load a slot's model, and prove that it may serve in place of the model with the contract ``beside``.

    Raises
    ------
    DataError
        If it may not; `OtherFeatures` if only its features differ. The message, which clients see, names no path.
    """
    try:
        model = load_model(Path(slot.folder), version=slot.version, folder_sha256=slot.folder_sha256 or None)
    except ClosedloopError as error:
        raise DataError(str(error).replace(slot.folder, f"version {slot.version}")) from error
    if beside is not None:
        check_compatible(model, beside)
    return model


def write_slots(state_dir: Path, slots: Slots) -> None:
    """Write the slots file whole; its folders are relative to ``state_dir``, which may move, and lie in it."""
    named = _change_folders(slots, lambda folder: str(Path(folder).relative_to(state_dir)))
    state_dir.mkdir(parents=True, exist_ok=True)
    with replace_file(state_dir / SLOTS_FILE) as path:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(named)))


def _change_folders(slots: Slots, change: Callable[[str], str]) -> Slots:
    found = {role: getattr(slots, role) for role in ("champion", "challenger", "waiting")}
    moved = {role: slot and msgspec.structs.replace(slot, folder=change(slot.folder)) for role, slot in found.items()}
    return msgspec.structs.replace(slots, **moved)


def read_slots(state_dir: Path) -> Slots | None:
    """Read the slots file; return None if it was never written.

    Raises
    ------
    DataError
        If the file does not have the agent's format, or names a folder outside the state folder's ``models``.
    """
    path, models = state_dir / SLOTS_FILE, os.path.normpath(state_dir / MODELS_FOLDER)

    def locate(folder: str) -> str:
        found = os.path.normpath(state_dir / folder)
        if not Path(found).is_relative_to(models):
            raise DataError(f"{path}: {folder!r:.120} is not a folder in {models}; the agent writes no other")
        return str(state_dir / folder)

    try:
        slots = msgspec.json.decode(path.read_bytes(), type=Slots)
        return _change_folders(slots, locate)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path}: {error}") from error


def take_up_waiting(state_dir: Path) -> None:
    """Make the waiting champion the serving one before the workers start, if it passes its checks.

    Call it only while no worker runs: a running one checks requests against the earlier champion's features.
    """
    try:
        slots = read_slots(state_dir)
        if slots is not None and slots.waiting is not None:
            load_slot(slots.waiting, None)
            write_slots(state_dir, Slots(slots.revision, slots.salt, slots.waiting))  # the agent adds the challenger
    except (OSError, DataError) as error:
        logger.error("the version that waits for this start cannot be loaded: %s", error)
