"""Model folders that were downloaded: a version that is asked for again needs no registry."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Protocol

from closedloop.contract import ModelContract, check_digest, read_contract
from closedloop.errors import DataError
from closedloop.files import replace_folder
from closedloop.serving.slots import Slot

MODEL_DIR, DIGEST_FILE = "model", "sha256"
KEPT = 5  # what a rollback may ask for; a model takes megabytes
WANTED_SECONDS = 0.5  # until who waits for a download looks whether the version is still wanted


class VersionSource(Protocol):
    """Where versions come from."""

    def fetch_version(self, version: str, folder: Path) -> tuple[Path, str]:
        """Download a version's folder into ``folder``; returns where it is, and the digest that its tag says."""


def fetch_slot(source: VersionSource, version: str, place: Path) -> Slot:
    """A version's folder in ``place``: what was downloaded before, if it is whole, else a download.

    The digest that the registry's tag said is kept beside the model, so that a rollback needs no registry.

    Raises
    ------
    ServiceUnavailable
        If the registry cannot be reached.
    DataError
        If there is no such version, or its digest is another than the tag says.
    """
    folder = place / MODEL_DIR
    with contextlib.suppress(OSError, DataError):  # nothing there, or damaged: it is downloaded
        return Slot(version, str(folder), check_digest(folder, (place / DIGEST_FILE).read_text(encoding="ascii")))
    with replace_folder(place) as partial:
        found, tagged = source.fetch_version(version, partial / "download")
        check_digest(found, tagged)
        found.rename(partial / MODEL_DIR)
        shutil.rmtree(partial / "download", ignore_errors=True)
        (partial / DIGEST_FILE).write_text(tagged, encoding="ascii")
    return Slot(version, str(folder), tagged)


class Downloads:
    """Fetches each version in a thread of its own, so that one whose connection stalls holds up no other."""

    def __init__(self, source: VersionSource, folder: Path) -> None:
        self._source, self._folder = source, folder
        self._begun: dict[str, Future[Slot]] = {}

    def fetch(self, version: str, is_wanted: Callable[[], bool]) -> Slot | None:
        """What `fetch_slot` returns or raises, or None once the version is not wanted any more.

        Its download goes on then: it can only be waited for, by who wants the version again.
        """
        found = self._begun.get(version)
        if found is None or found.done():
            found = self._begun[version] = Future()
            # no executor: that would wait for its threads when the process ends
            threading.Thread(target=self._run, args=(version, found), name=f"fetch-{version}", daemon=True).start()
        while not wait([found], WANTED_SECONDS).done:
            if not is_wanted():
                return None
        return found.result()

    def _run(self, version: str, found: Future[Slot]) -> None:
        try:
            found.set_result(fetch_slot(self._source, version, self._folder / version))
        except BaseException as error:  # for who waits
            found.set_exception(error)


def fetch_contract(source: VersionSource, version: str) -> ModelContract:
    """The contract of a version alone.

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
    """Delete all places in ``folder`` but those in use and the last few that were."""
    places = list(folder.glob("[!.]*"))
    for place in places:
        if any(Path(slot.folder).is_relative_to(place) for slot in used):
            os.utime(place)
    for place in sorted(places, key=lambda one: one.stat().st_mtime_ns)[:-KEPT]:
        shutil.rmtree(place, ignore_errors=True)
