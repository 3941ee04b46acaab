from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss
from sklearn.tree import DecisionTreeClassifier

from closedloop.core.evaluation.bootstrap import Bootstrap
from closedloop.core.evaluation.trivial import RecencyRule, fit_recency_rule, measure_gains, score_recency


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=30))
def test_recency_rule_is_the_best_stump(rows: list[tuple[int, bool]]) -> None:
    days, labels = (np.array(column) for column in zip(*rows, strict=True))
    rule = fit_recency_rule(days, labels)
    accuracy = np.mean(rule.predict(days) == labels)
    # Independent: scikit-learn's stump is as good or, as it optimises impurity, worse; every rule is tried by hand.
    stump = DecisionTreeClassifier(max_depth=1, random_state=0).fit(days.reshape(-1, 1), labels)
    assert accuracy >= stump.score(days.reshape(-1, 1), labels) - 1e-12
    assert accuracy >= max(labels.mean(), 1 - labels.mean()) - 1e-12
    tried = [np.mean(RecencyRule(t, up).predict(days) == labels) for t in range(-1, 9) for up in (True, False)]
    assert accuracy == max(tried)


def test_recency_rule_finds_the_direction() -> None:
    assert fit_recency_rule([1, 2, 40, 50], [1, 1, 0, 0]) == RecencyRule(2.0, churns_above=False)
    assert fit_recency_rule([1, 2, 40, 50], [0, 0, 1, 1]).predict([2.0, 2.1]).tolist() == [False, True]


def test_recency_scores_are_the_rates_of_both_sides() -> None:
    days, labels = np.array([1, 2, 3, 4, 40, 50, 60]), np.array([0, 1, 0, 0, 1, 1, 1])
    scores = score_recency(days, labels, np.array([4, 5, 1000]))
    # cut at 4 days: 1 of 4 churned up to it, 3 of 3 above, with half a churner and half a stayer added to each
    np.testing.assert_allclose(scores, [1.5 / 5, 3.5 / 4, 3.5 / 4])


def draw_rows(rows: int, seed: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and scores that are the true probabilities; ``strength`` 0 says nothing."""
    generator = np.random.default_rng(seed)
    scores = 1 / (1 + np.exp(-(strength * generator.normal(size=rows) - 1.8)))
    return (generator.random(rows) < scores).astype(int), scores


def test_gains_equal_scikit_learns() -> None:
    labels, scores = draw_rows(2000, 1, 1.5)
    rates = np.full(2000, 0.2)
    found = measure_gains(labels, scores, 0.5, {"rate": rates}, Bootstrap(seed=2, samples=100))["rate"]
    assert found.log_loss_gain == pytest.approx(1 - log_loss(labels, scores) / log_loss(labels, rates))
    assert found.accuracy_lead == pytest.approx(accuracy_score(labels, scores >= 0.5) - (labels == 0).mean())
    assert found.log_loss_interval.low < found.log_loss_gain < found.log_loss_interval.high


def test_a_useful_model_that_is_no_more_accurate_gains_and_a_lucky_one_does_not() -> None:
    """Of few churners hardly any is above .5: accuracy cannot tell, and the log loss can."""
    labels, useful = draw_rows(5000, 3, 1.5)
    rates = np.full(5000, labels.mean())
    bootstrap = Bootstrap(seed=4, samples=300)
    cautious = np.clip(useful, 0, 0.49)
    found = measure_gains(labels, cautious, 0.5, {"rate": rates}, bootstrap)["rate"]
    assert found.accuracy_lead == 0
    assert found.log_loss_interval.low > 0.1
    lucky = rates.copy()
    lucky[np.flatnonzero(labels)[:5]] = 0.6  # five customers called, all rightly
    lucky[np.flatnonzero(labels == 0)[:3]] = 0.6
    found = measure_gains(labels, lucky, 0.5, {"rate": rates}, bootstrap)["rate"]
    assert found.accuracy_lead > 0
    assert found.log_loss_interval.low < 0.01
