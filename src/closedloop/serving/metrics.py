"""The service's metrics: what there is, and how each process counts in a file of shared memory of its own.

A file holds a table of series, to which lines are only added, and an array of float64 cells: one for a counter or
gauge, one a bucket and one for the sum of a histogram. A process is the only writer of its file, so it needs no lock;
it holds one on the file for as long as it lives, by which the reader (`closedloop.serving.exposition`) knows the dead.
prometheus_client's multiprocess mode does the same at twice the cost of its updates, a quarter of the throughput.
"""

from __future__ import annotations

import fcntl
import logging
import math
import mmap
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from closedloop.errors import ServiceUnavailable
from closedloop.serving.spool import take_lock

if TYPE_CHECKING:
    from closedloop.contract import ModelContract, ReferenceStatistics

MAGIC = b"metrics1"  # another layout needs another
HEADER_BYTES = 16  # the magic, and the length of the table as an unsigned integer
CELLS_AT, CELLS = 2**19, 2**15  # room for 2,700 numeric features, or 8,000 categories
OTHER, MISSING = "other", "missing"

logger = logging.getLogger(__name__)


class MetricDoc(NamedTuple):
    """What a metric is; ``buckets`` are upper bounds, in the metric's unit."""

    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()

    @property
    def cells(self) -> int:
        """How many numbers a series of it takes: the sum follows the buckets."""
        return len(self.buckets) + 1


REQUEST_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, math.inf)
MODEL_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1, math.inf)
DEVIATIONS = (-3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, math.inf)
METRICS: dict[str, MetricDoc] = {
    "prediction_requests_total": MetricDoc("counter", ("status",), "Requests for predictions answered, by HTTP status"),
    "prediction_request_latency_seconds": MetricDoc(
        "histogram", (), "From a request's last byte to its answer, of those answered with 200 or 5xx", REQUEST_SECONDS
    ),
    "model_prediction_latency_seconds": MetricDoc(
        "histogram", (), "Time in the model, per row of a micro-batch", MODEL_SECONDS
    ),
    "model_predictions_total": MetricDoc(
        "counter", ("model_version", "variant", "prediction_class"), "Rows scored; class 1 is churn"
    ),
    "model_errors_total": MetricDoc("counter", ("model_version", "variant"), "Rows that a model failed to answer"),
    "feature_distribution": MetricDoc(
        "histogram",
        ("feature_name",),
        "Numeric features, in standard deviations from the mean of the model's reference rows; without a sum, "
        "which would fall with every negative value and look like a counter that was reset",
        DEVIATIONS,
    ),
    "feature_categories_total": MetricDoc(
        "counter",
        ("feature_name", "category"),
        "Categorical features by category ('other': unknown to the model), and 'missing' for features of both kinds",
    ),
    "model_slot_info": MetricDoc(
        "gauge", ("variant", "model_version"), "1 for each version that a living worker has in this slot"
    ),
    "models_refused_total": MetricDoc(
        "counter", ("reason",), "Model versions that a worker refused, by the check they failed"
    ),
    "outcomes_total": MetricDoc("counter", ("result",), "Outcomes reported, by what became of them"),
    "prediction_rows_total": MetricDoc(
        "counter", ("result",), "Spooled lines, by what the drain did with them: stored, refused, corrupt or torn"
    ),
    "spool_depth_bytes": MetricDoc("gauge", (), "What waits in the spools for the operations store"),
}


