"""Files that are divided by day, here or in object storage: which there are of a day, and whether they changed."""

from __future__ import annotations

import datetime as dt
import glob
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from closedloop.errors import DataError

DAY = "{day}"
REMOTE = "://"


def list_day_files(pattern: str) -> dict[dt.date, dict[str, str]]:
    """The files of each day: by path or address, what changes with their content (size and time, or what S3 says).

    ``pattern`` has ``{day}`` in place of a UTC day such as 2024-12-01, and may have ``*``.

    Raises
    ------
    DataError
        If it names no file.

    Examples
    --------
    >>> list_day_files("no such folder/{day}.csv")
    Traceback (most recent call last):
    closedloop.errors.DataError: data.source 'no such folder/{day}.csv': no file of any day
    """
    everything = pattern.replace(DAY, "*")
    found: dict[dt.date, dict[str, str]] = {}
    if REMOTE in pattern:
        from closedloop.adapters.fsspec import list_files

        keys = list_files(everything)
    else:
        everything = str(Path(everything).expanduser())
        paths = [Path(path) for path in glob.glob(everything)]  # noqa: PTH207  the pattern may be absolute
        keys = {str(path): f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths if path.is_file()}
        pattern = str(Path(pattern).expanduser())
    shape = re.escape(pattern).replace(r"\{day\}", r"(\d{4}-\d{2}-\d{2})", 1).replace(r"\{day\}", r"\1")
    for address, key in sorted(keys.items()):
        match = re.fullmatch(shape.replace(r"\*", "[^/]*"), address)
        if match and (day := _read_day(match[1])):
            found.setdefault(day, {})[address] = key
    if not found:
        raise DataError(f"data.source {pattern!r}: no file of any day")
    return dict(sorted(found.items()))


@contextmanager
def fetch_day(pattern: str, day: dt.date, addresses: Iterable[str]) -> Iterator[str]:
    """The path by which the files of a day are read; those in object storage lie in a temporary folder meanwhile."""
    if REMOTE not in pattern:
        yield pattern.replace(DAY, f"{day}")
        return
    from closedloop.adapters.fsspec import get_file

    with tempfile.TemporaryDirectory() as folder:
        for number, address in enumerate(addresses):
            target = Path(folder) / PurePosixPath(address).name
            # files of several folders may be called alike
            get_file(address, target.with_name(f"{number}-{target.name}") if target.exists() else target)
        yield folder


def _read_day(text: str) -> dt.date | None:
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        return None
