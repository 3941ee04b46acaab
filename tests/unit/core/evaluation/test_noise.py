from __future__ import annotations

import numpy as np
import pytest

from closedloop.core.evaluation.noise import measure_noise_agreement

NAN = float("nan")


def test_noise_agreement_of_a_step_by_hand() -> None:
    # Rows sit one noise deviation below the step, so a share Phi(1) = .841 of them stays below it.
    matrix = np.full((20_000, 2), -0.01, dtype=np.float32)
    found = measure_noise_agreement(
        lambda rows: (rows[:, 0] >= 0).astype(float),
        matrix,
        scale=0.01,
        standard_deviations=[1.0, 0.0],
        threshold=0.5,
        seed=1,
    )
    assert found == pytest.approx(0.8413, abs=0.01)
    assert (matrix == np.float32(-0.01)).all()


def test_noise_leaves_codes_and_missing_values_alone() -> None:
    seen: list[np.ndarray] = []

    def record(rows: np.ndarray) -> np.ndarray:
        seen.append(rows)
        return np.zeros(len(rows))

    matrix = np.array([[1.0, 3.0, 5.0], [np.nan, 4.0, 6.0]], dtype=np.float32)
    agreement = measure_noise_agreement(
        record, matrix, scale=0.5, standard_deviations=[2.0, 0.0, NAN], threshold=0.5, seed=1
    )
    before, after = seen
    assert agreement == 1
    assert after.dtype == np.float32
    np.testing.assert_array_equal(before, matrix)
    np.testing.assert_array_equal(after[:, 1:], matrix[:, 1:])
    assert after[0, 0] != matrix[0, 0]
    assert np.isnan(after[1, 0])
