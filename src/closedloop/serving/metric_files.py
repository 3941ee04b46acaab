"""The files of one process's counts, in the form of prometheus_client's multiprocess mode."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from closedloop.files import take_lock
from closedloop.serving.metric_docs import METRICS

FILE_BYTES = 2**20  # room for 7,000 numbers; a file that grows beyond may find the disk full, which kills the process
# prometheus_client's names of files; "livemax": of the values of several living processes the largest is shown
KINDS = {"counter": "counter", "histogram": "histogram", "gauge": "gauge_livemax"}
LOCK_SUFFIX = ".lock"


def make_files(folder: Path, name: str) -> int:
    """Make a process's files, and return the descriptor that holds its lock.

    They are filled with zeros: where the disk is full a hole could not be written to, which would kill the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{name}{LOCK_SUFFIX}"  # appears with its lock held, else it might be taken for a dead one's
    files = [folder / f"{kind}_{name}.db" for kind in KINDS.values()]
    lock = take_lock(beside)
    try:
        for file in files:
            file.write_bytes(bytes(FILE_BYTES))
        beside.rename(folder / f"{name}{LOCK_SUFFIX}")
    except OSError:
        for file in (*files, beside):
            file.unlink(missing_ok=True)
        os.close(lock)
        raise
    return lock


class MetricFiles:
    """The files of one process, in the form of prometheus_client's multiprocess mode."""

    def __init__(self, folder: Path, name: str) -> None:
        from prometheus_client.mmap_dict import MmapedDict  # here: a worker's start does not wait for it

        self._files = {kind: MmapedDict(str(folder / f"{file}_{name}.db")) for kind, file in KINDS.items()}
        self._keys: list[tuple[str, str]] = []  # of each cell
        self._known = 0
        self._written: NDArray[np.float64] = np.empty(0)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()

    def write(self, series: Sequence[tuple[str, tuple[str, ...]]], values: NDArray[np.float64]) -> None:
        """Write the cells of these series that have changed since the last time, new ones included."""
        for name, labels in series[self._known :]:
            self._keys += _name_cells(name, labels)
        self._known = len(series)
        used = values[: len(self._keys)].copy()
        before = np.concatenate([self._written, np.full(len(used) - len(self._written), np.nan)])
        for cell in np.flatnonzero(used != before).tolist():
            kind, key = self._keys[cell]
            if key:
                self._files[kind].write_value(key, float(used[cell]), 0.0)
        self._written = used


def _name_cells(name: str, labels: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The kind, and the keys in the file, of a series' cells; a histogram with negative buckets has no sum."""
    from prometheus_client.mmap_dict import mmap_key
    from prometheus_client.utils import floatToGoString

    doc = METRICS[name]
    for edge in doc.buckets:
        bound = (floatToGoString(edge),)
        yield doc.type, mmap_key(name, f"{name}_bucket", [*doc.labels, "le"], [*labels, *bound], "")
    if doc.type == "histogram":
        yield doc.type, mmap_key(name, f"{name}_sum", [*doc.labels], [*labels], "") if doc.buckets[0] >= 0 else ""
    else:
        yield doc.type, mmap_key(name.removesuffix("_total"), name, [*doc.labels], [*labels], "")
