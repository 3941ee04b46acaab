"""The prediction spool: append-only files, one folder a worker, that hold every answered prediction until it is stored.

A line is eight hexadecimal digits of CRC-32, a space, the record as JSON and a newline. When ``append`` returns, its
records are in the kernel and survive the death of the process; after ``sync`` they survive a power cut as well.
The writer holds a lock on its folder while it lives, so the drain can tell the folder of a dead writer.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import msgspec

from closedloop.errors import ServiceUnavailable
from closedloop.files import take_lock
from closedloop.records import Record
from closedloop.serving.log.progress import measure_waiting, read_progress

LOCK_FILE = "writer.lock"
CHECK_EVERY_SECONDS = 1.0

logger = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


class SpoolWriter:
    """The one writer of a spool folder, for one thread that appends and at most one that syncs.

    Parameters
    ----------
    folder
        The writer makes this folder. Its name must never have been used before (host, process and a random part): the
        store keeps its reading position under this name.
    segment_bytes
        The writer begins a new file once the current one has this size.
    disk_free_bytes_min
        The writer refuses records while the file system has less free space than this.
    bytes_max
        It also refuses them while this spool and its siblings hold more bytes than this for the operations store. The
        file system of a pod's volume shows the free space of the whole node, and the cluster evicts a pod that fills
        its volume.
    drain_seconds_max
        It also refuses them while the store would need longer than this for all waiting records, at the drain's present
        rate. If the spool is deleted with its pod, all answered predictions must be stored before the pod ends.
    fsync_before_answer
        Whether ``append`` also waits for the disk.

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
        drain_seconds_max: float | None = None,
        fsync_before_answer: bool = False,
    ) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._free_bytes_min, self._bytes_max = disk_free_bytes_min, bytes_max
        self._drain_seconds_max, self._room = drain_seconds_max, 0.0
        self._fsync_before_answer = fsync_before_answer
        self._segment, self._file, self._size = 0, -1, 0
        self._unsynced: set[int] = set()
        self._left_behind: list[int] = []  # complete files that are still to be synced and closed
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
            If the disk is full or broken, or too many records wait for the store. The writer looks again after a second
            at the earliest.
        """
        now = time.monotonic()
        if now >= self._check_at or (self._room < 0 and not self._refusal):
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
        """Wait until the disk has all records that were appended before.

        Raises
        ------
        ServiceUnavailable
            If the disk failed to write them. Only the first call raises: the kernel forgets a failed write, so that a
            second fsync would succeed. The drain can still read the records, but a power cut would lose them.
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
                    if self._file >= 0:  # begin a new file: later records must not follow a hole
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
        """Sync, and release the folder's lock: the drain may then remove the empty folder."""
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
            # The drain may already have read whole lines of the part that is cut off here, so no other record may ever
            # be written at their position.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            self._leave_segment()
            raise
        self._size += len(lines)
        self._room -= len(lines)
        self._unsynced.add(self._file)

    def _open_segment(self) -> None:
        path = self._folder / f"{self._segment + 1:08d}.log"
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o640)
        if self._file >= 0:
            self._leave_segment()
        self._segment, self._file, self._size = self._segment + 1, file, 0
        self._unsynced.add(self._directory)  # a new file's name reaches the disk only with an fsync of its folder

    def _leave_segment(self) -> None:
        self._left_behind.append(self._file)
        self._file = -1

    def _check_room(self, now: float) -> None:
        self._check_at = now + CHECK_EVERY_SECONDS
        try:
            found = os.statvfs(self._folder)
            problem = self._measure_room(now)
        except OSError as error:
            self._refuse(f"the spool cannot be reached ({error.strerror})")
            return
        free = found.f_bavail * found.f_frsize
        if free < self._free_bytes_min:
            problem = f"{free} bytes are free on its disk, {self._free_bytes_min} are required"
        if problem:
            self._refuse(problem)
        else:
            self._refusal = ""

    def _measure_room(self, now: float) -> str:
        """Measure how many bytes may be appended until the next measurement; return the reason if none may."""
        bytes_max, seconds_max = self._bytes_max, self._drain_seconds_max
        rooms = [(math.inf, "")]
        if bytes_max is not None or seconds_max is not None:
            progress = read_progress(self._folder.parent)
            waiting, rate = measure_waiting(self._folder.parent, progress), progress.estimate_rate(now)
            if bytes_max is not None:
                rooms.append(
                    (bytes_max - waiting, f"{waiting} bytes wait for the operations store, {bytes_max} are allowed")
                )
            if seconds_max is not None and rate:
                needed = f"the operations store needs about {waiting / rate:.0f} s for the waiting records"
                rooms.append((seconds_max * rate - waiting, f"{needed}, {seconds_max:g} s are allowed"))
        self._room, reason = min(rooms)
        return reason if self._room < 0 else ""

    def _refuse(self, reason: str) -> str:
        if not self._refusal:  # log the path here, since answers must not name it
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
    """Make a spool folder whose lock is held before it gets its name, lest the drain take it for a dead writer's."""
    beside = folder.with_name(f".{folder.name}")
    beside.mkdir(parents=True, exist_ok=True)
    lock = take_lock(beside / LOCK_FILE)
    try:
        beside.rename(folder)
    except OSError:
        os.close(lock)
        raise
    return lock
