"""The pipeline: packing, what may be built, float32 thresholds, calibration and the decision threshold."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from closedloop.contract import CategoricalFeature, Feature, NumericFeature
from closedloop.core.evaluation.profit import count_profit
from closedloop.core.evaluation.value import CustomerValue, KeptCustomer
from closedloop.core.training.calibration import calibrate_pipeline, choose_threshold
from closedloop.core.training.estimators import (
    build_pipeline,
    describe_features,
    encode_frame,
    score,
)
from closedloop.core.training.model_types import MODEL_TYPES, SCIKIT_LEARN, find_model_type
from closedloop.core.training.trees import floor_float32, round_thresholds
from closedloop.errors import ConfigError, DataError
from tests.model_folders import pack_row
from tests.trained_folders import SMALL

TREE_TYPES = [name for name in MODEL_TYPES if not find_model_type(name).is_linear]


def make_rows(rows: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Two numeric columns, one that is never filled, and a category; churn depends on all that exist."""
    generator = np.random.default_rng(seed)
    frame = pd.DataFrame({"age": generator.normal(40, 10, rows), "spend": generator.gamma(2, 50, rows)})
    frame["empty"] = np.nan
    frame["plan"] = generator.choice(np.array(["basic", "plus", None], dtype=object), rows)
    logit = (frame["age"] - 40) / 10 + (frame["spend"] > 100) - (frame["plan"] == "plus")
    labels = np.asarray(generator.random(rows) < 1 / (1 + np.exp(-logit)))
    frame.loc[generator.random(rows) < 0.1, "age"] = np.nan
    return frame, labels


def fit(model_type: str, frame: pd.DataFrame, labels: np.ndarray, **options: Any) -> Any:
    features = describe_features(frame, ["age", "spend", "empty"], ["plan"])
    chosen = {"model_params": SMALL[model_type], "normalize": True, "feature_selection": None, "seed": 0}
    return build_pipeline(features, model_type=model_type, **{**chosen, **options}).fit(frame, labels)


def test_features_carry_ranges_and_sorted_categories() -> None:
    frame = pd.DataFrame({"a": [3.0, None, -1.5], "b": [np.nan] * 3, "c": ["y", None, "x"]})
    assert describe_features(frame, ["a", "b"], ["c"]) == (
        NumericFeature(name="a", minimum=-1.5, maximum=3.0),
        NumericFeature(name="b", minimum=None, maximum=None),
        CategoricalFeature(name="c", categories=("x", "y")),
    )


def test_features_keep_the_most_frequent_categories() -> None:
    frame = pd.DataFrame({"city": ["d", "c", "b", "b", "a", "d", "d"]})
    (city,) = describe_features(frame, [], ["city"], categories_max=3)
    assert isinstance(city, CategoricalFeature)
    assert city.categories == ("a", "b", "d")  # a and c are both seen once: the name decides


@pytest.mark.parametrize(
    ("frame", "numeric", "categorical", "message"),
    [
        (pd.DataFrame({"a": ["x"]}), ["a"], [], "column a: a numeric feature holds numbers"),
        (pd.DataFrame({"a": [1.0, math.inf]}), ["a"], [], "column a: inf in 1 row"),
        (pd.DataFrame({"a": [1.0, 1e300]}), ["a"], [], "column a: 1e\\+300 in 1 row"),
        (
            pd.DataFrame({"a": [0, 1]}),
            [],
            ["a"],
            "column a: found \\[0, 1\\], a categorical feature holds strings",
        ),
        (pd.DataFrame({"a": [1.0]}), ["b"], [], "column b is missing, found: a"),
    ],
)
def test_features_refuse_columns(frame: pd.DataFrame, numeric: list[str], categorical: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        describe_features(frame, numeric, categorical)


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(
        st.none() | st.floats(width=64, allow_infinity=False, min_value=-1e38, max_value=1e38), min_size=1
    ),
    words=st.lists(st.none() | st.sampled_from(["a", "b", "zz", "", "A"]), min_size=1),
)
def test_a_frame_packs_like_its_rows(numbers: list[float | None], words: list[str | None]) -> None:
    rows = max(len(numbers), len(words))
    frame = pd.DataFrame(
        {
            "word": pd.Series((words * rows)[:rows], dtype=object),
            "number": pd.Series((numbers * rows)[:rows], dtype=object),
        }
    )
    features: tuple[Feature, ...] = (
        CategoricalFeature(name="word", categories=("", "a", "b")),
        NumericFeature(name="number"),
    )
    packed = encode_frame(features, frame)
    assert packed.dtype == np.float32
    assert packed.shape == (rows, 2)
    one_by_one = np.vstack([pack_row(features, {"word": word, "number": number}) for word, number in frame.to_numpy()])
    np.testing.assert_array_equal(packed, one_by_one)


