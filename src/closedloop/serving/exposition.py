"""What Prometheus sees: the sum over the metrics files of all processes, living and dead."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from closedloop.files import replace_file
from closedloop.serving.metrics import CELLS_AT, HEADER_BYTES, MAGIC, METRICS, MetricDoc
from closedloop.serving.spool import is_locked, take_lock

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

RETIRED_FILE, LOCK_FILE = "retired.json", "collect.lock"

logger = logging.getLogger(__name__)
Key = tuple[str, tuple[str, ...]]
Series = dict[Key, NDArray[np.float64]]


def build_registry(folder: Path) -> CollectorRegistry:
    """What prometheus_client's HTTP server shows: the totals over all files of a folder, read at every scrape."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    registry.register(_Collector(folder))
    return registry


class _Collector:
    """Renders `METRICS`; a metric without a series yet shows its name, type and help."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not read the files."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All metric families, for prometheus_client."""
        series = sorted(collect_series(self._folder).items(), key=lambda item: item[0])
        for name, doc in METRICS.items():
            yield _render(name, doc, [(labels, cells) for (owner, labels), cells in series if owner == name])


def _render(name: str, doc: MetricDoc, series: list[tuple[tuple[str, ...], NDArray[np.float64]]]) -> Metric:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    if doc.type == "histogram":
        histogram = HistogramMetricFamily(name, doc.help, labels=doc.labels)
        edges = ["+Inf" if math.isinf(edge) else str(float(edge)) for edge in doc.buckets]
        for labels, cells in series:
            # given negative buckets, it leaves the sum and the count out by itself
            histogram.add_metric(labels, list(zip(edges, cells.cumsum(), strict=False)), sum_value=cells[-1])
        return histogram
    kind = CounterMetricFamily if doc.type == "counter" else GaugeMetricFamily
    family = kind(name, doc.help, labels=doc.labels)
    for labels, cells in series:
        if cells[0] or doc.type == "counter" or not labels:  # a slot that a version has left is no series
            family.add_metric(labels, cells[0])
    return family


def collect_series(folder: Path) -> Series:
    """The totals of all processes, living and dead; gauges only of the living, the largest of each.

    A dead process's totals are taken over into ``retired.json``, and its file is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / LOCK_FILE, wait=True)
    try:
        files = sorted(folder.glob("[!.]*.mmap"))
        dead = [path for path in files if not is_locked(path)]
        totals = _retire(folder, dead) if dead else _read_retired(folder)[0]
        for path in set(files) - set(dead):
            _add(totals, _read_file(path))
        return totals
    finally:
        os.close(lock)


class _Retired(msgspec.Struct):
    """The totals of the dead; ``files`` are those in it that may not have been removed yet."""

    series: list[tuple[str, tuple[str, ...], list[float]]] = []
    files: list[str] = []


def _retire(folder: Path, dead: list[Path]) -> Series:
    totals, already = _read_retired(folder)
    for path in dead:
        if path.name not in already:
            found = _read_file(path)
            _add(totals, {key: cells for key, cells in found.items() if METRICS[key[0]].type != "gauge"})
    retired = _Retired([(*key, cells.tolist()) for key, cells in totals.items()], [path.name for path in dead])
    try:
        with replace_file(folder / RETIRED_FILE) as beside:
            beside.write_bytes(msgspec.json.encode(retired))
        for path in dead:
            path.unlink()
    except OSError as error:  # a full disk, which is when metrics are looked at
        logger.error("%s: the totals of %d dead processes stay in their files (%s)", folder, len(dead), error)
    return totals


def _read_retired(folder: Path) -> tuple[Series, list[str]]:
    path = folder / RETIRED_FILE
    try:
        retired = msgspec.json.decode(path.read_bytes(), type=_Retired)
    except FileNotFoundError:
        return {}, []
    except (OSError, msgspec.MsgspecError) as error:
        logger.error("%s: cannot be read (%s), totals start anew", path, error)
        return {}, []
    return _keep_known((name, labels, np.array(cells)) for name, labels, cells in retired.series), retired.files


def _read_file(path: Path) -> Series:
    """The series of one process; none if the file is damaged or of another layout."""
    content = path.read_bytes()
    if content[:8] != MAGIC or len(content) < CELLS_AT:
        logger.error("%s: not a metrics file of this release, it is left out", path)
        return {}
    table = content[HEADER_BYTES : HEADER_BYTES + int.from_bytes(content[8:HEADER_BYTES], sys.byteorder)]
    values = np.frombuffer(content[CELLS_AT:], dtype=np.float64)
    try:
        lines = [msgspec.json.decode(line, type=tuple[str, tuple[str, ...], int, int]) for line in table.splitlines()]
    except msgspec.MsgspecError as error:
        logger.error("%s: its table is damaged (%s), it is left out", path, error)
        return {}
    return _keep_known((name, labels, values[first : first + cells]) for name, labels, first, cells in lines)


def _keep_known(found: Iterable[tuple[str, tuple[str, ...], NDArray[np.float64]]]) -> Series:
    """Without what another release counted otherwise."""
    return {
        (name, labels): cells
        for name, labels, cells in found
        if name in METRICS and len(cells) == METRICS[name].cells and len(labels) == len(METRICS[name].labels)
    }


def _add(totals: Series, series: Series) -> None:
    for key, cells in series.items():
        before = totals.get(key, np.zeros_like(cells))
        totals[key] = np.maximum(before, cells) if METRICS[key[0]].type == "gauge" else before + cells
