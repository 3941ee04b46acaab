"""Expected figures by hand, and against labels drawn from the probabilities they were computed from."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

from closedloop.core.monitoring.performance import Calibration, calibrate, expect, fall, realise

AS_THEY_ARE = Calibration(0.0, 1.0, 10**9)


def draw(rows: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.beta(1.2, 3.0, rows)
    return scores, (rng.random(rows) < scores).astype(int)


def test_figures_by_hand():
    found = expect([0.9, 0.2], AS_THEY_ARE, 0.5)
    assert found.accuracy == pytest.approx((0.9 + 0.8) / 2)
    assert found.brier == pytest.approx((0.09 + 0.16) / 2)
    assert found.churn_rate == pytest.approx(0.55)
    # pairs of churner and stayer: (0.9, 0.2) right with 0.9 * 0.8, (0.2, 0.9) wrong; a row with itself counts half
    right = 0.9 * 0.8 + (0.9 * 0.1 + 0.2 * 0.8) / 2
    assert found.roc_auc == pytest.approx(right / (1.1 * 0.9))
    assert found.accuracy_error == pytest.approx(0.05 / 2**0.5)
    with pytest.raises(ValueError, match="at least one"):
        expect([], AS_THEY_ARE, 0.5)


def test_calibration_is_a_logistic_regression():
    scores, labels = draw(20_000)
    distorted = scores**2
    found = calibrate(distorted, labels)
    logit = np.log(distorted / (1 - distorted))
    peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit[:, None], labels)
    assert (found.intercept, found.slope) == pytest.approx((peer.intercept_[0], peer.coef_[0, 0]), abs=1e-3)
    assert found.apply(distorted).mean() == pytest.approx(labels.mean(), abs=1e-4)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_calibrated_without_infinities(label):
    found = calibrate(np.linspace(0.01, 0.99, 100), np.full(100, label))
    assert np.isfinite(found.apply(np.array([0.0, 0.5, 1.0]))).all()


def test_expectations_hold_for_labels_drawn_from_them():
    scores, labels = draw(200_000)
    expected, found = expect(scores, AS_THEY_ARE, 0.3), realise(labels, scores, 0.3)
    assert found.accuracy == pytest.approx(((scores >= 0.3) == labels).mean())
    assert found.brier == pytest.approx(brier_score_loss(labels, scores))
    assert found.roc_auc == pytest.approx(roc_auc_score(labels, scores))
    assert found.expected == expected
    for name in ("accuracy", "brier", "roc_auc", "churn_rate"):
        assert getattr(expected, name) == pytest.approx(getattr(found, name), abs=0.005)


def test_harder_customers_lower_the_estimate():
    scores, _ = draw(5_000)
    hard = np.abs(scores - 0.5) < 0.25
    drop, drop_z = fall(expect(scores, AS_THEY_ARE, 0.5), expect(scores[hard], AS_THEY_ARE, 0.5))
    assert drop > 0.1
    assert drop_z > 10


def test_what_was_expected_is_what_the_scores_promise():
    """No figure of the model's own evaluation enters: scores that are too high stay wrong, however long."""
    scores, labels = draw(50_000)
    found = realise(labels, np.sqrt(scores), 0.5)
    assert found.expected.churn_rate == pytest.approx(np.sqrt(scores).mean())
    assert found.churn_rate < found.expected.churn_rate - 0.1


def test_one_class_has_no_auc():
    assert realise([0, 0], [0.1, 0.2], 0.5).roc_auc is None
