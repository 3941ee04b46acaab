"""ONNX Runtime: score with an exported graph; serving a model needs no other library."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from closedloop.errors import DataError

INPUT_NAME = "features"
OUTPUT_NAME = "probability"


class OnnxScorer:
    """An exported model in ONNX Runtime; scores differ by up to 5e-7 with the number of rows and threads."""

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

    def score(self, matrix: np.ndarray, *, seconds: float | None = None) -> np.ndarray:
        """Probability of churn: float32 (n, n_features) in, float64 in [0, 1] of shape (n,) out.

        Parameters
        ----------
        seconds
            Time limit for the graph. It costs a thread, so only the proof of a version sets it.

        Raises
        ------
        DataError
            If the matrix has another type or width, or the time limit is reached.
        """
        if matrix.dtype != np.float32 or matrix.ndim != 2 or matrix.shape[1] != self.n_features:
            raise DataError(f"the model takes float32 (n, {self.n_features}), found {matrix.dtype} {matrix.shape}")
        if not len(matrix):
            return np.empty(0, dtype=np.float64)
        if seconds is None:
            found = self._session.run([OUTPUT_NAME], {INPUT_NAME: matrix})[0]
        else:
            found = self._run_within(matrix, seconds)
        return np.asarray(found, dtype=np.float64).reshape(-1)

    def _run_within(self, matrix: np.ndarray, seconds: float) -> np.ndarray:
        from onnxruntime import RunOptions

        options = RunOptions()
        options.log_severity_level = 4
        timer = threading.Timer(seconds, setattr, (options, "terminate", True))
        timer.daemon = True
        timer.start()
        try:
            found: np.ndarray = self._session.run([OUTPUT_NAME], {INPUT_NAME: matrix}, options)[0]
        except Exception as error:
            if options.terminate:
                raise DataError(f"the graph gives no score within {seconds:g} s") from error
            raise
        finally:
            timer.cancel()
        return found
