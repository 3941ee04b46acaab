"""ONNX Runtime: scoring an exported graph; nothing else is needed where a model serves."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from closedloop.errors import DataError

INPUT_NAME = "features"
OUTPUT_NAME = "probability"


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
