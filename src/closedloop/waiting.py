"""A line on the terminal while something takes long: a moving clock with the usual time, or a bar that counts."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

TICK_SECONDS, SHOWN_AFTER_SECONDS = 0.5, 2.0
CLEAR = "\r\x1b[K"


class ClockLine:
    """A line on a terminal that gives way to whatever else is written there.

    Parameters
    ----------
    terminal
        Where the line is shown.
    """

    def __init__(self, terminal: TextIO) -> None:
        self._terminal, self._lock = terminal, threading.RLock()
        self._is_shown = self._is_line_open = False

    def show(self, text: str) -> None:
        """Show a line, unless another display, such as a progress bar, has left its own line open."""
        with self._lock:
            if not self._is_line_open:
                self._terminal.write(f"{CLEAR}{text}")
                self._terminal.flush()
                self._is_shown = True

    def clear(self) -> None:
        """Take the line away."""
        with self._lock:
            if self._is_shown:
                self._terminal.write(CLEAR)
                self._terminal.flush()
            self._is_shown = False

    def write(self, stream: TextIO, text: str) -> int:
        """Write the text of another part of the program in place of the line."""
        with self._lock:
            self.clear()
            if text:
                self._is_line_open = not text.endswith("\n")
            return stream.write(text)


class _Guarded:
    """A stream whose writers take the clock's line away first."""

    def __init__(self, stream: TextIO, clock: ClockLine) -> None:
        self._stream, self._clock = stream, clock

    def write(self, text: str) -> int:
        return self._clock.write(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def show_clock(title: str, usual_seconds: float | None = None) -> Iterator[None]:
    """Show a clock beside ``title`` on standard error for the length of the block, once it takes over two seconds.

    Nothing is shown where standard error is no terminal.
    """
    if not sys.stderr.isatty():
        yield
        return
    streams, clock = (sys.stdout, sys.stderr), ClockLine(sys.stderr)
    ended, began = threading.Event(), time.monotonic()

    def tick() -> None:
        while not ended.wait(TICK_SECONDS):
            seconds = time.monotonic() - began
            if seconds >= SHOWN_AFTER_SECONDS:
                clock.show(f"{title:>12}  {describe(seconds, usual_seconds)}")

    thread = threading.Thread(target=tick, name="clock", daemon=True)
    sys.stdout, sys.stderr = (_Guarded(stream, clock) for stream in streams)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        clock.clear()
        sys.stdout, sys.stderr = streams


def build_bar(console: Console) -> Progress:
    """A progress bar that counts, with the time so far and the time left; it goes away at its end."""
    from rich import progress

    counts = progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn()
    times = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
    return progress.Progress(*counts, *times, console=console, transient=True)


def describe(seconds: float, usual_seconds: float | None = None) -> str:
    """Seconds so far, and how many are usual.

    Examples
    --------
    >>> describe(75), describe(5, 42)
    ('1:15', '0:05 of about 0:42')
    """
    shown = f"{int(seconds) // 60}:{int(seconds) % 60:02}"
    return shown if usual_seconds is None else f"{shown} of about {describe(usual_seconds)}"


def read_usual(path: Path, name: str, otherwise: float | None) -> float | None:
    """How long ``name`` took when it was last noted in a file of durations."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))[name])
    except (OSError, ValueError, KeyError, TypeError):
        return otherwise


def note_usual(path: Path, name: str, seconds: float) -> None:
    """Note how long ``name`` took; an estimate is not worth a failure."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps(known | {name: round(seconds, 1)}), encoding="utf-8")
