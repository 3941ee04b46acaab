"""Delete a customer's published features in all data sets, and the working files."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from closedloop.contract import JOIN_KEY
from closedloop.errors import DataError, ServiceUnavailable
from closedloop.tabular.tables import delete_rows

PUBLISHING_SECONDS_MAX = 3_600
WORKING_DIRS = ("state/refresh", "state/outcomes", "state/active")


def erase_published(offline_dir: Path, spellings: Sequence[str]) -> int | None:
    """Delete a customer's rows in the published files (project, definition, snapshot).

    ``spellings`` are how the customer's id may have been written.

    Returns
    -------
    int or None
        The number of deleted rows; None if this machine has no published file (another machine may have some).

    Raises
    ------
    ServiceUnavailable
        If a file or folder cannot be read or written, or a file is just being published.
    """
    try:
        paths = _list_published(offline_dir)
        count = sum(delete_rows(path, JOIN_KEY, spellings) for path in paths)
    except (OSError, DataError) as error:
        raise ServiceUnavailable(f"published features in {offline_dir}: {error}; run it again") from error
    return count if paths else None


def erase_working_files(root: Path) -> None:
    """Delete the working tables of all customers; `refresh`, `outcomes` and `campaign start` make them anew.

    Raises
    ------
    ServiceUnavailable
        If a file cannot be deleted.
    """
    for name in WORKING_DIRS:
        try:
            shutil.rmtree(root / name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ServiceUnavailable(f"working files in {root / name}: {error}; run it again") from error


def _list_published(offline_dir: Path) -> list[Path]:
    """List the published files; raise an error for an unreadable folder, which `Path.glob` would skip."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    if not offline_dir.exists():
        return []
    walk = os.walk(offline_dir, onerror=refuse, followlinks=True)
    found = [Path(folder, name) for folder, _, names in walk for name in names]
    for path in found:
        if path.match(".[0-9]*.parquet.*"):
            _delete_partial_file(path)
    return sorted(path for path in found if path.match("[0-9]*.parquet"))


def _delete_partial_file(path: Path) -> None:
    """Delete the partial file of a killed publication; a running one renames its file within the hour."""
    with contextlib.suppress(FileNotFoundError):
        if time.time() - path.stat().st_mtime < PUBLISHING_SECONDS_MAX:
            raise ServiceUnavailable(f"published features: {path} is or just was being written; run it again later")
        path.unlink()
