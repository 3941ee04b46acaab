"""Write files and folders whole or not at all: write beside the target, then rename."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from closedloop.errors import DataError

logger = logging.getLogger(__name__)
SQLITE = "sqlite:///"
VARIABLE_PATTERN = r"[A-Za-z_][A-Za-z0-9_]*"  # of the environment
FILE_ENDING = re.compile(r"\.(csv|parquet|xls[xm])(\.\w+)?$", re.IGNORECASE)


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
            # rename before deleting: a process killed while it deletes must not leave half of the old folder
            path.replace(before)
        beside.replace(path)
    finally:
        for left_over in (beside, before):
            shutil.rmtree(left_over, ignore_errors=True)


def keep_file(path: Path, target: Path) -> None:
    """Let ``target`` be what ``path`` is: by a link, where there are links, since no file is written in place."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)


@contextmanager
def hold_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file, which the system frees if this process dies; with ``wait=False`` yield False if it is taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(path, wait=wait)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        os.close(lock)


def take_lock(path: Path, *, wait: bool = False) -> int:
    """Lock a file, made if it is missing, for as long as the returned descriptor stays open.

    The kernel releases the lock when the process ends, however it ends.

    Raises
    ------
    BlockingIOError
        If another process holds it and ``wait`` is false.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock on a file."""
    try:
        os.close(take_lock(path))
    except BlockingIOError:
        return True
    return False


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold a lock file; log a warning if this process has to wait for it."""
    with hold_lock(path, wait=False) as held:
        if held:
            yield
            return
    logger.warning("another process holds %s: waiting for its end", path)
    with hold_lock(path):
        yield


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file whole or not at all; only this user can ever read a ``private`` one."""
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


def names_table(text: str) -> bool:
    """Whether it is a database's table, VARIABLE#TABLE or ADDRESS#TABLE; a file may have # in its name.

    >>> names_table("SHOP#public.orders"), names_table("sqlite:///a.db#b")
    (True, True)
    >>> names_table("Kunden #3.xlsx"), names_table("a#1.csv")
    (False, False)
    """
    address, sign, _ = text.rpartition("#")
    is_address = "://" in address or re.fullmatch(VARIABLE_PATTERN, address) is not None
    return bool(sign) and is_address and FILE_ENDING.search(text) is None


def locate_sqlite(address: str, folder: Path) -> str:
    """A SQLite address whose relative file is made absolute; any other address is returned as it is.

    An address is a URL, which SQLAlchemy decodes: a folder called ``a%2Fb`` must stand there as ``a%252Fb``. Nothing
    else is encoded, since MLflow makes the file's folder without decoding: ``my%20project`` beside ``my project``.
    """
    if not address.startswith(SQLITE) or address.startswith(f"{SQLITE}/"):
        return address
    file, *query = address.removeprefix(SQLITE).split("?", 1)
    path = str((folder / unquote(file)).resolve()).replace("%", "%25").replace("?", "%3F")
    return "?".join([f"{SQLITE}{path}", *query])


def find_sqlite_file(address: str) -> Path | None:
    """The file of an absolute SQLite address; None for an address of another kind, or with options."""
    if not address.startswith(SQLITE) or "?" in address:
        return None
    return Path(unquote(address.removeprefix(SQLITE)))
