"""How far the drain is, and how fast: a file beside the spools, which the agent writes and the workers read."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from closedloop.files import replace_file
from closedloop.serving.log.segments import list_segments, list_spools

PROGRESS_FILE = "drain.json"
# A small batch takes the store nearly as long as a larger one: by its bytes alone, a fast store would look slow.
BATCH_BYTES_MIN = 50_000


class Unanswered(msgspec.Struct):
    """A batch whose commit was not answered: it ends at ``offset``, and ``counts`` are its lines by result."""

    spool: str
    segment: int
    offset: int
    counts: dict[str, int]


class DrainProgress(msgspec.Struct):
    """The drain's positions and rate.

    ``positions`` is {spool: (segment, offset in bytes)}; ``bytes_per_second`` is the store's rate for the newest batch,
    None before the first. ``batch_started`` is when the batch under way began, on the clock of `time.monotonic`, which
    the processes of a machine share; None between batches. ``unanswered`` is None but after a failed batch.
    """

    positions: dict[str, tuple[int, int]] = {}
    bytes_per_second: float | None = None
    batch_bytes: int = 0
    batch_started: float | None = None
    unanswered: Unanswered | None = None

    @contextmanager
    def measure_batch(self, root: Path, size: int) -> Iterator[None]:
        """Measure the rate by the batch that the block stores, and write what is known before and after it."""
        self.batch_bytes, self.batch_started = max(size, BATCH_BYTES_MIN), time.monotonic()
        self.write(root)
        try:
            yield
            self.bytes_per_second = self.batch_bytes / max(time.monotonic() - self.batch_started, 1e-3)
        finally:
            self.batch_started = None

    def estimate_rate(self, now: float) -> float | None:
        """Bytes that the store takes a second: no more than the batch under way shows, if that takes longer.

        While the store cannot be reached there is no batch, and the last rate stands.

        >>> DrainProgress(bytes_per_second=1e6).estimate_rate(now=5.0)
        1000000.0
        >>> DrainProgress(bytes_per_second=1e6, batch_bytes=300_000, batch_started=2.0).estimate_rate(now=5.0)
        100000.0
        """
        if self.batch_started is None:
            return self.bytes_per_second
        under_way = self.batch_bytes / max(now - self.batch_started, 1e-3)
        return under_way if self.bytes_per_second is None else min(self.bytes_per_second, under_way)

    def write(self, root: Path) -> None:
        """Tell the workers. On a full disk they go by what they know: the drain must go on, since it makes room."""
        with contextlib.suppress(OSError), replace_file(root / PROGRESS_FILE) as beside:
            beside.write_bytes(msgspec.json.encode(self))


def read_progress(root: Path) -> DrainProgress:
    """The progress that the drain of these spools wrote last; empty where it has not run yet."""
    try:
        return msgspec.json.decode((root / PROGRESS_FILE).read_bytes(), type=DrainProgress)
    except (OSError, msgspec.MsgspecError):  # another release may have written another form
        return DrainProgress()


def measure_waiting(root: Path, progress: DrainProgress) -> int:
    """Bytes in all spools that the drain has not stored."""
    waiting = 0
    for spool in list_spools(root):
        for segment in list_segments(spool):
            with contextlib.suppress(FileNotFoundError):  # drained meanwhile
                waiting += max(0, segment.stat().st_size - find_offset(segment, progress))
    return waiting


def count_waiting(root: Path, progress: DrainProgress) -> int:
    """Lines in all spools that the drain has not stored."""
    lines = 0
    for spool in list_spools(root):
        for segment in list_segments(spool):
            with contextlib.suppress(FileNotFoundError):
                if (offset := find_offset(segment, progress)) < segment.stat().st_size:
                    with segment.open("rb") as stream:
                        stream.seek(offset)
                        lines += sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
    return lines


def find_offset(segment: Path, progress: DrainProgress) -> int:
    """How far a segment has been read, in bytes; beyond its end where it is left over from an earlier pass."""
    position = progress.positions.get(segment.parent.name)
    number = int(segment.stem)
    if position is None or number > position[0]:
        return 0
    return position[1] if number == position[0] else sys.maxsize
