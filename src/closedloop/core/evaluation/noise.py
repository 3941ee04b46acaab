"""How many decisions survive small noise on the numeric features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt


def measure_noise_agreement(
    score_function: Callable[[npt.NDArray[np.floating]], npt.ArrayLike],
    matrix: npt.NDArray[np.floating],
    *,
    scale: float,
    standard_deviations: npt.ArrayLike,
    threshold: float,
    seed: int,
) -> float:
    """Share of decisions that small Gaussian noise on the numeric features leaves as they are, in [0, 1].

    Parameters
    ----------
    score_function : callable
        From a matrix like ``matrix`` to scores, shape (n,).
    matrix : ndarray, shape (n, features), float32 or float64
        Missing values (nan) stay missing. Not changed.
    scale : float
        Noise's standard deviation in units of the feature's.
    standard_deviations : array-like, shape (features,)
        Of each feature in training; 0 or nan leaves the column alone, as coded categories must be.
    """
    deviations = np.nan_to_num(np.asarray(standard_deviations, dtype=np.float64))
    noise = np.random.default_rng(seed).standard_normal(matrix.shape) * (scale * deviations)
    noisy = (matrix + noise).astype(matrix.dtype)
    before, after = np.asarray(score_function(matrix)), np.asarray(score_function(noisy))
    return float(np.mean((before >= threshold) == (after >= threshold)))
