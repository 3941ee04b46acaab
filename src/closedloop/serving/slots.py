"""What serves: a file beside the workers says it, and a worker takes it up without dropping a request.

The agent writes the file from the operations store's deployment row; a worker never asks a database. What was written
last is also what a restart begins with while store or registry cannot be reached.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from closedloop.contract import VERSION_FILE, ModelContract
from closedloop.core.assignment import is_canary
from closedloop.errors import ClosedloopError, DataError
from closedloop.files import replace_file
from closedloop.records import Variant
from closedloop.serving.models import LoadedModel, check_compatible, load_model
from closedloop.serving.requests import Breach, RefusedRequest, RequestChecker, ScoringRequest

logger = logging.getLogger(__name__)
SLOTS_FILE = "slots.json"
POLL_SECONDS, RETRY_SECONDS = 0.25, 30.0
BUNDLED = "bundled"


class Slot(msgspec.Struct, frozen=True):
    """A version, and where the agent put its folder."""

    version: str
    folder: str
    folder_sha256: str


class _Packaged(msgspec.Struct, frozen=True):
    version: str
    folder_sha256: str


def read_bundled(model_dir: Path) -> Slot:
    """A model folder that no deployment row names, as the version that it was packaged as; `BUNDLED` if as none.

    Raises
    ------
    DataError
        If the file beside it is not what `closedloop package` writes.
    """
    path = model_dir.parent / VERSION_FILE
    try:
        packaged = msgspec.json.decode(path.read_bytes(), type=_Packaged)
    except FileNotFoundError:
        return Slot(BUNDLED, str(model_dir), "")
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path}: {error}") from error
    return Slot(packaged.version, str(model_dir), packaged.folder_sha256)


class Refusal(msgspec.Struct, frozen=True):
    """A version that may not serve, and why."""

    version: str
    reason: str


class Slots(msgspec.Struct, frozen=True):
    """The wanted slots: those of one revision of the deployment row; ``champion`` None: what it names cannot be had.

    ``notes`` are the agent's words for people: an alias that was moved by hand, a registry that does not answer.
    ``waiting`` is the champion that the row names where it takes other features than the one that serves.
    """

    revision: int
    salt: str
    champion: Slot | None
    challenger: Slot | None = None
    challenger_mode: Literal["shadow", "canary"] = "shadow"
    weight: float = 0.0
    refused: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    waiting: Slot | None = None


class Serving(NamedTuple):
    """What a request is checked and scored with; replaced as a whole, so that an answer belongs to one version."""

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
        If the version asked for does not serve.
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
    """Load a slot's model, and prove that it may serve where ``beside`` does.

    Raises
    ------
    DataError
        If it may not, `OtherFeatures` if for those alone; clients are told the reason, and no path.
    """
    try:
        model = load_model(Path(slot.folder), version=slot.version, folder_sha256=slot.folder_sha256 or None)
    except ClosedloopError as error:
        raise DataError(str(error).replace(slot.folder, f"version {slot.version}")) from error
    if beside is not None:
        check_compatible(model, beside)
    return model


def write_slots(state_dir: Path, slots: Slots) -> None:
    """Put the wanted slots in place, whole."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with replace_file(state_dir / SLOTS_FILE) as path:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(slots)))


def read_slots(state_dir: Path) -> Slots | None:
    """The wanted slots, or None where none were ever written.

    Raises
    ------
    DataError
        If the file is not what the agent writes.
    """
    path = state_dir / SLOTS_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Slots)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path}: {error}") from error


def take_up_waiting(state_dir: Path) -> None:
    """Let workers that are about to start begin with the champion that waits for it, if it holds.

    Only while none of them runs: nobody's requests are checked by the features of the one before then.
    """
    try:
        slots = read_slots(state_dir)
        if slots is not None and slots.waiting is not None:
            load_slot(slots.waiting, None)
            write_slots(state_dir, Slots(slots.revision, slots.salt, slots.waiting))  # the agent adds the challenger
    except (OSError, DataError) as error:
        logger.error("what waits for this start is not taken up: %s", error)


class SlotHolder:
    """The slots of one worker: what serves now, and what was refused.

    Parameters
    ----------
    state_dir
        Where the agent writes.
    bundled_dir
        A model folder to serve where the agent has never written; None if there is none.
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
        """Serve what was served last, else the bundled model, else nothing until the agent has written."""
        self._seen = self._stat()
        try:
            slots = read_slots(self._state_dir)
        except DataError as error:
            logger.error("the last slots cannot be read: %s", error)
            slots = None
        if slots is not None:
            self._take(slots)
        if self.serving is None and self._bundled_dir is not None:
            refused, retry_at = self.refused if slots is not None else {}, self._retry_at
            known = tuple(Refusal(version, reason) for version, reason in refused.items())
            self._take(Slots(0, "", read_bundled(self._bundled_dir), refused=known))
            self._bundled = self.serving.champion if self.serving else None
            self._retry_at = min(self._retry_at, retry_at)  # of what was wanted

    async def follow(self) -> None:
        """Wait until the agent writes, and take it up; loading happens beside the requests.

        The agent has proved what it wrote: what cannot be taken up here may be for want of memory or of file handles,
        and is tried again.
        """
        while (seen := self._stat()) == self._seen and time.monotonic() < self._retry_at:
            await asyncio.sleep(POLL_SECONDS)
        self._retry_at = time.monotonic() + RETRY_SECONDS
        try:
            slots = read_slots(self._state_dir)
            if slots is not None:
                await asyncio.to_thread(self._take, slots)
        except Exception:  # whatever it is, what serves goes on serving
            logger.exception("the wanted slots could not be taken up")
        self._seen = seen

    def _stat(self) -> tuple[int, int] | None:
        try:
            found = (self._state_dir / SLOTS_FILE).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino

    def _take(self, slots: Slots) -> None:
        """Replace what serves by these slots; a model that is refused leaves its slot as it is."""
        before = self.serving
        refused = {refusal.version: refusal.reason for refusal in slots.refused}
        kept = before.champion if before else None
        champion = None if slots.champion is None else self._load(slots.champion, before, kept, refused)
        if champion is None:
            self._settle(refused, slots)
            return
        challenger = None
        if slots.challenger is not None:
            kept = before.challenger if before and before.challenger else None
            challenger = self._load(slots.challenger, before, kept, refused, beside=champion)
            if challenger is kept and kept is not None and kept.version != slots.challenger.version:
                challenger = None  # the old challenger's release is over, whatever became of the new one
        checker = before.checker if before and before.champion is champion else None
        checker = checker or RequestChecker(champion.contract, self._range_margin)
        self.serving = Serving(slots, champion, challenger, checker)
        self._settle(refused, slots)
        logger.info(
            "serving revision %d: champion %s, challenger %s",
            slots.revision,
            champion.version,
            challenger.version if challenger else None,
        )

    def _settle(self, refused: dict[str, str], slots: Slots) -> None:
        """Note what is refused; what this worker alone refuses is looked at again."""
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
        # a bundled model is no reference: it serves only until there is a row's
        reference = beside or (before.champion if before and before.champion is not self._bundled else None)
        try:
            return load_slot(slot, reference.contract if reference else None)
        except DataError as error:
            refused[slot.version] = str(error)
            logger.error("version %s is refused: %s", slot.version, error)
            return kept
