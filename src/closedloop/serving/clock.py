"""The service's clock: the wall's, or one that a replay moves through a file."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from closedloop.files import write_text


class Clock:
    """Time that goes on at its own pace, from wherever the file sets it.

    The file holds the seconds by which this clock is off the wall's; it is looked at with every call, so that a clock
    that was set holds from the next request on, in every process.

    Parameters
    ----------
    path
        None: the wall's clock.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._seen, self._offset = path, 0, dt.timedelta()

    def __call__(self) -> dt.datetime:
        """The moment (UTC)."""
        if self._path is not None and (seen := self._path.stat().st_mtime_ns) != self._seen:
            self._offset = dt.timedelta(seconds=float(self._path.read_text(encoding="utf-8")))
            self._seen = seen
        return dt.datetime.now(dt.UTC) + self._offset

    def set(self, moment: dt.datetime) -> None:
        """Let it be ``moment`` now, here and wherever the file is followed."""
        assert self._path is not None  # noqa: S101 - the wall's clock is not set
        write_text(self._path, f"{(moment - dt.datetime.now(dt.UTC)).total_seconds()!r}\n")


WALL_CLOCK = Clock()
