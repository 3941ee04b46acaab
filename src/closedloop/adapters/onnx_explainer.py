"""Exact reasons from an exported graph: its trees or coefficients read by protobuf, its preparation run as it is.

Serving a model needs no onnx package, and neither does explaining its scores: the few messages and fields of an ONNX
file that are read here are described below (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from closedloop.adapters.onnxruntime import INPUT_NAME
from closedloop.contract import CategoricalFeature, ModelContract
from closedloop.core.reasons.explainer import Explainer, Shapley, find_owners
from closedloop.core.reasons.paths import TreeNodes
from closedloop.core.reasons.shapley import LinearShapley, TreeShapley
from closedloop.errors import DataError

TREES, LINEAR = ("TreeEnsembleClassifier", "TreeEnsembleRegressor"), ("LinearClassifier",)
_FLOAT, _INT, _TEXT, _BYTES, _MESSAGE = 2, 3, 9, 12, 11  # google.protobuf.FieldDescriptorProto.Type
_MESSAGES: dict[str, list[tuple[str, int, int, bool, str]]] = {
    "Attribute": [
        ("name", 1, _TEXT, False, ""),
        ("s", 4, _BYTES, False, ""),
        ("floats", 7, _FLOAT, True, ""),
        ("ints", 8, _INT, True, ""),
        ("strings", 9, _BYTES, True, ""),
    ],
    "Node": [
        ("input", 1, _TEXT, True, ""),
        ("op_type", 4, _TEXT, False, ""),
        ("attribute", 5, _MESSAGE, True, "Attribute"),
    ],
    "Value": [("name", 1, _TEXT, False, "")],
    "Graph": [("node", 1, _MESSAGE, True, "Node"), ("output", 12, _MESSAGE, True, "Value")],
    "Model": [("graph", 7, _MESSAGE, False, "Graph")],
}


def open_explainer(path: Path, contract: ModelContract) -> Explainer:
    """Explain the scores of an exported model.

    Parameters
    ----------
    path
        The graph.
    contract
        Names the features and groups; a linear model's means are those of its reference statistics.

    Raises
    ------
    DataError
        If the file cannot be read, or the graph has no model that can be explained.
    """
    model = _read_model(path)
    found = [node for node in model.graph.node if node.op_type in (*TREES, *LINEAR)]
    if len(found) != 1:
        raise DataError(f"{path}: no reasons: the graph has {len(found)} tree ensembles or linear models, expected 1")
    prepare = _open_preparation(path, model, found[0].input[0])
    counts = [len(one.categories) if isinstance(one, CategoricalFeature) else None for one in contract.features]
    try:
        owners = find_owners(prepare, counts)
    except ValueError as error:
        raise DataError(f"{path}: no reasons: {error}") from error
    attributes = {one.name: one for one in found[0].attribute}
    shapley: Shapley
    if found[0].op_type in LINEAR:
        shapley = _read_linear(attributes, _average(contract, prepare))
    else:
        shapley = TreeShapley(read_trees(attributes, path), len(owners), float(sum(_floats(attributes, "base_values"))))
    return Explainer(contract.feature_names, contract.reasons, shapley, prepare, owners)


def read_trees(attributes: dict[str, Any], path: Path) -> TreeNodes:
    """The nodes of a tree ensemble's operator.

    Raises
    ------
    DataError
        If a node's test is of another kind, or the training rows of each node are not known.
    """
    tree = _ints(attributes, "nodes_treeids")
    modes = np.array(attributes["nodes_modes"].strings)
    is_leaf = modes == b"LEAF"
    other = set(modes[~is_leaf].tolist()) - {b"BRANCH_LEQ"}
    if other:
        raise DataError(f"{path}: no reasons: trees test {', '.join(sorted(one.decode() for one in other))}")
    cover = _floats(attributes, "nodes_hitrates")
    if len(cover) != len(tree) or not (cover > 0).all() or (len(cover) > 1 and (cover == 1).all()):
        raise DataError(
            f"{path}: no reasons: the graph does not say how many training rows each node has seen; train and release "
            "a new version"
        )
    starts = np.searchsorted(tree, np.arange(tree[-1] + 1))
    nodes = starts[tree]
    prefix = "class" if "class_ids" in attributes else "target"
    classes = _ints(attributes, f"{prefix}_ids")
    value, churned = np.zeros(len(tree)), classes == classes.max()
    leaves = starts[_ints(attributes, f"{prefix}_treeids")] + _ints(attributes, f"{prefix}_nodeids")
    np.add.at(value, leaves[churned], _floats(attributes, f"{prefix}_weights")[churned])
    return TreeNodes(
        tree=tree,
        column=_ints(attributes, "nodes_featureids"),
        threshold=np.array(attributes["nodes_values"].floats, dtype=np.float32),
        yes=nodes + _ints(attributes, "nodes_truenodeids"),
        no=nodes + _ints(attributes, "nodes_falsenodeids"),
        is_leaf=is_leaf,
        is_missing_yes=_ints(attributes, "nodes_missing_value_tracks_true").astype(bool),
        cover=cover,
        value=value,
    )


def _read_linear(attributes: dict[str, Any], means: np.ndarray) -> LinearShapley:
    """Of the second class, whose coefficients and intercept come last."""
    coefficients, intercepts = _floats(attributes, "coefficients"), _floats(attributes, "intercepts")
    return LinearShapley(coefficients[-len(means) :], float(intercepts[-1]), means)


def _average(contract: ModelContract, prepare: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The means of the prepared columns over the reference rows.

    A column follows from one feature, and is linear in it but for a missing value and for categories.
    """
    rules = contract.read_rules()
    blank: dict[str, Any] = dict.fromkeys(contract.feature_names)
    start = prepare(rules.pack_named([blank]))[0].astype(np.float64)
    means = start.copy()
    for feature in contract.features:
        known = contract.reference[feature.name]
        shares: dict[Any, float] = known.shares
        if feature.kind == "numeric":
            shares = {} if known.mean is None else {known.mean: 1.0}
        if shares:
            moved = prepare(rules.pack_named([{**blank, feature.name: value} for value in shares])) - start
            means += np.array(list(shares.values())) @ moved.astype(np.float64) * (1 - known.missing_share)
    return np.asarray(means)


