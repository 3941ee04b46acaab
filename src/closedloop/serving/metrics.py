"""The service's metrics: what there is, and how each process counts, in plain memory that is written down soon after.

Every 0.2 seconds a thread writes what has changed into the process's files of prometheus_client's multiprocess mode,
which the agent adds up (`closedloop.serving.exposition`): a request pays for no file, and a kill loses the counts of
0.2 seconds at most. The process holds a lock beside its files for as long as it lives, by which the dead are known.
"""

from __future__ import annotations

import logging
import os
import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from closedloop.errors import ServiceUnavailable
from closedloop.serving.metric_docs import DEVIATIONS, METRICS
from closedloop.serving.metric_files import MetricFiles, make_files

if TYPE_CHECKING:
    from closedloop.contract import ModelContract, ReferenceStatistics

FLUSH_SECONDS = 0.2
OTHER, MISSING = "other", "missing"
logger = logging.getLogger(__name__)


class WorkerMetrics:
    """The metrics of one process, counted by one thread; `flush` may be called by another.

    Parameters
    ----------
    folder
        Where all processes keep theirs; three files of 1 MB are made there.
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
        self._folder, self._name = folder, name.replace("_", "-")  # in a file's name the underscore divides
        try:
            self._lock = make_files(folder, self._name)
        except OSError as error:
            raise ServiceUnavailable(f"{folder}: metrics cannot be kept there ({error.strerror})") from error
        self._array: NDArray[np.float64] = np.zeros(1_024)
        self._values: Any = self._array.data  # single cells: several times quicker than in numpy
        self._used = 0
        self._first: dict[tuple[str, tuple[str, ...]], int] = {}
        self._series: list[tuple[str, tuple[str, ...]]] = []
        self._numeric = self._categorical = _Columns(np.empty(0), {})
        self._means = self._scales = np.empty(0)
        self._files: MetricFiles | None = None
        self._flushing, self._stopping = threading.Lock(), threading.Event()
        for known, doc in METRICS.items():
            if doc.type == "histogram" and not doc.labels:
                self._find(known, ())  # shown from the start
        if contract is not None:
            self.use_reference(contract)

    def start(self) -> None:
        """Write down what has changed every 0.2 seconds, in a thread of its own, until `close`."""
        threading.Thread(target=self._keep_flushing, name="metrics", daemon=True).start()

    def flush(self) -> None:
        """Write down what has changed."""
        with self._flushing:
            if self._files is None:
                self._files = MetricFiles(self._folder, self._name)
            series = self._series[:]
            self._files.write(series, self._array)  # after the series: it has room for all of them

    def close(self) -> None:
        """Write down the last counts, and let the agent take them over; nothing may be counted after."""
        self._stopping.set()
        self.flush()
        if self._files is not None:
            self._files.close()
        os.close(self._lock)

    def _keep_flushing(self) -> None:
        while not self._stopping.wait(FLUSH_SECONDS):
            try:
                self.flush()
            except OSError as error:  # the disk is full, where a file has to grow
                logger.error("%s: counts are not written down (%s)", self._folder, error)

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
        first, self._used = self._used, self._used + doc.cells
        if self._used > len(self._array):
            self._array = np.concatenate([self._array, np.zeros(self._used)])
            self._values = self._array.data
        self._first[name, labels] = first
        self._series.append((name, labels))
        return first


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
