"""Downloaded model folders, kept so that a version can serve again without the registry."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from closedloop.contract import ModelContract, check_digest, read_contract
from closedloop.errors import DataError
from closedloop.files import replace_folder
from closedloop.serving.slots.slots import Slot

if TYPE_CHECKING:
    from closedloop.adapters.mlflow import Tracking

MODEL_DIR, DIGEST_FILE = "model", "sha256"
KEPT = 5  # enough for a rollback; each model takes megabytes
WANTED_SECONDS = 0.5  # how often the waiting thread checks that the version is still wanted


class VersionSource(Protocol):
    """The source of model versions: the registry, or `ReleasedVersions` of it."""

    def fetch_version(self, version: str, folder: Path) -> tuple[Path, str]:
        """Download a version's folder into ``folder``; returns where it is, and the digest that its tag says."""


class ReleasedVersions:
    """A source of versions that refuses a digest other than the one in the journal; a version without one there passes.

    Parameters
    ----------
    digests
        By version, from `closedloop.store.journal.Journal.read_digests`.
    """

    def __init__(self, source: VersionSource, digests: Mapping[str, str]) -> None:
        self._source, self._digests = source, digests

    def fetch_version(self, version: str, folder: Path) -> tuple[Path, str]:
        """As `VersionSource` does.

        Raises
        ------
        DataError
            If the registry names another digest than the journal.
        """
        found, tagged = self._source.fetch_version(version, folder)
        _compare_digests(version, tagged, self._digests.get(version))
        return found, tagged


def fetch_slot(source: Tracking, version: str, place: Path) -> Slot:
    """Return a version's folder in ``place``: an earlier download if it is whole, else a new one.

    The digest from the registry's tag is kept beside the model, so that a rollback needs no registry.

    Raises
    ------
    ServiceUnavailable
        If the registry cannot be reached.
    DataError
        If there is no such version, or its digest is another than the tag says.
    """
    folder = place / MODEL_DIR
    with contextlib.suppress(OSError, DataError):  # missing or damaged: download it
        return Slot(version, str(folder), check_digest(folder, (place / DIGEST_FILE).read_text(encoding="ascii")))
    with replace_folder(place) as partial:
        found, tagged = source.fetch_version(version, partial / "download")
        check_digest(found, tagged)
        found.rename(partial / MODEL_DIR)
        shutil.rmtree(partial / "download", ignore_errors=True)
        (partial / DIGEST_FILE).write_text(tagged, encoding="ascii")
    return Slot(version, str(folder), tagged)


def require_digest(slot: Slot, digest: str | None) -> Slot:
    """Return the slot if its digest is the one in the journal's release entry; None: the entry has no digest.

    Raises
    ------
    DataError
        If the digests differ. The download is deleted, so that a repaired registry is asked again.
    """
    try:
        _compare_digests(slot.version, slot.folder_sha256, digest)
    except DataError:
        shutil.rmtree(Path(slot.folder).parent, ignore_errors=True)
        raise
    return slot


def _compare_digests(version: str, tagged: str, journaled: str | None) -> None:
    if journaled is not None and tagged != journaled:
        raise DataError(
            f"version {version}: the registry names the digest {tagged[:12]}, the journal released it with "
            f"{journaled[:12]}: the registered model was changed since"
        )


class Downloads:
    """Fetches each version in a thread of its own, so that one whose connection stalls holds up no other."""

    def __init__(self, source: Tracking, folder: Path) -> None:
        self._source, self._folder = source, folder
        self._begun: dict[str, Future[Slot]] = {}

    def fetch(self, version: str, is_wanted: Callable[[], bool]) -> Slot | None:
        """Return or raise what `fetch_slot` does; return None once the version is no longer wanted.

        The download then goes on in its thread; a later call for the same version waits for it.
        """
        found = self._begun.get(version)
        if found is None or found.done():
            found = self._begun[version] = Future()
            # not an executor, which would wait for its threads when the process ends
            threading.Thread(target=self._run, args=(version, found), name=f"fetch-{version}", daemon=True).start()
        while not wait([found], WANTED_SECONDS).done:
            if not is_wanted():
                return None
        return found.result()

    def _run(self, version: str, found: Future[Slot]) -> None:
        try:
            found.set_result(fetch_slot(self._source, version, self._folder / version))
        except BaseException as error:  # the waiting thread raises it
            found.set_exception(error)


def fetch_contract(source: VersionSource, version: str) -> ModelContract:
    """Fetch only the contract of a version.

    Raises
    ------
    ServiceUnavailable
        If the registry cannot be reached.
    DataError
        If there is no such version, or its digest is another than the tag says.
    """
    with tempfile.TemporaryDirectory(prefix="closedloop-contract-") as folder:
        found, tagged = source.fetch_version(version, Path(folder))
        check_digest(found, tagged)
        return read_contract(found)


def prune_downloads(folder: Path, used: Collection[Slot]) -> None:
    """Delete all downloads in ``folder`` except those in use and the last few that were in use."""
    places = list(folder.glob("[!.]*"))
    for place in places:
        if any(Path(slot.folder).is_relative_to(place) for slot in used):
            os.utime(place)
    for place in sorted(places, key=lambda one: one.stat().st_mtime_ns)[:-KEPT]:
        shutil.rmtree(place, ignore_errors=True)