def test_encode_step_is_encode_frame_and_ignores_other_columns() -> None:
    frame, labels = make_rows(200, 0)
    features = describe_features(frame, ["age", "spend", "empty"], ["plan"])
    pipeline = fit("hist_gradient_boosting", frame, labels)
    shuffled = frame.assign(customer_id="1")[["plan", "customer_id", "empty", "spend", "age"]]
    np.testing.assert_array_equal(pipeline[0].transform(shuffled), encode_frame(features, frame))
    np.testing.assert_array_equal(score(pipeline, shuffled), score(pipeline, frame))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_model_learns_and_takes_gaps_and_unknown_categories(model_type: str) -> None:
    frame, labels = make_rows(600, 0)
    before = frame.copy()
    pipeline = fit(model_type, frame, labels)
    scores = score(pipeline, frame)
    # The Bayes rule is right in about 70 % of these rows; the majority class in about 55 %.
    assert ((scores >= 0.5) == labels).mean() > 0.62
    odd = pd.DataFrame({"age": [np.nan], "spend": [np.nan], "empty": [5.0], "plan": ["never seen"]})
    assert 0 < score(pipeline, odd)[0] < 1
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_same_seed_same_scores_whatever_the_jobs(model_type: str) -> None:
    frame, labels = make_rows(300, 0)
    jobs = {"n_jobs": 2} if model_type == "random_forest" else {}
    one = score(fit(model_type, frame, labels, feature_selection=3), frame)
    two = score(fit(model_type, frame, labels, feature_selection=3, model_params={**SMALL[model_type], **jobs}), frame)
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)


def test_selection_keeps_the_columns_that_matter() -> None:
    frame, labels = make_rows(2000, 0)
    noisy = frame.assign(empty=np.random.default_rng(1).normal(size=2000))
    pipeline = build_pipeline(
        describe_features(noisy, ["empty", "age", "spend"], ["plan"]),
        model_type="logistic_regression",
        model_params={},
        normalize=True,
        feature_selection=3,
        seed=0,
    ).fit(noisy, labels)
    # Of noise, age, spend, basic and plus, only these three have an effect of their own.
    assert pipeline["select"].get_support().tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_only_linear_models_are_scaled(model_type: str) -> None:
    features = (NumericFeature(name="a", minimum=0, maximum=1),)
    pipeline = build_pipeline(
        features, model_type=model_type, model_params={}, normalize=True, feature_selection=None, seed=0
    )
    assert ("StandardScaler" in repr(pipeline)) == (model_type == "logistic_regression")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model_params": {"depth": 3}},
            "depth is not allowed for hist_gradient_boosting; allowed: .*max_iter",
        ),
        ({"model_params": {"categorical_features": [0]}}, "categorical_features is not allowed"),
        ({"model_params": {"random_state": 1}}, "random_state is not allowed"),
        ({"model_params": {"max_leaf_nodes": 1}}, "'max_leaf_nodes' parameter"),
        ({"feature_selection": 4}, "feature_selection is 4, allowed: 1 to 3"),
        ({"feature_selection": 0}, "feature_selection is 0, allowed: 1 to 3"),
    ],
)
def test_settings_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    features: tuple[Feature, ...] = (
        NumericFeature(name="a", minimum=0, maximum=1),
        NumericFeature(name="all missing"),
        CategoricalFeature(name="b", categories=("x", "y")),
    )
    chosen: dict[str, Any] = {"model_type": "hist_gradient_boosting", "model_params": {}, "normalize": True}
    chosen |= {"feature_selection": None, "seed": 0}
    with pytest.raises(ConfigError, match=message):
        build_pipeline(features, **{**chosen, **options})


