"""ONNX: exporting a trained pipeline, scoring the exported graph, and proving that both say the same."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from closedloop.contract import Feature
from closedloop.core.estimators import encode_frame, score
from closedloop.errors import DataError

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

INPUT_NAME = "features"
OUTPUT_NAME = "probability"
TARGET_OPSET = 21
PARITY_LIMIT = 1e-4


class Parity(NamedTuple):
    """Graph against pipeline: the largest absolute difference in probability, and the rows above 1e-4."""

    difference_max: float
    rows_over: int
    rows: int


def export_model(pipeline: Pipeline, path: Path, n_features: int) -> None:
    """Write the part of a fitted pipeline after "encode" as ONNX; the same fit gives the same bytes.

    The graph takes ``features``, float32 of shape (n, n_features) as `encode_frame` packs them, and returns
    ``probability``, float32 of shape (n,): the probability of churn.

    Raises
    ------
    DataError
        If the pipeline does not start with "encode", or its model knows other than two classes.
    """
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.pipeline import Pipeline

    if pipeline.steps[0][0] != "encode" or len(pipeline.classes_) != 2:
        raise DataError(f"cannot export: steps {list(pipeline.named_steps)}, classes {pipeline.classes_.tolist()}")
    packed = Pipeline([*pipeline.steps[1:-1], ("model", _thaw_model(pipeline[-1]))])
    with warnings.catch_warnings():
        # skl2onnx 1.20 writes booleans into integer fields; protobuf warns of it. Drop once that is fixed.
        warnings.filterwarnings("ignore", ".*Expected an int, got a boolean", DeprecationWarning)
        converted = convert_sklearn(
            packed,
            name="closedloop",  # without a name skl2onnx takes a random one
            initial_types=[(INPUT_NAME, FloatTensorType([None, n_features]))],
            target_opset=TARGET_OPSET,
            options={"zipmap": False},
        )
    path.write_bytes(_keep_probability(converted).SerializeToString(deterministic=True))


class OnnxScorer:
    """An exported model in ONNX Runtime; one row, many rows and more threads differ by up to 5e-7."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except OSError as error:
            raise DataError(f"{path}: the model cannot be read ({error.strerror})") from error
        except Exception as error:  # ONNX Runtime's errors share no public base class
            raise DataError(f"{path}: ONNX Runtime cannot load the model ({error})") from error
        inputs = {node.name: node.shape for node in self._session.get_inputs()}
        outputs = [node.name for node in self._session.get_outputs()]
        if list(inputs) != [INPUT_NAME] or outputs != [OUTPUT_NAME]:
            raise DataError(
                f"{path}: the graph maps {list(inputs)} to {outputs}, expected {INPUT_NAME} to {OUTPUT_NAME}"
            )
        self.n_features = int(inputs[INPUT_NAME][1])

    def score(self, matrix: np.ndarray) -> np.ndarray:
        """Probability of churn: float32 (n, n_features) in, float64 in [0, 1] of shape (n,) out.

        Raises
        ------
        DataError
            If the matrix has another type or width.
        """
        if matrix.dtype != np.float32 or matrix.ndim != 2 or matrix.shape[1] != self.n_features:
            raise DataError(f"the model takes float32 (n, {self.n_features}), found {matrix.dtype} {matrix.shape}")
        if not len(matrix):
            return np.empty(0, dtype=np.float64)
        found = self._session.run([OUTPUT_NAME], {INPUT_NAME: matrix})[0]
        return np.asarray(found, dtype=np.float64).reshape(-1)


def measure_parity(pipeline: Pipeline, scorer: OnnxScorer, frame: pd.DataFrame, features: Sequence[Feature]) -> Parity:
    """Score the same rows with both. A NaN on either side counts as a difference of 1."""
    found = scorer.score(encode_frame(features, frame))
    differences = np.nan_to_num(np.abs(score(pipeline, frame) - found), nan=1.0)
    worst = float(differences.max()) if len(differences) else 0.0
    return Parity(worst, int((differences > PARITY_LIMIT).sum()), len(differences))


def measure_latency_ratio(pipeline: Pipeline, scorer: OnnxScorer, frame: pd.DataFrame, *, rows: int = 200) -> float:
    """Median time of one row in the graph over that in the pipeline; below 1 the graph is quicker.

    Row by row the two take turns, so that a busy moment hits both. The pipeline gets a frame of one row, the
    graph one packed row: what each of them is handed when it serves. Packing is not in the graph's figure.
    """
    if frame.empty:
        raise DataError("latency needs at least one row, found none")
    singles = [frame.iloc[[position % len(frame)]] for position in range(rows)]
    packed = [np.asarray(pipeline[0].transform(single), dtype=np.float32) for single in singles]
    pipeline.predict_proba(singles[0])
    scorer.score(packed[0])
    seconds = np.empty((rows, 2))
    for row, (single, matrix) in enumerate(zip(singles, packed, strict=True)):
        start = time.perf_counter()
        scorer.score(matrix)
        middle = time.perf_counter()
        pipeline.predict_proba(single)
        seconds[row] = middle - start, time.perf_counter() - middle
    graph_seconds, pipeline_seconds = np.median(seconds, axis=0)
    return float(graph_seconds / pipeline_seconds)


def _thaw_model(model: Any) -> Any:
    """The classifier without FrozenEstimator, which skl2onnx 1.20 does not know; calibrators are kept."""
    if not hasattr(model, "calibrated_classifiers_"):
        return model
    thawed = copy.copy(model)
    thawed.estimator = model.estimator.estimator
    thawed.calibrated_classifiers_ = [copy.copy(inner) for inner in model.calibrated_classifiers_]
    for inner in thawed.calibrated_classifiers_:
        inner.estimator = inner.estimator.estimator
    return thawed


def _keep_probability(converted: Any) -> Any:
    """A model that returns the second class probability alone; nodes that only served the label go."""
    from onnx import TensorProto, helper, numpy_helper
    from skl2onnx.helpers.onnx_helper import select_model_inputs_outputs

    probabilities = converted.graph.output[1].name
    model = select_model_inputs_outputs(converted, outputs=[probabilities])
    churned = f"{OUTPUT_NAME}_class"
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, dtype=np.int64), churned))
    model.graph.node.append(
        helper.make_node("Gather", [probabilities, churned], [OUTPUT_NAME], name=OUTPUT_NAME, axis=1)
    )
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, [None]))
    used = {name for node in model.graph.node for name in node.input}
    unused = [constant for constant in model.graph.initializer if constant.name not in used]
    for constant in unused:
        model.graph.initializer.remove(constant)
    # skl2onnx lists them from a set, in another order in each process.
    domains = sorted(model.opset_import, key=lambda entry: str(entry.domain))
    del model.opset_import[:]
    model.opset_import.extend(domains)
    return model
