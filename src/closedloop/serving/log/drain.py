"""The drain: what the workers spooled goes to the store in batches, each record exactly once whatever dies when.

Beside the spools lies for 30 days what cannot be stored, in ``*.quarantine``: lines with their place and the reason.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from closedloop.errors import DataError, ServiceUnavailable, count_noun
from closedloop.files import hold_lock, is_locked
from closedloop.serving.log.progress import Unanswered, find_offset, read_progress
from closedloop.serving.log.segments import SpoolLine, list_segments, list_spools, read_lines
from closedloop.serving.log.spool import LOCK_FILE
from closedloop.store.predictions import SpoolPosition

if TYPE_CHECKING:
    from closedloop.store.predictions import InsertResult, Predictions

DRAIN_LOCK_FILE, QUARANTINE_SUFFIX = "drain.lock", ".quarantine"
QUARANTINE_SECONDS_MAX = 30 * 86_400

logger = logging.getLogger(__name__)


def drain_once(
    spool_root: Path,
    store: Predictions,
    model_name: str,
    batch_rows: int = 500,
    report: Callable[[Mapping[str, int]], None] = lambda _: None,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Store what all spools hold by now; returns the problems, for an operator.

    Parameters
    ----------
    report
        Called after each batch with its lines by result, as the metric ``prediction_rows_total`` counts them: of a
        pass that fails half-way they are known too. "refused" and "corrupt" ones are in quarantine; over a "torn" one
        its writer died before it answered.
    stopped
        Asked after each batch: True ends the pass, and the rest is for the next call.

    Raises
    ------
    ServiceUnavailable, ConfigError
        If the store cannot be used, or another process drains; what was stored stays, the rest is for the next call.
    """
    problems: list[str] = []
    with hold_lock(spool_root / DRAIN_LOCK_FILE, wait=False) as held:
        if not held:
            raise ServiceUnavailable(f"{spool_root}: another process drains it")
        drain = _Drain(spool_root, store, model_name, batch_rows)
        try:
            for spool in list_spools(spool_root):
                try:
                    for counts in drain.drain_spool(spool):
                        report(counts)
                        if stopped():
                            return problems
                except (OSError, DataError) as error:
                    problems.append(str(error))  # one bad spool must not hold up the others
            _prune_quarantine(spool_root)
        finally:
            drain.write_progress()
    return problems


