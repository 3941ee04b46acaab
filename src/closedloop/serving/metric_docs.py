"""The metrics of the service: names, labels, help and buckets."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple


class MetricDoc(NamedTuple):
    """The description of a metric; ``buckets`` are upper bounds, in the metric's unit."""

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
    "model_failed_customers_total": MetricDoc(
        "counter",
        ("model_version", "variant"),
        "Customers that a model failed to answer, each once in a revision and process: what releases are judged by",
    ),
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
    "spool_drain_seconds": MetricDoc(
        "gauge", (), "How long the store would take for that, at the drain's present rate"
    ),
}
