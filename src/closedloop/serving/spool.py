"""The prediction spool: append-only files, one folder a worker, that hold every answered prediction until it is stored.

A line is eight hexadecimal digits of CRC-32, a space, the record as JSON and a newline. What ``append`` took is in
the kernel when it returns, so it survives the death of the process; ``sync`` makes it survive a power cut as well.
The writer holds a lock on its folder for as long as it lives: that is how the drain knows a dead one.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import msgspec

from closedloop.errors import ServiceUnavailable
from closedloop.records import Record

LOCK_FILE = "writer.lock"
WAITING_PREFIX = "waiting-"  # of the files of outcomes whose prediction is not in the store yet
CHECK_EVERY_SECONDS = 1.0
CHECKSUM_LENGTH = 8

logger = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Record).decode


class SpoolWriter:
    """The one writer of a spool folder, for one thread that appends and at most one that syncs.

    Parameters
    ----------
    folder
        Made here. Its name must never have been used before (host, process and something random): the store
        remembers by it how far a spool has been read.
    segment_bytes
        A new file is begun once the current one has this size.
    disk_free_bytes_min
        Records are refused while the file system has less room than this.
    bytes_max
        And while more than this waits in the spools beside and in this one, but for the file that is written to: of a
        pod's volume the file system tells the node's room, and a pod that takes too much is evicted with it.
    fsync_before_answer
        Whether ``append`` waits for the disk too.

    Raises
    ------
    ServiceUnavailable
        If the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        segment_bytes: int,
        *,
        disk_free_bytes_min: int = 0,
        bytes_max: int | None = None,
        fsync_before_answer: bool = False,
    ) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._free_bytes_min, self._bytes_max = disk_free_bytes_min, bytes_max
        self._fsync_before_answer = fsync_before_answer
        self._segment, self._file, self._size = 0, -1, 0
        self._unsynced: set[int] = set()
        self._left_behind: list[int] = []  # files that are complete, to be synced and closed
        self._refusal, self._check_at = "", 0.0
        self._lock, self._sync_lock = threading.Lock(), threading.Lock()
        self._stopping = threading.Event()
        self._syncing: threading.Thread | None = None
        try:
            self._living = _make_folder(folder)
            self._directory = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise ServiceUnavailable(f"{folder}: the spool cannot be made ({error.strerror})") from error

    def append(self, records: Sequence[Record]) -> None:
        """Hand records to the kernel in one write: all of them, or none and an error.

        Raises
        ------
        ServiceUnavailable
            If the disk is full or broken; tried again after a second at the earliest.
        """
        now = time.monotonic()
        if now >= self._check_at:
            self._check_room(now)
        if self._refusal:
            raise ServiceUnavailable(self._refusal)
        bodies = [_encode(record) for record in records]
        lines = b"".join([b"%08x %b\n" % (crc32(body), body) for body in bodies])
        try:
            with self._lock:
                self._write(lines)
        except OSError as error:
            raise ServiceUnavailable(self._refuse(f"predictions cannot be logged ({error.strerror})")) from error
        if self._fsync_before_answer:
            self.sync()

    def sync(self) -> None:
        """Wait until the disk has all that was appended before.

        Raises
        ------
        ServiceUnavailable
            If it did not take it, which is said once: the kernel forgets what it could not write, and a second fsync
            would succeed. What was appended stays with the kernel, for the drain, but is no safer from a power cut.
        """
        with self._sync_lock:
            with self._lock:
                complete, self._left_behind = self._left_behind, []
                unsynced, self._unsynced = self._unsynced, set()
            problem: OSError | None = None
            for file in unsynced:
                try:
                    os.fsync(file)
                except OSError as error:
                    problem = error
            for file in complete:
                os.close(file)
            if problem is not None:
                with self._lock:
                    if self._file >= 0:  # what comes now must not stand behind a hole
                        self._leave_segment()
                message = self._refuse(f"predictions may not have reached the disk ({problem.strerror})")
                raise ServiceUnavailable(message) from problem

    def start_syncing(self, every_ms: int) -> None:
        """Call ``sync`` from a thread of its own until the writer is closed."""
        self._syncing = threading.Thread(
            target=self._keep_syncing, args=(every_ms / 1000,), name="spool-sync", daemon=True
        )
        self._syncing.start()

    def close(self) -> None:
        """Sync, and let go of the folder: the drain may remove it once it is empty."""
        self._refusal, self._check_at = "prediction log: it is closed", float("inf")
        self._stopping.set()
        if self._syncing is not None:
            self._syncing.join()
        if self._file >= 0:
            self._leave_segment()
        try:
            self.sync()
        finally:
            os.close(self._directory)
            os.close(self._living)

    def _write(self, lines: bytes) -> None:
        if self._file < 0 or self._size >= self._segment_bytes:
            self._open_segment()
        left = memoryview(lines)
        try:
            while left:  # a write may be short; os.write itself starts again after a signal
                left = left[os.write(self._file, left) :]
        except BaseException:  # a signal handler that raises leaves a torn line behind just as a full disk does
            # The drain may have read whole lines of what is cut off here: nothing else may ever stand in their place.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            self._leave_segment()
            raise
        self._size += len(lines)
        self._unsynced.add(self._file)

    def _open_segment(self) -> None:
        path = self._folder / f"{self._segment + 1:08d}.log"
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o640)
        if self._file >= 0:
            self._leave_segment()
        self._segment, self._file, self._size = self._segment + 1, file, 0
        self._unsynced.add(self._directory)  # a file's name is not on the disk before its folder is

    def _leave_segment(self) -> None:
        self._left_behind.append(self._file)
        self._file = -1

    def _check_room(self, now: float) -> None:
        self._check_at = now + CHECK_EVERY_SECONDS
        try:
            found = os.statvfs(self._folder)
            waiting = 0 if self._bytes_max is None else self._measure_waiting()
        except OSError as error:
            self._refuse(f"the spool cannot be reached ({error.strerror})")
            return
        free = found.f_bavail * found.f_frsize
        if free < self._free_bytes_min:
            self._refuse(f"{free} bytes are free on its disk, {self._free_bytes_min} are required")
        elif self._bytes_max is not None and waiting > self._bytes_max:
            self._refuse(f"{waiting} bytes wait for the operations store, {self._bytes_max} may")
        else:
            self._refusal = ""

    def _measure_waiting(self) -> int:
        # drained files are removed, but for the one at hand, which would so keep a small limit reached for ever
        own = self._size if self._file >= 0 else 0
        return measure_spools(self._folder.parent) - own

    def _refuse(self, reason: str) -> str:
        if not self._refusal:  # the answers that say it name no path
            logger.error("%s: %s", self._folder, reason)
        self._check_at = time.monotonic() + CHECK_EVERY_SECONDS
        self._refusal = f"prediction log: {reason}"
        return self._refusal

    def _keep_syncing(self, every_seconds: float) -> None:
        while not self._stopping.wait(every_seconds):
            try:
                self.sync()
            except ServiceUnavailable as error:
                logger.error("%s", error)


