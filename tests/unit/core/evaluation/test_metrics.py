from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from closedloop.core.evaluation.bootstrap import Bootstrap
from closedloop.core.evaluation.curves import tabulate_calibration, tabulate_curve, tabulate_lift
from closedloop.core.evaluation.metrics import (
    bootstrap_intervals,
    measure_classification,
    measure_groups,
    rank_auc,
    rank_top,
)
from closedloop.errors import DataError

LABELS = [0, 0, 0, 1, 1, 0, 1, 0]
SCORES = [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.5]


def draw_rows(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated scores u, uniform: AUC 5/6, accuracy at .5 3/4, Brier 1/6 and log loss 1/2 by integration."""
    generator = np.random.default_rng(seed)
    scores = generator.random(rows)
    return generator.random(rows) < scores, scores


def test_figures_computed_by_hand() -> None:
    figures = measure_classification(LABELS, SCORES, 0.5)
    # Sent out: .6 .7 .8 .5, of them .6 and .8 churned; missed: .4. Rejected rightly: .1 .2 .3.
    assert figures["accuracy"] == 5 / 8
    assert figures["precision"] == 2 / 4
    assert figures["recall"] == 2 / 3
    assert figures["f1"] == pytest.approx(4 / 7)
    assert figures["f1_weighted"] == pytest.approx((3 * 4 / 7 + 5 * 6 / 9) / 8)
    # Of 15 pairs the churner at .4 beats 3 stayers, the one at .6 beats 4, the one at .8 all 5.
    assert figures["roc_auc"] == pytest.approx(12 / 15)
    assert figures["average_precision"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 5) / 3)
    assert figures["brier"] == pytest.approx((0.01 + 0.04 + 0.09 + 0.36 + 0.16 + 0.49 + 0.04 + 0.25) / 8)
    kept = [0.9, 0.8, 0.7, 0.4, 0.6, 0.3, 0.8, 0.5]
    assert figures["log_loss"] == pytest.approx(-sum(map(math.log, kept)) / 8)
    assert figures["churn_rate"] == 3 / 8
    assert figures["predicted_rate"] == 4 / 8
    assert figures["mean_score"] == pytest.approx(3.6 / 8)
    assert figures["rows"] == 8


def test_a_score_at_the_threshold_counts_as_churn() -> None:
    assert measure_classification([0, 1], [0.2, 0.5], 0.5)["recall"] == 1.0


def test_calibration_error_of_two_groups_by_hand() -> None:
    # 50 rows at .2 of which 20 churn, 50 at .8 of which 40 churn: half the rows are off by .2.
    labels = [1] * 20 + [0] * 30 + [1] * 40 + [0] * 10
    scores = [0.2] * 50 + [0.8] * 50
    assert measure_classification(labels, scores, 0.5)["expected_calibration_error"] == pytest.approx(0.1)


def test_calibration_error_of_distinct_scores_equals_a_loop_over_tenths() -> None:
    labels, scores = draw_rows(1000, 3)
    order = np.argsort(scores)
    gaps = [abs(labels[part].mean() - scores[part].mean()) for part in np.array_split(order, 10)]
    found = measure_classification(labels, scores, 0.5)["expected_calibration_error"]
    assert found == pytest.approx(np.mean(gaps))


@pytest.mark.parametrize(
    ("labels", "scores", "threshold", "message"),
    [
        ([1, 1], [0.2, 0.3], 0.5, "only class 1 in 2 rows"),
        ([0, 1], [0.2, float("nan")], 0.5, "found nan in row 1"),
        ([0, 1], [0.2, 1.5], 0.5, "found 1.5 in row 1"),
        ([0, 2], [0.2, 0.5], 0.5, "other than 0 and 1"),
        ([0, 1, 1], [0.2, 0.5], 0.5, r"shapes \(3,\) and \(2,\)"),
        ([], [], 0.5, r"shapes \(0,\)"),
        ([0, 1], [0.2, 0.5], float("nan"), "threshold: found nan"),
    ],
)
def test_unusable_input_is_refused(labels: list[int], scores: list[float], threshold: float, message: str) -> None:
    for kind in (DataError, ValueError):
        with pytest.raises(kind, match=message):
            measure_classification(labels, scores, threshold)


def test_arguments_stay_as_they_are() -> None:
    labels, scores = np.array(LABELS), np.array(SCORES)
    measure_classification(labels, scores, 0.5)
    bootstrap_intervals(labels, scores, 0.5, Bootstrap(seed=1, samples=5))
    assert labels.tolist() == LABELS
    assert scores.tolist() == SCORES


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.5, 0.9]), st.integers(0, 3)), min_size=2, max_size=20
    )
)
def test_weighted_auc_equals_that_of_repeated_rows(rows: list[tuple[bool, float, int]]) -> None:
    labels, scores, counts = (np.array(column) for column in zip(*rows, strict=True))
    repeated = np.repeat(labels, counts)
    found = rank_auc(labels, scores)(counts.astype(float))
    if repeated.sum() in (0, len(repeated)):
        assert math.isnan(found)
    else:
        assert found == pytest.approx(reference.roc_auc_score(repeated, np.repeat(scores, counts)))


def test_intervals_equal_those_of_resampled_rows_measured_by_scikit_learn() -> None:
    labels, scores = draw_rows(80, 5)
    scores = scores.round(1)
    intervals = bootstrap_intervals(labels, scores, 0.5, Bootstrap(seed=11, samples=40, level=0.9))
    draws = []
    for counts in Bootstrap(11, 40).draw(80):
        picked = np.repeat(np.arange(80), counts.astype(int))
        actual, score = labels[picked], scores[picked]
        draws.append(
            (
                reference.accuracy_score(actual, score >= 0.5),
                reference.f1_score(actual, score >= 0.5, average="weighted"),
                reference.roc_auc_score(actual, score),
                reference.brier_score_loss(actual, score),
                reference.log_loss(actual, score),
            )
        )
    expected = np.quantile(draws, [0.05, 0.95], axis=0)
    np.testing.assert_allclose(
        [intervals[name] for name in ("accuracy", "f1_weighted", "roc_auc", "brier", "log_loss")],
        expected.T,
        rtol=1e-12,
    )


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    truth = {"accuracy": 3 / 4, "roc_auc": 5 / 6, "brier": 1 / 6, "log_loss": 1 / 2}
    hits = dict.fromkeys(truth, 0)
    for seed in range(120):
        intervals = bootstrap_intervals(*draw_rows(400, seed), 0.5, Bootstrap(seed=seed, samples=200))
        for name, value in truth.items():
            hits[name] += intervals[name].low <= value <= intervals[name].high
    # 95 % of 120 is 114; a binomial count leaves 105..120 once in a thousand.
    assert all(105 <= count <= 120 for count in hits.values()), hits


def test_same_seed_same_intervals() -> None:
    labels, scores = draw_rows(100, 2)
    first = bootstrap_intervals(labels, scores, 0.5, Bootstrap(seed=4, samples=50))
    assert first == bootstrap_intervals(labels, scores, 0.5, Bootstrap(seed=4, samples=50))
    assert first != bootstrap_intervals(labels, scores, 0.5, Bootstrap(seed=5, samples=50))


def test_repeating_every_customers_row_does_not_narrow_the_intervals() -> None:
    labels, scores = draw_rows(200, 7)
    ids = np.arange(200)
    once = bootstrap_intervals(labels, scores, 0.5, Bootstrap(seed=1, samples=100, customers=ids))
    assert once == bootstrap_intervals(labels, scores, 0.5, Bootstrap(seed=1, samples=100))
    four_times = bootstrap_intervals(
        np.repeat(labels, 4), np.repeat(scores, 4), 0.5, Bootstrap(seed=1, samples=100, customers=np.repeat(ids, 4))
    )
    np.testing.assert_allclose(list(four_times.values()), list(once.values()), rtol=1e-12)


def test_resamples_draw_whole_customers() -> None:
    for counts in Bootstrap(0, 20, customers=["a", "b", "a", "c", "b"]).draw(5):
        assert counts[0] == counts[2]
        assert counts[1] == counts[4]
        assert counts[0] + counts[1] + counts[3] == 3


def test_a_missing_customer_is_refused() -> None:
    with pytest.raises(DataError, match="allowed are 2 without a missing one"):
        bootstrap_intervals([0, 1], [0.1, 0.2], 0.5, Bootstrap(seed=1, customers=["a", None]))


def test_groups_by_hand() -> None:
    table = measure_groups(LABELS, SCORES, 0.5, ["b", "a", "a", "a", "b", "b", "b", None], minimum_rows=3)
    assert table["group"].tolist() == ["(missing)", "a", "b"]
    assert table["rows"].tolist() == [1, 3, 4]
    assert table["enough_rows"].tolist() == [False, True, True]
    # a: .2 and .3 stayed, .4 churned and was missed; b: .1 stayed, .6 and .8 churned, .7 was a false alarm.
    assert table["accuracy"].tolist() == pytest.approx([0, 2 / 3, 3 / 4])
    assert math.isnan(table["roc_auc"][0])
    assert table["roc_auc"].tolist()[1:] == [1.0, 3 / 4]
    assert table["churn_rate"].tolist() == pytest.approx([0, 1 / 3, 2 / 4])
    assert table["predicted_rate"].tolist() == [1, 0, 3 / 4]


def test_groups_must_match_rows() -> None:
    with pytest.raises(DataError, match="found 1 value, allowed are 2"):
        measure_groups([0, 1], [0.1, 0.2], 0.5, ["a"], minimum_rows=1)


def test_calibration_table_does_not_depend_on_row_order() -> None:
    labels, scores = draw_rows(300, 1)
    scores = scores.round(1)
    mixed = np.random.default_rng(0).permutation(300)
    table = tabulate_calibration(labels, scores, 5)
    pd.testing.assert_frame_equal(table, tabulate_calibration(labels[mixed], scores[mixed], 5))
    assert table["rows"].sum() == 300
    assert (table["lowest_score"].to_numpy()[1:] > table["highest_score"].to_numpy()[:-1]).all()


def test_calibration_table_by_hand() -> None:
    table = tabulate_calibration([0, 0, 1, 1], [0.1, 0.3, 0.4, 0.8], 2)
    assert table["bin"].tolist() == [1, 2]
    assert table["rows"].tolist() == [2, 2]
    assert table["mean_score"].tolist() == pytest.approx([0.2, 0.6])
    assert table["churn_rate"].tolist() == [0, 1]
    constant = tabulate_calibration([0, 1, 1], [0.5, 0.5, 0.5], 10)
    assert constant["rows"].tolist() == [3]


def test_lift_by_hand() -> None:
    # 20 rows, 4 churners: two in the highest decile, one in the second, one in the lowest.
    scores = np.arange(20) / 20
    labels = np.isin(np.arange(20), [19, 18, 17, 0])
    table = tabulate_lift(labels, scores)
    assert table["decile"].tolist() == list(range(1, 11))
    assert table["churners"].tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert table["lift"].tolist()[:3] == pytest.approx([1 / 0.2, 0.5 / 0.2, 0])
    assert table["captured_share"].tolist()[:2] == [0.5, 0.75]
    assert table["contacted_share"].tolist() == pytest.approx(np.arange(1, 11) / 10)
    assert table["captured_share"].iloc[-1] == 1


@pytest.mark.parametrize(
    ("kind", "x", "y"),
    [("roc", "false_positive_rate", "true_positive_rate"), ("precision_recall", "recall", "precision")],
)
def test_every_point_of_a_curve_is_what_its_threshold_gives(kind: str, x: str, y: str) -> None:
    labels, scores = draw_rows(3000, 9)
    table = tabulate_curve(labels, scores, kind)  # type: ignore[arg-type]
    assert len(table) == 200
    assert table["threshold"].isna().sum() == 1
    for point in table.dropna().iloc[::20].itertuples():
        sent = scores >= point.threshold
        hits = (sent & labels).sum()
        if kind == "roc":
            expected = ((sent & ~labels).sum() / (~labels).sum(), hits / labels.sum())
        else:
            expected = (hits / labels.sum(), hits / sent.sum())
        assert (getattr(point, x), getattr(point, y)) == pytest.approx(expected)
    ends = table[[x, y]].iloc[[0, -1]].to_numpy().tolist()
    assert ends == ([[0, 0], [1, 1]] if kind == "roc" else [[1, pytest.approx(labels.mean())], [0, 1]])


def test_a_short_curve_keeps_all_points() -> None:
    assert len(tabulate_curve([0, 1, 1], [0.1, 0.5, 0.9], "roc")) == 4


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.5, 0.9]), st.integers(0, 3)), min_size=2, max_size=20
    )
)
def test_weighted_precision_and_lift_equal_those_of_repeated_rows(rows: list[tuple[bool, float, int]]) -> None:
    labels, scores, counts = (np.array(column) for column in zip(*rows, strict=True))
    gain, lift = rank_top(labels, scores)
    repeated, ranked = np.repeat(labels, counts), np.repeat(scores, counts)
    if not repeated.sum():
        assert math.isnan(gain(counts.astype(float)))
        assert math.isnan(lift(counts.astype(float)))
        return
    expected = reference.average_precision_score(repeated, ranked) - repeated.mean()
    assert gain(counts.astype(float)) == pytest.approx(expected)
    # each score's rows in equal parts: the mean over every order of ties
    top, caught = len(ranked) / 10, 0.0
    for score in sorted(set(ranked), reverse=True):
        tied = repeated[ranked == score]
        taken = min(top, len(tied))
        caught, top = caught + taken * tied.mean(), top - taken
    assert lift(counts.astype(float)) == pytest.approx(caught / (len(ranked) / 10) / repeated.mean())
