"""What a recalibration wins back: how often it is found where there is nothing, and how much where there is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from closedloop.core.monitoring.gain import estimate_gain, score_calibration


def draw(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.beta(1.2, 3.0, rows)
    return scores, (rng.random(rows) < scores).astype(int)


def shift(scores: np.ndarray, by: float, slope: float = 1.0) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-(by + slope * np.log(scores / (1 - scores))))))


def test_scores_that_are_right_gain_nothing() -> None:
    """At a lower end of 2.33 standard errors one window in a hundred may say otherwise."""
    lows = []
    for seed in range(200):
        scores, labels = draw(800, seed)
        found = estimate_gain(labels, scores, np.arange(800))
        lows.append(found.mean - norm.isf(0.01) * found.error)
    assert np.mean(np.array(lows) > 0) <= 0.03


@pytest.mark.parametrize(("by", "slope"), [(0.8, 1.0), (0.0, 0.5), (-0.5, 1.5)])
def test_the_gain_is_that_of_the_true_recalibration(by: float, slope: float) -> None:
    scores, labels = draw(20_000, 5)
    wrong = shift(scores, by, slope)
    found = estimate_gain(labels, wrong, np.arange(20_000))
    true = -np.log(np.where(labels == 1, wrong, 1 - wrong)) + np.log(np.where(labels == 1, scores, 1 - scores))
    assert found.mean == pytest.approx(true.mean(), abs=0.001)
    assert found.mean > 5 * found.error
    # it maps the wrong log odds back to the right ones
    assert (found.intercept, found.slope) == pytest.approx((-by / slope, 1 / slope), abs=0.06)


def test_rows_of_one_customer_make_it_no_surer() -> None:
    scores, labels = draw(1_000, 6)
    once = estimate_gain(labels, shift(scores, 0.8), np.arange(1_000))
    often = estimate_gain(*(np.tile(each, 9) for each in (labels, shift(scores, 0.8), np.arange(1_000))))
    assert (often.mean, often.error) == pytest.approx((once.mean, once.error), rel=0.01)
    assert often.customers == 1_000


def test_one_class_alone_and_missing_customers_give_figures() -> None:
    found = estimate_gain(np.zeros(600, int), np.full(600, 0.3), np.full(600, None))
    assert np.isfinite(found).all()
    assert found.customers == 600
    assert found.mean > 0.3


def test_a_customers_rows_count_together_in_the_test_of_calibration():
    """By hand: 30 customers with residuals of 0.5 and 10 with -0.5, each on one row or on ten."""
    labels, customers = [1] * 30 + [0] * 10, list(range(40))
    once = score_calibration(labels, [0.5] * 40, customers)
    assert once == pytest.approx((30 * 0.5 - 10 * 0.5) / (40 * 0.25) ** 0.5)
    often = score_calibration(labels * 10, [0.5] * 400, customers * 10)
    assert often == pytest.approx(once)
    assert score_calibration([0, 1], [0.0, 1.0], ["a", None]) == 0.0