def _read_model(path: Path) -> Any:
    from google.protobuf.message import DecodeError

    try:
        return _describe_messages().FromString(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: the model cannot be read ({error.strerror})") from error
    except DecodeError as error:
        raise DataError(f"{path}: is no ONNX file ({error})") from error


def _open_preparation(path: Path, model: Any, output: str) -> Callable[[np.ndarray], np.ndarray]:
    """The part of a graph before the model: packed rows in, the columns that the model takes out."""
    import onnxruntime

    if output == INPUT_NAME:
        return lambda matrix: matrix
    del model.graph.output[:]
    model.graph.output.add(name=output)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no public base class
        raise DataError(f"{path}: no reasons: ONNX Runtime cannot run the graph up to {output} ({error})") from error

    def prepare(matrix: np.ndarray) -> np.ndarray:
        return np.asarray(session.run([output], {INPUT_NAME: matrix})[0], dtype=np.float32)

    return prepare


@cache
def _describe_messages() -> Any:
    """The class that decodes a model; fields that are not described above are kept as they are."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="closedloop_onnx.proto", package="closedloop_onnx", syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, is_repeated, of in fields:
            kinds = {"type": kind, "label": 3 if is_repeated else 1}
            message.field.add(name=field, number=number, type_name=f".closedloop_onnx.{of}" if of else None, **kinds)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("closedloop_onnx.Model"))


def _ints(attributes: dict[str, Any], name: str) -> np.ndarray:
    return np.array(attributes[name].ints, dtype=np.int64)


def _floats(attributes: dict[str, Any], name: str) -> np.ndarray:
    return np.array(attributes[name].floats if name in attributes else (), dtype=np.float64)
