"""The model that is released, for what runs beside the service: batch, stream and edge."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from closedloop.errors import ConfigError
from closedloop.serving.slots.downloads import fetch_slot, require_digest
from closedloop.serving.slots.slots import Slot, read_slots

if TYPE_CHECKING:
    from closedloop.adapters.mlflow import Tracking
    from closedloop.store.journal import Journal


@contextmanager
def open_champion(state_dir: Path, model_name: str, journal: Journal, registry: Tracking) -> Iterator[Slot]:
    """The champion's folder, for the length of the block: the service's own where one runs here, else a download.

    Raises
    ------
    ConfigError
        If nothing is released.
    DataError
        If the registry's digest is another than the folder's, or than the journal's.
    ServiceUnavailable
        If store or registry cannot be reached.
    """
    row = journal.read_deployment(model_name)
    if row is None:
        raise ConfigError(
            f"no version of {model_name} is released: 'closedloop run' makes a first one, and "
            "'closedloop release promote VERSION' releases one that is registered"
        )
    slots = read_slots(state_dir)
    champion = slots.champion if slots is not None else None
    digest = row.digests.get(row.champion_version)
    is_here = champion is not None and champion.version == row.champion_version
    if champion is not None and is_here and digest in (None, champion.folder_sha256) and Path(champion.folder).is_dir():
        yield champion
        return
    with tempfile.TemporaryDirectory(prefix="closedloop-champion-") as folder:
        slot = fetch_slot(registry, row.champion_version, Path(folder) / row.champion_version)
        yield require_digest(slot, digest)