class WorkerMetrics:
    """The metrics of one process, for one thread.

    Parameters
    ----------
    folder
        Where all processes keep theirs; a file of 0.8 MB is made there.
    name
        Must never have been used there before.
    contract
        See `use_reference`.

    Raises
    ------
    ServiceUnavailable
        If the disk has no room for it.
    """

    def __init__(self, folder: Path, name: str, contract: ModelContract | None = None) -> None:
        try:
            self._file = _make_file(folder, name)
            memory = mmap.mmap(self._file, CELLS_AT + 8 * CELLS)
        except OSError as error:
            raise ServiceUnavailable(f"{folder}: metrics cannot be kept there ({error.strerror})") from error
        self._table = memoryview(memory)[:CELLS_AT]
        self._table_length = self._table[8:HEADER_BYTES].cast("Q")
        self._values = memoryview(memory)[CELLS_AT:].cast("d")  # single cells: several times quicker than in numpy
        self._array: NDArray[np.float64] = np.frombuffer(memory, dtype=np.float64, offset=CELLS_AT)
        # The first cells are in no series: what finds no room is counted there.
        self._used = max(doc.cells for doc in METRICS.values())
        self._first: dict[tuple[str, tuple[str, ...]], int] = {}
        self._numeric = self._categorical = _Columns(np.empty(0), {})
        self._means = self._scales = np.empty(0)
        for name, doc in METRICS.items():
            if doc.type == "histogram" and not doc.labels:
                self._find(name, ())  # shown from the start, and never crowded out by a model's features
        if contract is not None:
            self.use_reference(contract)

    def close(self) -> None:
        """Let the agent take over the totals; nothing may be counted after."""
        fcntl.flock(self._file, fcntl.LOCK_UN)  # the mapping has a descriptor of its own, which would keep the lock
        os.close(self._file)

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter, or to a gauge that goes up and down."""
        self._values[self._find(name, labels)] += by

    def count_outcomes(self, *, accepted: int, refused: int) -> None:
        """Count reported outcomes."""
        self.count("outcomes_total", "accepted", by=accepted)
        self.count("outcomes_total", "refused", by=refused)

    def set(self, name: str, *labels: str, value: float) -> None:
        """Set a gauge; of the values of several living processes the largest is shown."""
        self._values[self._find(name, labels)] = value

    def set_slots(self, versions: Mapping[str, str]) -> None:
        """Show which version each variant has: {variant: version}; what is not named is gone."""
        for (name, _), cell in self._first.items():
            if name == "model_slot_info":
                self._values[cell] = 0
        for variant, version in versions.items():
            self.set("model_slot_info", variant, version, value=1)

    def count_request(self, status: int, seconds: float) -> None:
        """Count an answered request for predictions; a refusal costs nothing, and would make an overload look quick."""
        self.count("prediction_requests_total", str(status))
        if status == 200 or status >= 500:
            self._observe("prediction_request_latency_seconds", seconds, 1)

    def count_predictions(self, version: str, variant: str, decisions: Sequence[int], seconds: float) -> None:
        """Count the rows of a micro-batch: decisions, each 0 or 1, and the model's time for one row."""
        rows, churning = len(decisions), sum(decisions)
        if churning:
            self.count("model_predictions_total", version, variant, "1", by=churning)
        if rows > churning:
            self.count("model_predictions_total", version, variant, "0", by=rows - churning)
        self._observe("model_prediction_latency_seconds", seconds, rows)

    def use_reference(self, contract: ModelContract) -> None:
        """Count features against this model's reference statistics and categories from now on."""
        numeric: dict[int, list[int]] = {}
        categorical: dict[int, list[int]] = {}
        moments: list[tuple[float, float]] = []
        codes_max = max(
            (len(feature.categories) for feature in contract.features if feature.kind == "categorical"), default=0
        )
        for position, feature in enumerate(contract.features):
            missing = self._find("feature_categories_total", (feature.name, MISSING))
            if feature.kind == "numeric":
                first = self._find("feature_distribution", (feature.name,))
                numeric[position] = [*range(first, first + len(DEVIATIONS)), missing]
                moments.append(_read_moments(contract.reference.get(feature.name)))
            else:
                other, *known = [
                    self._find("feature_categories_total", (feature.name, name))
                    for name in (OTHER, *feature.categories)
                ]
                categorical[position] = [other, *known, *[other] * (codes_max - len(known)), missing]
        self._numeric = _Columns(np.array(DEVIATIONS), numeric)
        self._categorical = _Columns(np.arange(-1, codes_max, dtype=np.float32), categorical)
        self._means, self._scales = np.array(moments).reshape(-1, 2).T

    def observe_features(self, matrix: NDArray[np.float32], missing: NDArray[np.bool_] | None = None) -> None:
        """Count the features of a micro-batch.

        Parameters
        ----------
        matrix
            As the graph takes it, shape (n, n_features): NaN is a missing number, -1 a category that is unknown to
            the model.
        missing
            Of the same shape: where a category was not given, which the matrix codes as -1 too.
        """
        if self._numeric:
            deviations = (self._numeric.take(matrix) - self._means) * self._scales
            np.add.at(self._array, self._numeric.find(deviations), 1.0)
        if self._categorical:
            codes = self._categorical.take(matrix)
            if missing is not None:
                codes[self._categorical.take(missing)] = np.nan
            np.add.at(self._array, self._categorical.find(codes), 1.0)

    def _observe(self, name: str, seconds: float, rows: int) -> None:
        first, buckets = self._find(name, ()), METRICS[name].buckets
        self._values[first + bisect_left(buckets, seconds)] += rows
        self._values[first + len(buckets)] += seconds * rows

    def _find(self, name: str, labels: tuple[str, ...]) -> int:
        """The first cell of a series, which is added to the table if it is new."""
        try:
            return self._first[name, labels]
        except KeyError:
            return self._add_series(name, labels)

    def _add_series(self, name: str, labels: tuple[str, ...]) -> int:
        doc = METRICS[name]
        if len(labels) != len(doc.labels):
            raise TypeError(f"{name} takes the labels {doc.labels}, found {labels}")
        line = msgspec.json.encode((name, labels, self._used, doc.cells)) + b"\n"
        start = HEADER_BYTES + self._table_length[0]
        if start + len(line) > CELLS_AT or self._used + doc.cells > CELLS:
            logger.error("the metrics file is full: %s %s is not counted", name, labels)
            self._first[name, labels] = 0
            return 0
        self._table[start : start + len(line)] = line
        self._table_length[0] += len(line)  # last: readers look no further
        self._first[name, labels] = self._used
        self._used += doc.cells
        return self._first[name, labels]


