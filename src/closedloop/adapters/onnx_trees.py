"""ONNX: the trees of classifiers that skl2onnx does not know, written as they are.

onnxmltools has converters too. They round LightGBM's thresholds to the nearest float32, which moves rows to the other
side, and do not say how many training rows its nodes have seen, which exact reasons need.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from closedloop.core.training.trees import GrownTrees


def register_trees(kind: type[Any]) -> None:
    """Let skl2onnx convert a class that lists its own trees."""
    from skl2onnx import update_registered_converter
    from skl2onnx.common.shape_calculator import calculate_linear_classifier_output_shapes

    update_registered_converter(
        kind,
        f"Closedloop{kind.__name__}",
        calculate_linear_classifier_output_shapes,
        _convert,
        # a sigmoid around it takes log-odds, as it does when it is fitted
        options={"zipmap": [True, False, "columns"], "nocl": [True, False], "raw_scores": [True, False]},
    )


def describe_trees(model: GrownTrees) -> dict[str, Any]:
    """Attributes of ONNX's TreeEnsembleClassifier: https://onnx.ai/onnx/operators/onnx_aionnxml_TreeEnsembleClassifier.html."""
    nodes = model.list_nodes()
    start = np.searchsorted(nodes.tree, nodes.tree)  # of a node's tree
    place = np.arange(len(nodes.tree)) - start
    leaf = nodes.is_leaf
    return {
        "nodes_treeids": nodes.tree,
        "nodes_nodeids": place,
        "nodes_featureids": nodes.column,
        "nodes_modes": np.where(leaf, "LEAF", "BRANCH_LEQ").tolist(),
        "nodes_values": nodes.threshold,
        "nodes_truenodeids": np.where(leaf, 0, nodes.yes - start),
        "nodes_falsenodeids": np.where(leaf, 0, nodes.no - start),
        "nodes_missing_value_tracks_true": nodes.is_missing_yes.astype(np.int64),
        "nodes_hitrates": nodes.cover.astype(np.float32),
        "class_treeids": nodes.tree[leaf],
        "class_nodeids": place[leaf],
        "class_ids": np.zeros(leaf.sum(), dtype=np.int64),
        "class_weights": nodes.value[leaf].astype(np.float32),
        "classlabels_int64s": [0, 1],
        "base_values": [float(model.intercept)],
    }


def _convert(scope: Any, operator: Any, container: Any) -> None:
    model = operator.raw_operator
    raw = container.get_options(model, {"raw_scores": False}).get("raw_scores")
    container.add_node(
        "TreeEnsembleClassifier",
        operator.input_full_names,
        operator.output_full_names,
        op_domain="ai.onnx.ml",
        op_version=1,
        name=scope.get_unique_operator_name("TreeEnsembleClassifier"),
        post_transform="NONE" if raw else "LOGISTIC",
        **describe_trees(model),
    )