class _Drain:
    """One pass; its methods yield the counts of each batch once that is stored."""

    def __init__(self, root: Path, store: Predictions, model_name: str, batch_rows: int) -> None:
        self._root, self._store, self._model_name, self._batch_rows = root, store, model_name, batch_rows
        self.progress = read_progress(root)
        self.progress.batch_started = None  # of a drain that was killed

    def write_progress(self) -> None:
        """Write the file that workers go by, if anything in it has changed."""
        names = {folder.name for folder in list_spools(self._root)}
        positions = self.progress.positions
        self.progress.positions = {name: positions[name] for name in sorted(names & positions.keys())}
        if self.progress != read_progress(self._root):
            self.progress.write(self._root)

    def drain_spool(self, folder: Path) -> Iterator[Counter[str]]:
        """Store a spool's lines, and remove the files that can no longer grow."""
        living = is_locked(folder / LOCK_FILE)  # asked before the files are listed: a dead one's last file is complete
        position = self._store.read_position(self._model_name, folder.name)
        self.progress.positions.pop(folder.name, None)  # a store that was restored may know less than it did
        if position is not None:
            self.progress.positions[folder.name] = position.segment, position.offset
        yield from self._count_unanswered(folder.name)
        segments = list_segments(folder)
        for path in segments:
            growing = living and path == segments[-1]
            yield from self._drain_segment(path, growing=growing)
            if not growing:
                path.unlink()
        if not living:
            (folder / LOCK_FILE).unlink()
            folder.rmdir()

    def _drain_segment(self, path: Path, *, growing: bool) -> Iterator[Counter[str]]:
        spool, offset = path.parent.name, find_offset(path, self.progress)
        # What comes meanwhile waits for the next pass, else a busy writer would hold up the others.
        size = path.stat().st_size
        if offset >= size:
            return
        lines = takewhile(lambda line: line.start < size and not (growing and line.torn), read_lines(path, offset))
        while batch := list(islice(lines, self._batch_rows)):
            position = SpoolPosition(self._model_name, spool, int(path.stem), batch[-1].end)
            with self.progress.measure_batch(self._root, batch[-1].end - batch[0].start):
                counts = self._store_batch(f"{spool}/{path.name}", batch, position)
            self.progress.positions[spool] = position.segment, position.offset
            yield counts

    def _store_batch(self, place: str, batch: Sequence[SpoolLine], position: SpoolPosition) -> Counter[str]:
        """Store lines and their position in one transaction; what cannot be stored is in quarantine before it commits.

        What became of the lines is noted before the commit as well: its answer may be lost, and the position tells the
        next pass whether it happened.
        """
        counts: Counter[str] = Counter(torn=sum(line.torn for line in batch))

        def keep(result: InsertResult) -> None:
            reasons = dict(result.refused)
            bad = [(line, line.problem) for line in batch if line.record is None and not line.torn]
            counts.update(stored=result.predictions + result.outcomes, corrupt=len(bad))
            bad += [(line, reasons[id_]) for line in batch if (id_ := _get_id(line)) in reasons]
            counts.update(refused=len(bad) - counts["corrupt"])
            self._quarantine(place, bad)
            self.progress.unanswered = Unanswered(position.spool, position.segment, position.offset, dict(counts))

        records = [line.record for line in batch if line.record is not None]
        self._store.insert(records, position, before_commit=keep)
        self.progress.unanswered = None
        return counts

    def _count_unanswered(self, spool: str) -> Iterator[Counter[str]]:
        """The counts of a batch whose commit was not answered, if the store has it."""
        lost = self.progress.unanswered
        if lost is not None and lost.spool == spool:
            self.progress.unanswered = None
            if self.progress.positions.get(spool, (0, 0)) >= (lost.segment, lost.offset):
                yield Counter(lost.counts)

    def _quarantine(self, place: str, bad: Sequence[tuple[SpoolLine, str]]) -> None:
        if not bad:
            return
        entries = [_describe(f"{place}:{line.start}", line, reason) for line, reason in bad]
        path = self._root / (place.replace("/", "-") + QUARANTINE_SUFFIX)
        logger.error("%s: %s cannot be stored, see %s", place, count_noun(len(entries), "line"), path)
        # what comes again after a crash is not doubled
        known = set(path.read_bytes().splitlines(keepends=True)) if path.exists() else set()
        _append_lines(path, [entry for entry in entries if entry not in known])


def _get_id(line: SpoolLine) -> str | None:
    return line.record.prediction_id if line.record is not None else None


def _describe(place: str, line: SpoolLine, reason: str) -> bytes:
    """An entry of the quarantine file."""
    return msgspec.json.encode({"place": place, "reason": reason, "content": repr(line.content)}) + b"\n"


def _append_lines(path: Path, lines: Sequence[bytes]) -> None:
    """Append lines, on a new one where the last was cut short, and wait for the disk."""
    if not lines:
        return
    with path.open("ab+") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - 1, 0))
        torn = stream.read(1) not in (b"", b"\n")
        stream.write((b"\n" if torn else b"") + b"".join(lines))
        stream.flush()
        os.fsync(stream.fileno())
    if not size:  # a file's name is not on the disk before its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _prune_quarantine(root: Path) -> None:
    """Forget what was put into quarantine long ago: it names customers."""
    for path in root.glob(f"*{QUARANTINE_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # an operator may remove it at any time
            if time.time() - path.stat().st_mtime > QUARANTINE_SECONDS_MAX:
                path.unlink()
