"""MLflow's store as a SQLite file: create it whole, and update its artifact paths when its folder was moved."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

from closedloop.files import SQLITE, locate_sqlite

logger = logging.getLogger(__name__)
# The tables and columns with absolute artifact paths; MLflow finds artifacts only by these.
PLACES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
WAIT_SECONDS = 60


def create_store(path: Path, artifacts: str) -> None:
    """Make a store's tables in a file beside ``path``, and rename the finished file to ``path``.

    MLflow makes the tables in dozens of steps without a common transaction. It would refuse for good the file of a
    process that was killed between two steps.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        SqlAlchemyStore(locate_sqlite(f"{SQLITE}{beside.name}", path.parent), artifacts).engine.dispose()
        with contextlib.suppress(FileExistsError):  # another process was quicker: keep its file
            path.hardlink_to(beside)
    finally:
        beside.unlink(missing_ok=True)


def follow_artifacts(path: Path, experiment: str, artifacts: str) -> None:
    """Update the artifact paths in a store that was moved or copied with its project.

    If only the setting of the artifacts' folder changed, the artifacts were not moved, and their paths stay.

    Parameters
    ----------
    path
        The store's file.
    experiment
        The experiment whose artifact paths are updated.
    artifacts
        The folder of all experiments' artifacts, as a URL.
    """
    place = f"{artifacts.rstrip('/')}/{experiment}"
    if urlsplit(place).scheme != "file":
        return
    with contextlib.closing(sqlite3.connect(path, timeout=WAIT_SECONDS)) as store, store:
        found = store.execute("SELECT artifact_location FROM experiments WHERE name = ?", (experiment,)).fetchone()
        before = found[0] if found else place
        if before == place or not Path(unquote(urlsplit(place).path)).is_dir():
            return
        logger.warning("the project was moved: artifacts of %s are now in %s", before, place)
        for table, column in PLACES.items():
            store.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608 - our own names
                f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (place, len(before) + 1, before, len(before) + 1, f"{before}/"),
            )
