"""The model that is released, for what runs beside the service: batch, stream and edge."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from closedloop.errors import ConfigError
from closedloop.serving.downloads import fetch_slot
from closedloop.serving.slots import Slot, read_slots

if TYPE_CHECKING:
    from closedloop.adapters.mlflow import Tracking
    from closedloop.adapters.store import Store


@contextmanager
def open_champion(state_dir: Path, model_name: str, store: Store, registry: Tracking) -> Iterator[Slot]:
    """The champion's folder, for the length of the block: the service's own where one runs here, else a download.

    Raises
    ------
    ConfigError
        If nothing is released.
    DataError
        If the registry's digest is another.
    ServiceUnavailable
        If store or registry cannot be reached.
    """
    row = store.read_deployment(model_name)
    if row is None:
        raise ConfigError(
            f"no version of {model_name} is released; give --model FOLDER, or release one ('closedloop register')"
        )
    slots = read_slots(state_dir)
    champion = slots.champion if slots is not None else None
    if champion is not None and champion.version == row.champion_version and Path(champion.folder).is_dir():
        yield champion
        return
    with tempfile.TemporaryDirectory(prefix="closedloop-champion-") as folder:
        yield fetch_slot(registry, row.champion_version, Path(folder) / row.champion_version)