def _make_folder(folder: Path) -> int:
    """Make a spool folder that appears with its lock held, else the drain might take it for a dead writer's."""
    beside = folder.with_name(f".{folder.name}")
    beside.mkdir(parents=True, exist_ok=True)
    lock = take_lock(beside / LOCK_FILE)
    try:
        beside.rename(folder)
    except OSError:
        os.close(lock)
        raise
    return lock


class SpoolLine(NamedTuple):
    """A line and where it stands in its segment, in bytes; ``problem`` says why ``record`` is None."""

    start: int
    content: bytes
    record: Record | None
    problem: str = ""

    @property
    def end(self) -> int:
        """Where the next line starts."""
        return self.start + len(self.content)

    @property
    def torn(self) -> bool:
        """Whether its end is not there: not yet, or never, if its writer is dead."""
        return not self.content.endswith(b"\n")


def read_lines(segment: Path, offset: int = 0) -> Iterator[SpoolLine]:
    """The lines of a segment from a position on; only the last one can be torn."""
    with segment.open("rb") as stream:
        stream.seek(offset)
        for content in stream:
            yield SpoolLine(offset, content, *_read_line(content))
            offset += len(content)


def _read_line(content: bytes) -> tuple[Record | None, str]:
    checksum, body = content[: CHECKSUM_LENGTH + 1], content[CHECKSUM_LENGTH + 1 : -1]
    if not content.endswith(b"\n"):
        return None, "the line is torn"
    if checksum != b"%08x " % crc32(body):
        return None, "the checksum is wrong"
    try:
        return _decode(body), ""
    except msgspec.MsgspecError as error:
        return None, f"not a record of this release: {error}"


def list_spools(root: Path) -> list[Path]:
    """The folders of all writers, living and dead, by name."""
    return sorted(path for path in root.glob("[!.]*") if path.is_dir())


def list_segments(spool: Path) -> list[Path]:
    """The files of a spool, oldest first; only the last one of a living writer can still grow."""
    return sorted(spool.glob("[0-9]*.log"))


def has_lines(root: Path) -> bool:
    """Whether a spool has a line that may not be in the store, or an outcome waits beside the spools."""
    return measure_spools(root) > 0 or any(root.glob(f"{WAITING_PREFIX}*.log"))


def measure_spools(root: Path) -> int:
    """Bytes in the files of all spools."""
    total = 0
    for spool in list_spools(root):
        for segment in list_segments(spool):
            with contextlib.suppress(FileNotFoundError):  # drained meanwhile
                total += segment.stat().st_size
    return total


def take_lock(path: Path, *, wait: bool = False) -> int:
    """Lock a file, made if it is missing, for as long as the descriptor that is returned stays open.

    The kernel takes the lock back when the process ends, however it ends.

    Raises
    ------
    BlockingIOError
        If another holds it, and it is not to be waited for.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def is_locked(path: Path) -> bool:
    """Whether somebody who lives holds the lock on a file."""
    try:
        os.close(take_lock(path))
    except BlockingIOError:
        return True
    return False
