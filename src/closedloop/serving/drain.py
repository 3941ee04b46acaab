"""The drain: what the workers spooled goes to the store in batches, each record exactly once whatever dies when.

Beside the spools lie outcomes that came before their prediction (which may stand in another worker's spool, or another
replica's), in a file for each minute in which some came, ``waiting-<seconds>.log``; and for 30 days what cannot be
stored, in ``*.quarantine``: lines with their place and the reason, and outcomes that have waited for a day.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from closedloop.adapters.store import InsertResult, SpoolPosition
from closedloop.errors import DataError, ServiceUnavailable
from closedloop.files import replace_file
from closedloop.records import Outcome, Prediction, Record
from closedloop.serving.spool import (
    LOCK_FILE,
    WAITING_PREFIX,
    SpoolLine,
    is_locked,
    list_segments,
    list_spools,
    read_lines,
    take_lock,
)

DRAIN_LOCK_FILE, QUARANTINE_SUFFIX = "drain.lock", ".quarantine"
DAY_SECONDS = 86_400
WAITING_SECONDS_MAX = DAY_SECONDS  # longer than any replica's spool should wait for the store
WAITING_BYTES_MAX = 50_000_000  # some 350,000 outcomes: more have no prediction anywhere
QUARANTINE_SECONDS_MAX = 30 * DAY_SECONDS

logger = logging.getLogger(__name__)


class RecordStore(Protocol):
    """What is needed of the operations store."""

    def insert(self, records: Sequence[Record], position: SpoolPosition | None) -> InsertResult:
        """Store records, none of them twice, and how far their spool has been read, in one transaction."""

    def read_position(self, model_name: str, spool: str) -> SpoolPosition | None:
        """How far a spool has been read."""


class DrainResult(NamedTuple):
    """What became of the spools' lines: the ``rows`` stored, the refused and corrupt ones put into quarantine, and
    the torn ones, over which their writer died before it answered.

    ``depth_bytes`` wait for the store; ``problems`` are for an operator. ``positions`` says how far each spool has been
    read, for `measure_depth` while the store is away.
    """

    rows: int
    refused: int
    corrupt: int
    torn: int
    depth_bytes: int
    problems: tuple[str, ...]
    positions: Mapping[str, SpoolPosition]


def drain_once(
    spool_root: Path,
    store: RecordStore,
    model_name: str,
    batch_rows: int = 2000,
    report: Callable[[Mapping[str, int]], None] = lambda _: None,
    *,
    last: bool = False,
) -> DrainResult:
    """Store what all spools hold by now.

    Parameters
    ----------
    report
        Called after each batch with its lines by result ("stored", "refused", "corrupt", "torn"), as the metric
        ``prediction_rows_total`` counts them: of a pass that fails half-way they are known too.
    last
        Offer all waiting outcomes: their files may go with this process.

    Raises
    ------
    ServiceUnavailable, ConfigError
        If the store cannot be used, or another process drains; what was stored stays, the rest is for the next call.
    """
    spool_root.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(spool_root / DRAIN_LOCK_FILE)
    except BlockingIOError:
        raise ServiceUnavailable(f"{spool_root}: another process drains it") from None
    drain = _Drain(spool_root, store, model_name, batch_rows)
    total: Counter[str] = Counter()
    problems: list[str] = []
    try:
        for work in (*map(drain.drain_spool, list_spools(spool_root)), drain.retry_outcomes(everything=last)):
            try:
                for counts in work:
                    total += counts
                    report(counts)
            except (OSError, DataError) as error:
                problems.append(str(error))  # one bad spool must not hold up the others
        _prune_quarantine(spool_root)
    finally:
        os.close(lock)
    return DrainResult(
        rows=total["stored"],
        refused=total["refused"],
        corrupt=total["corrupt"],
        torn=total["torn"],
        depth_bytes=measure_depth(spool_root, drain.positions),
        problems=tuple(problems),
        positions=drain.positions,
    )


def measure_depth(spool_root: Path, positions: Mapping[str, SpoolPosition] | None = None) -> int:
    """Bytes in all spools, less what these positions say has been read."""
    depth = 0
    for folder in list_spools(spool_root):
        position = (positions or {}).get(folder.name)
        for path in list_segments(folder):
            with contextlib.suppress(FileNotFoundError):  # drained meanwhile
                depth += max(0, path.stat().st_size - _find_offset(path, position))
    return depth


def _find_offset(segment: Path, position: SpoolPosition | None) -> int:
    """How far a segment has been read, in bytes; beyond its end where it is left over from an earlier pass."""
    if position is None or int(segment.stem) > position.segment:
        return 0
    return position.offset if int(segment.stem) == position.segment else sys.maxsize


class _Drain:
    """One pass; its methods yield the counts of each batch once that is stored."""

    def __init__(self, root: Path, store: RecordStore, model_name: str, batch_rows: int) -> None:
        self._root, self._store, self._model_name, self._batch_rows = root, store, model_name, batch_rows
        self.positions: dict[str, SpoolPosition] = {}

    def drain_spool(self, folder: Path) -> Iterator[Counter[str]]:
        """Store a spool's lines, and remove the files that can no longer grow."""
        living = is_locked(folder / LOCK_FILE)  # asked before the files are listed: a dead one's last file is complete
        position = self._store.read_position(self._model_name, folder.name)
        if position is not None:
            self.positions[folder.name] = position
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
        spool, offset = path.parent.name, _find_offset(path, self.positions.get(path.parent.name))
        # What comes meanwhile waits for the next pass, else a busy writer would hold up the others.
        size = path.stat().st_size
        if offset >= size:
            return
        lines = takewhile(lambda line: line.start < size and not (growing and line.torn), read_lines(path, offset))
        while batch := list(islice(lines, self._batch_rows)):
            position = SpoolPosition(self._model_name, spool, int(path.stem), batch[-1].end)
            yield self._store_batch(f"{spool}/{path.name}", batch, position)
            self.positions[spool] = position

    def _store_batch(self, place: str, batch: Sequence[SpoolLine], position: SpoolPosition) -> Counter[str]:
        """Store lines, and their position last.

        What the store refuses must be kept elsewhere before the position leaves it behind, and the store says so
        only with its commit. A batch that comes again for want of its position doubles nothing: records have keys.
        """
        counts, waiting = self._store_lines(place, batch)
        minute = int(time.time()) // 60 * 60
        _append_lines(self._root / f"{WAITING_PREFIX}{minute}.log", [line.content for line in waiting])
        self._store.insert((), position)
        return counts

    def retry_outcomes(self, *, everything: bool) -> Iterator[Counter[str]]:
        """Offer the waiting outcomes again: those of two minutes in every pass, older ones ever more seldom.

        A file's name says when they came, its last change when they were offered last. The oldest are given up, after
        a day, or when they are too many.
        """
        room, now = WAITING_BYTES_MAX, time.time()
        for path in sorted(self._root.glob(f"{WAITING_PREFIX}[0-9]*.log"), reverse=True):
            came_at, offered_at = int(path.stem.removeprefix(WAITING_PREFIX)), path.stat().st_mtime
            expired = now - came_at > WAITING_SECONDS_MAX
            if everything or expired or now - offered_at >= (offered_at - came_at) / 2 - 60:
                yield from self._offer(path)
            size = path.stat().st_size
            room -= size
            if not size:
                path.unlink()
            elif expired or room < 0:
                yield _give_up(path, keep=expired)

    def _offer(self, path: Path) -> Iterator[Counter[str]]:
        """Store what the store takes by now of a file of waiting outcomes, and keep the rest."""
        with replace_file(path) as beside, beside.open("wb") as kept:
            lines = read_lines(path)
            while batch := list(islice(lines, self._batch_rows)):
                counts, waiting = self._store_lines(path.name, batch)
                kept.writelines(line.content for line in waiting)
                yield counts
            kept.flush()
            os.fsync(kept.fileno())

    def _store_lines(self, place: str, lines: Sequence[SpoolLine]) -> tuple[Counter[str], list[SpoolLine]]:
        """Store what can be stored and put the rest into quarantine, but for outcomes, which wait."""
        corrupt = [(line, line.problem) for line in lines if line.record is None and not line.torn]
        refused: list[tuple[SpoolLine, str]] = []
        waiting: list[SpoolLine] = []
        stored = 0
        for kind in (Prediction, Outcome):  # in this order: an outcome's prediction may stand behind it
            chosen = [(line, line.record) for line in lines if isinstance(line.record, kind)]
            if not chosen:
                continue
            result = self._store.insert([record for _, record in chosen], None)
            stored += result.predictions + result.outcomes
            reasons = dict(result.refused)
            for line, record in chosen:
                if record.prediction_id not in reasons:
                    continue
                if isinstance(record, Outcome):
                    waiting.append(line)
                else:
                    refused.append((line, reasons[record.prediction_id]))
        entries = [_describe(f"{place}:{line.start}", line, reason) for line, reason in corrupt + refused]
        if entries:
            path = self._root / (place.replace("/", "-") + QUARANTINE_SUFFIX)
            logger.error("%s: %d lines cannot be stored, see %s", place, len(entries), path)
            # what comes again after a crash is not doubled
            known = set(path.read_bytes().splitlines(keepends=True)) if path.exists() else set()
            _append_lines(path, [entry for entry in entries if entry not in known])
        torn = sum(line.torn for line in lines)
        return Counter(stored=stored, refused=len(refused), corrupt=len(corrupt), torn=torn), waiting


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


def _give_up(path: Path, *, keep: bool) -> Counter[str]:
    """Stop offering a file of outcomes, which is kept in quarantine or not at all."""
    refused = sum(1 for _ in read_lines(path))
    logger.error("%s: %d outcomes have no prediction in the store", path, refused)
    if keep:
        path.rename(path.with_suffix(QUARANTINE_SUFFIX))
    else:
        path.unlink()
    return Counter(refused=refused)


def _prune_quarantine(root: Path) -> None:
    """Forget what was put into quarantine long ago: it names customers."""
    for path in root.glob(f"*{QUARANTINE_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # an operator may remove it at any time
            if time.time() - path.stat().st_mtime > QUARANTINE_SECONDS_MAX:
                path.unlink()
