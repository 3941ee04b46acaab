"""Dynamic quantisation of an ONNX graph, by ONNX Runtime's own tool."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path


def quantise_model(path: Path, target: Path) -> bool:
    """Write a graph whose weights are 8-bit integers; False if nothing of it can be, as in trees.

    ONNX Runtime quantises matrix products, convolutions and the like. The operators of ``ai.onnx.ml``, which models of
    scikit-learn become, stay as they are.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it recommends to everybody a preparation that is meant for images
    try:
        quantize_dynamic(path, target)
    finally:
        logging.disable(before)
    operators = [Counter(node.op_type for node in onnx.load(file).graph.node) for file in (path, target)]
    return operators[0] != operators[1]
