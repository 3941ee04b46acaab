"""Whole files or none: write beside, then rename."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from closedloop.errors import DataError

logger = logging.getLogger(__name__)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; it takes the place of ``path`` only when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside ``path`` to fill; it takes the place of ``path`` only when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(f".{path.name}.*.partial"):
        shutil.rmtree(left_over, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    before = beside.with_suffix(".before.partial")
    beside.chmod(0o755)
    try:
        yield beside
        if path.exists():
            # moved away whole: a process that is killed while it deletes must not leave half of the old folder
            path.replace(before)
        beside.replace(path)
    finally:
        for left_over in (beside, before):
            shutil.rmtree(left_over, ignore_errors=True)


@contextmanager
def hold_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; the system lets go of it if this process dies. Without ``wait`` False: another one holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold a lock file; whoever has to wait for it says so."""
    with hold_lock(path, wait=False) as held:
        if held:
            yield
            return
    logger.warning("another process holds %s: waiting for its end", path)
    with hold_lock(path):
        yield


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file whole or not at all; a ``private`` one can be read by this user alone, from the beginning."""
    with replace_file(path) as beside:
        if private:
            beside.touch()
            beside.chmod(0o600)
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, indented and with a final newline; a number that is not finite is refused."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, default=str) + "\n")


def read_json(path: Path, *, made_by: str) -> Any:
    """Read JSON that another stage wrote.

    Raises
    ------
    DataError
        If it is missing or damaged; the message says which stage makes it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); '{made_by}' writes it") from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); run '{made_by}' again") from error
