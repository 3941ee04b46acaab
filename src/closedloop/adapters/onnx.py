"""ONNX: export a trained pipeline, and prove that the graph gives the same scores."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from closedloop.adapters.onnx_trees import register_trees
from closedloop.adapters.onnxruntime import INPUT_NAME, OUTPUT_NAME, OnnxScorer
from closedloop.contract import Feature
from closedloop.core.training.estimators import encode_frame, score
from closedloop.core.training.trees import list_covers
from closedloop.errors import DataError

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

TARGET_OPSET = 21
PARITY_LIMIT = 1e-4


class Parity(NamedTuple):
    """Graph compared with pipeline: the largest absolute difference in probability, and the rows above 1e-4."""

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
        If the pipeline does not start with "encode", or its model does not have exactly two classes.
    """
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.pipeline import Pipeline

    if pipeline.steps[0][0] != "encode" or len(pipeline.classes_) != 2:
        raise DataError(f"cannot export: steps {list(pipeline.named_steps)}, classes {pipeline.classes_.tolist()}")
    packed = Pipeline([*pipeline.steps[1:-1], ("model", _thaw_model(pipeline[-1]))])
    model = _find_classifier(pipeline[-1])
    if hasattr(model, "list_nodes"):
        register_trees(type(model))
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
    _write_covers(converted, model)
    path.write_bytes(_keep_probability(converted).SerializeToString(deterministic=True))


def measure_parity(pipeline: Pipeline, scorer: OnnxScorer, frame: pd.DataFrame, features: Sequence[Feature]) -> Parity:
    """Score the same rows with graph and pipeline; a NaN on either side counts as a difference of 1."""
    found = scorer.score(encode_frame(features, frame))
    differences = np.nan_to_num(np.abs(score(pipeline, frame) - found), nan=1.0)
    worst = float(differences.max()) if len(differences) else 0.0
    return Parity(worst, int((differences > PARITY_LIMIT).sum()), len(differences))


def measure_latency_ratio(pipeline: Pipeline, scorer: OnnxScorer, frame: pd.DataFrame, *, rows: int = 100) -> float:
    """Divide the graph's median time for one row by the pipeline's; below 1 the graph is quicker.

    The two take turns row by row, so that a busy moment hits both. As when they serve, the pipeline gets a frame of one
    row and the graph one packed row. The graph's time does not include packing.
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


def _find_classifier(model: Any) -> Any:
    """The classifier without its calibration."""
    return model.estimator.estimator if hasattr(model, "calibrated_classifiers_") else model


def _write_covers(converted: Any, model: Any) -> None:
    """Say in the graph how many training rows each tree node has seen, which exact reasons need; scores ignore it."""
    covers = list_covers(model)
    for node in converted.graph.node:
        for attribute in node.attribute:
            if attribute.name == "nodes_hitrates":
                if len(attribute.floats) != len(covers):
                    raise DataError(f"the graph has {len(attribute.floats)} tree nodes, the model {len(covers)}")
                attribute.floats[:] = covers


def _keep_probability(converted: Any) -> Any:
    """Return a model whose only output is the second class's probability; drop the nodes for the label."""
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


def invert_scores(path: Path) -> None:
    """Make a graph return one minus its probability: it loads like the original, but every score is wrong."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            if name == OUTPUT_NAME:
                node.output[place] = "right"
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, dtype=np.float32), "one"))
    model.graph.node.append(helper.make_node("Sub", ["one", "right"], [OUTPUT_NAME], name="wrong"))
    path.write_bytes(model.SerializeToString(deterministic=True))