def test_features_without_any_value_are_refused() -> None:
    with pytest.raises(DataError, match="none of the 1 feature"):
        build_pipeline(
            (NumericFeature(name="a"),),
            model_type="random_forest",
            model_params={},
            normalize=False,
            feature_selection=None,
            seed=0,
        )


@given(st.floats(allow_nan=False))
def test_floor_is_the_largest_float32_below(value: float) -> None:
    floor = float(floor_float32(np.array([value]))[0])
    assert floor <= value
    assert floor == np.float32(floor)
    with np.errstate(over="ignore"):
        assert floor == value or float(np.nextafter(np.float32(floor), np.float32(np.inf))) > value


def make_neighbours() -> tuple[pd.DataFrame, np.ndarray]:
    """Values one float32 step apart, from a million on; the label changes at every other step."""
    base = np.float32(1_000_000)
    steps = [base]
    for _ in range(39):
        steps.append(np.nextafter(steps[-1], np.float32(np.inf)))
    values = np.repeat(np.array(steps, dtype=np.float64), 30)
    return pd.DataFrame({"x": values}), np.repeat(np.arange(40) // 2 % 2 == 1, 30)


def fit_neighbours(model_type: str) -> tuple[Any, pd.DataFrame]:
    frame, labels = make_neighbours()
    params: dict[str, dict[str, Any]] = {
        "random_forest": {"n_estimators": 5, "max_depth": None, "min_samples_leaf": 1},
        "gradient_boosting": {"n_estimators": 20, "max_depth": 6},
        "hist_gradient_boosting": {"max_iter": 20, "min_samples_leaf": 5},
    }
    pipeline = build_pipeline(
        describe_features(frame, ["x"], []),
        model_type=model_type,
        model_params=params[model_type],
        normalize=False,
        feature_selection=None,
        seed=0,
    )
    return pipeline.fit(frame, labels), frame


@pytest.mark.parametrize("model_type", [name for name in TREE_TYPES if name in SCIKIT_LEARN])
def test_rounding_changes_thresholds_but_no_decision(model_type: str) -> None:
    pipeline, frame = fit_neighbours(model_type)
    original = score(pipeline, frame)
    rounded = round_thresholds(pipeline)
    np.testing.assert_array_equal(score(rounded, frame), original)
    np.testing.assert_array_equal(score(pipeline, frame), original)

    model = rounded[-1]
    if model_type == "hist_gradient_boosting":
        after = np.concatenate([tree.nodes["num_threshold"] for (tree,) in model._predictors])
        before = np.concatenate([tree.nodes["num_threshold"] for (tree,) in pipeline[-1]._predictors])
    else:
        after = np.concatenate([tree.tree_.threshold for tree in np.ravel(model.estimators_)])
        before = np.concatenate([tree.tree_.threshold for tree in np.ravel(pipeline[-1].estimators_)])
    assert (after == after.astype(np.float32)).all()
    assert (before != before.astype(np.float32)).any(), "nothing to round: the rows do not test anything"
    # What the export would do by itself: to nearest, and that moves rows.
    assert (before.astype(np.float32) > before).any()


def test_rounding_reaches_into_a_calibrated_model() -> None:
    pipeline, frame = fit_neighbours("gradient_boosting")
    _, labels = make_neighbours()
    noisy = np.where(np.random.default_rng(0).random(len(labels)) < 0.4, ~labels, labels)
    calibrated, note = calibrate_pipeline(pipeline, frame, noisy, [str(row) for row in range(len(frame))])
    assert note.startswith("sigmoid")
    rounded = round_thresholds(calibrated)
    inner = rounded[-1].calibrated_classifiers_[0].estimator.estimator
    thresholds = np.concatenate([tree.tree_.threshold for tree in np.ravel(inner.estimators_)])
    assert (thresholds == thresholds.astype(np.float32)).all()
    np.testing.assert_array_equal(score(rounded, frame), score(calibrated, frame))


def test_calibration_repairs_an_overconfident_model() -> None:
    frame, labels = make_rows(3000, 0)
    validation, truth = make_rows(3000, 1)
    ids = [str(row) for row in range(3000)]
    overfit = fit(
        "hist_gradient_boosting",
        frame,
        labels,
        model_params={"max_iter": 200, "learning_rate": 0.5, "min_samples_leaf": 5},
    )
    found, note = calibrate_pipeline(overfit, validation, truth, ids)
    losses = re.match(r"sigmoid scores: held-out log loss raw (\S+), sigmoid (\S+)", note)
    assert float(losses[2]) < float(losses[1]) - 0.05
    # The mean score of Platt scaling is the base rate of the rows that it was fitted on: all of them.
    assert score(found, validation).mean() == pytest.approx(truth.mean(), abs=1e-3)


def test_calibration_leaves_a_calibrated_model_alone() -> None:
    frame, labels = make_rows(3000, 0)
    validation, truth = make_rows(2000, 1)
    pipeline = fit("logistic_regression", frame, labels)
    found, note = calibrate_pipeline(pipeline, validation, truth, [str(row) for row in range(2000)])
    assert note.startswith("raw")
    assert found is pipeline
    few, note = calibrate_pipeline(pipeline, validation[:30], np.arange(30) < 3, [str(row) for row in range(30)])
    assert few is pipeline
    assert "5 needed" in note


def test_threshold_given_as_a_number() -> None:
    assert choose_threshold(np.array([True]), np.array([0.5]), 0.35) == 0.35


def test_threshold_by_hand() -> None:
    labels = np.array([True, False, True, False, False])
    scores = np.array([0.9, 0.8, 0.6, 0.3, 0.1])
    # F1 by flagged rows: 1 -> 2/3, 2 -> 2/4, 3 -> 4/5, 4 -> 4/6. Three flagged: between 0.6 and 0.3.
    assert choose_threshold(labels, scores, "f1") == pytest.approx(0.45)
    # Accuracy: 1 flagged -> 4/5, 3 flagged -> 4/5: of 0.85 and 0.45 the latter is nearer to 0.5.
    assert choose_threshold(labels, scores, "accuracy") == pytest.approx(0.45)


@given(rows=st.lists(st.tuples(st.integers(-20, 80), st.integers(0, 20).map(lambda step: step / 20)), min_size=1))
def test_no_other_threshold_earns_more(rows: list[tuple[int, float]]) -> None:
    gains, scores = (np.array(column) for column in zip(*rows, strict=True))

    def earn(threshold: float) -> float:
        return float(gains[scores >= threshold].sum())

    found = choose_threshold(gains > 0, scores, "profit", gains)
    assert 0 <= found <= 1
    assert earn(found) == max(earn(threshold) for threshold in np.linspace(0, 1, 81))


def test_the_threshold_of_profit_by_hand() -> None:
    labels, scores = np.array([True, False, True, False, False]), np.array([0.9, 0.8, 0.6, 0.3, 0.1])
    value = CustomerValue(kept=KeptCustomer(number=100), offer_cost=5, save_rate=0.2)
    # Each churner brings 15 and each stayer costs 5: 15, 10, 25, 20, 15. Three flagged, where F1 is best too.
    assert choose_threshold(labels, scores, "profit", count_profit(labels, np.full(5, 100), value)) == pytest.approx(
        0.45
    )
    # The first alone is worth something: 95, and then 90 or less.
    kept = np.array([500.0, 1, 1, 1, 1])
    assert choose_threshold(labels, scores, "profit", count_profit(labels, kept, value)) == pytest.approx(0.85)


@given(
    rows=st.lists(st.tuples(st.booleans(), st.integers(0, 20).map(lambda step: step / 20)), min_size=2, max_size=30),
    rule=st.sampled_from(["accuracy", "f1"]),
)
def test_no_other_threshold_is_better(rows: list[tuple[bool, float]], rule: str) -> None:
    labels = np.array([label for label, _ in rows])
    scores = np.array([value for _, value in rows])
    if labels.all() or not labels.any():
        return

    def measure(threshold: float) -> float:
        flagged = scores >= threshold
        if rule == "accuracy":
            return float((flagged == labels).mean())
        return float(2 * (flagged & labels).sum() / (flagged.sum() + labels.sum()))

    found = choose_threshold(labels, scores, rule)
    assert 0 <= found <= 1
    assert measure(found) == max(measure(threshold) for threshold in np.linspace(0, 1, 81))
