from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, chi2
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from closedloop.core.evaluation.bootstrap import Bootstrap
from closedloop.core.evaluation.comparison import Comparison, compare_models
from closedloop.errors import DataError


def draw_rows(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and scores that are the true probabilities."""
    generator = np.random.default_rng(seed)
    scores = generator.beta(1.0, 2.0, rows)
    return (generator.random(rows) < scores).astype(int), scores


def blur(scores: np.ndarray, scale: float, seed: int = 99) -> np.ndarray:
    """The same scores with noise on the log odds."""
    noise = np.random.default_rng(seed).normal(0, scale, len(scores))
    return 1 / (1 + np.exp(-(np.log(scores / (1 - scores)) + noise)))


def compare(labels: Any, champion: Any, challenger: Any, **settings: Any) -> Comparison:
    drawn = {name: settings.pop(name) for name in ("samples", "customers") if name in settings}
    settings = {"champion_threshold": 0.5, "challenger_threshold": 0.5, **settings}
    bootstrap = Bootstrap(seed=3, **{"samples": 300, **drawn})
    return compare_models(labels, champion, challenger, **settings, bootstrap=bootstrap)


def test_clearly_better_wins_and_swapped_loses() -> None:
    labels, sharp = draw_rows(2000, 1)
    blurred = blur(sharp, 1.5)
    better, worse = compare(labels, blurred, sharp), compare(labels, sharp, blurred)
    assert better.verdict == "win"
    assert better.auc_interval.low > 0 > better.log_loss_interval.high
    assert worse.verdict == "lose"
    assert worse.auc_difference == -better.auc_difference
    assert worse.log_loss_difference == -better.log_loss_difference
    assert worse.auc_interval == pytest.approx((-better.auc_interval.high, -better.auc_interval.low))
    assert worse.log_loss_interval == pytest.approx((-better.log_loss_interval.high, -better.log_loss_interval.low))
    assert worse.mcnemar_p == better.mcnemar_p


def test_differences_equal_scikit_learns() -> None:
    labels, sharp = draw_rows(500, 2)
    blurred = blur(sharp, 1.0)
    found = compare(labels, blurred, sharp, champion_threshold=0.4)
    assert found.auc_difference == pytest.approx(roc_auc_score(labels, sharp) - roc_auc_score(labels, blurred))
    assert found.log_loss_difference == pytest.approx(log_loss(labels, sharp) - log_loss(labels, blurred))
    expected = accuracy_score(labels, sharp >= 0.5) - accuracy_score(labels, blurred >= 0.4)
    assert found.accuracy_difference == pytest.approx(expected)
    assert (found.rows, found.customers) == (500, 500)


def test_identical_scores_are_inconclusive_with_zero_differences() -> None:
    labels, scores = draw_rows(500, 3)
    found = compare(labels, scores, scores)
    assert found.verdict == "inconclusive"
    assert (found.auc_difference, found.log_loss_difference, found.accuracy_difference) == (0, 0, 0)
    assert found.auc_interval == found.log_loss_interval == (0, 0)
    assert found.mcnemar_p == 1
    assert "no difference beyond chance" in found.reason


def test_equally_good_models_are_inconclusive() -> None:
    labels, scores = draw_rows(1000, 4)
    found = compare(labels, blur(scores, 0.05, seed=1), blur(scores, 0.05, seed=2))
    assert found.verdict == "inconclusive"
    assert found.auc_interval.low < 0 < found.auc_interval.high


def test_equally_good_models_rarely_win_or_lose() -> None:
    verdicts = []
    for seed in range(60):
        labels, scores = draw_rows(300, seed)
        champion, challenger = blur(scores, 0.5, seed=1000 + seed), blur(scores, 0.5, seed=2000 + seed)
        verdicts.append(compare(labels, champion, challenger, samples=150).verdict)
    # At most 5 % each way: 3 of 60 expected, 9 or more once in about 300.
    assert verdicts.count("win") <= 8
    assert verdicts.count("lose") <= 8


def test_worse_calibration_alone_loses() -> None:
    labels, scores = draw_rows(2000, 5)
    found = compare(labels, scores, scores**3)
    assert found.auc_difference == 0
    assert found.auc_interval == (0, 0)
    assert found.verdict == "lose"


def test_log_loss_decides_where_the_ranking_is_better() -> None:
    labels, scores = draw_rows(3000, 6)
    # The challenger ranks better but is far too sure; the champion ranks worse and is calibrated well enough.
    found = compare(labels, blur(scores, 1.0), scores**6)
    assert found.auc_interval.low > 0
    assert found.log_loss_interval.low > 0
    assert found.verdict == "lose"


def test_a_small_loss_of_ranking_does_not_outweigh_a_gain_in_log_loss() -> None:
    labels, scores = draw_rows(8000, 6)
    found = compare(labels, scores**3, blur(scores, 0.25))
    assert -0.02 < found.auc_interval.high < 0  # certain, and small
    assert found.log_loss_interval.high < 0
    assert found.verdict == "win"


def test_a_large_loss_of_ranking_is_no_win() -> None:
    labels, scores = draw_rows(8000, 6)
    found = compare(labels, scores**6, blur(scores, 1.2))
    assert found.auc_interval.high < -0.02
    assert found.log_loss_interval.high < 0
    assert found.verdict == "inconclusive"
    assert "AUC falls by more than 0.02" in found.reason


def test_repeated_customers_make_the_comparison_more_careful() -> None:
    labels, scores = draw_rows(200, 8)
    challenger = blur(scores, 0.6)
    once = compare(labels, challenger, scores)
    ids = np.repeat(np.arange(200), 10).astype(str)
    rows = [np.repeat(values, 10) for values in (labels, challenger, scores)]
    clustered = compare(*rows, customers=ids)
    assert (clustered.rows, clustered.customers) == (2000, 200)
    np.testing.assert_allclose(clustered.log_loss_interval, once.log_loss_interval, rtol=1e-9)
    as_if_independent = compare(*rows)
    width = once.log_loss_interval.high - once.log_loss_interval.low
    narrow = as_if_independent.log_loss_interval.high - as_if_independent.log_loss_interval.low
    # Ten times the rows, sqrt(10) = 3.2 times the certainty, all of it imagined.
    assert 2.5 < width / narrow < 4


@pytest.mark.parametrize(
    ("customers", "churners", "message"),
    [(29, 100, "29 customers: too few"), (400, 9, "one class has 9 rows")],
)
def test_too_little_evidence_is_inconclusive_however_good_it_looks(customers: int, churners: int, message: str) -> None:
    labels = np.arange(400) < churners
    blind, perfect = np.full(400, 0.3), np.where(labels, 0.9, 0.1)
    found = compare(labels, blind, perfect, customers=np.arange(400) % customers)
    assert found.verdict == "inconclusive"
    assert message in found.reason


def test_the_least_evidence_that_is_enough() -> None:
    labels = np.arange(400) < 10
    perfect = np.where(labels, 0.9, 0.1)
    assert compare(labels, np.full(400, 0.3), perfect, customers=np.arange(400) % 30).verdict == "win"


@pytest.mark.parametrize(("only_champion", "only_challenger"), [(2, 9), (0, 24), (30, 12), (5, 20)])
def test_mcnemar_by_formula(only_champion: int, only_challenger: int) -> None:
    # All decisions differ only where one model is wrong: labels 0, the wrong model says .9.
    rows = 200
    labels = np.zeros(rows, int)
    labels[-50:] = 1
    champion, challenger = np.where(labels == 1, 0.9, 0.1), np.where(labels == 1, 0.9, 0.1)
    challenger[:only_champion] = 0.9
    champion[50 : 50 + only_challenger] = 0.9
    found = compare(labels, champion, challenger, samples=20)
    disagreeing = only_champion + only_challenger
    if disagreeing < 25:
        expected = min(1.0, 2 * binom.cdf(min(only_champion, only_challenger), disagreeing, 0.5))
    else:
        expected = chi2.sf((abs(only_champion - only_challenger) - 1) ** 2 / disagreeing, 1)
    assert found.mcnemar_p == pytest.approx(expected)
    assert found.accuracy_difference == pytest.approx((only_challenger - only_champion) / rows)


def test_one_class_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="only class 0"):
        compare([0, 0], [0.1, 0.2], [0.1, 0.2])
    with pytest.raises(DataError, match="shapes"):
        compare([0, 1], [0.1, 0.2], [0.1, 0.2, 0.3])


def test_same_seed_same_comparison() -> None:
    labels, scores = draw_rows(100, 7)
    other = blur(scores, 0.3)
    assert compare(labels, scores, other) == compare(labels, scores, other)
