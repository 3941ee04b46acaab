"""The model that is released, for what runs beside the service: batch, stream and edge."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from closedloop.contract import check_digest
from closedloop.errors import ConfigError
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
    if slots is not None and slots.champion.version == row.champion_version and Path(slots.champion.folder).is_dir():
        yield slots.champion
        return
    with tempfile.TemporaryDirectory(prefix="closedloop-champion-") as folder:
        found, tagged = registry.fetch_version(row.champion_version, Path(folder))
        check_digest(found, tagged)
        yield Slot(row.champion_version, str(found), tagged)