def _make_file(folder: Path, name: str) -> int:
    """Make a metrics file, which appears with its lock held, and return its descriptor."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{name}.mmap"
    file = take_lock(beside)
    try:
        # A hole in the file would be filled when it is first written to: on a full disk that kills the process.
        os.posix_fallocate(file, 0, CELLS_AT + 8 * CELLS)
        os.pwrite(file, MAGIC, 0)
        beside.rename(folder / f"{name}.mmap")
    except OSError:
        beside.unlink()
        os.close(file)
        raise
    return file


class _Columns:
    """Features that are counted alike: where a value stands among the edges picks one of its feature's cells.

    ``cells``: {position in the matrix: a cell for each edge, the value being at most that, and one for NaN}.
    """

    def __init__(self, edges: NDArray[Any], cells: Mapping[int, list[int]]) -> None:
        self._edges = edges
        self._positions = np.array(list(cells), dtype=np.intp)
        self._cells = np.array(list(cells.values()), dtype=np.intp)
        self._starts = np.arange(len(cells)) * (len(edges) + 1)

    def __len__(self) -> int:
        return len(self._positions)

    def take(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """These features' columns, copied."""
        return matrix.take(self._positions, axis=1)

    def find(self, values: NDArray[Any]) -> NDArray[np.intp]:
        """The cells of these features' values of shape (n, features), as shape (n * features,)."""
        return self._cells.take(self._edges.searchsorted(values) + self._starts).ravel()


def _read_moments(statistics: ReferenceStatistics | None) -> tuple[float, float]:
    """Mean and reciprocal standard deviation; whatever differs from a constant is far off, in float32 like the rows."""
    if statistics is None or not statistics.standard_deviation:
        constant = statistics.mean or 0.0 if statistics else 0.0
        return float(np.float32(constant)), 1e30
    return statistics.mean or 0.0, 1 / statistics.standard_deviation
