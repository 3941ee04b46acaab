"""Rows within a bound: the same ones whatever their order, and weights that stand for all."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from closedloop.core.training.draw import draw_rows
from closedloop.core.training.estimators import build_pipeline, describe_features, score
from closedloop.core.training.weights import WEIGHT, list_fit_weights

DAYS = pd.to_datetime(["2024-01-01", "2024-02-01", "2024-03-01"], utc=True).as_unit("us")


def make_rows(customers: int = 2_000) -> pd.DataFrame:
    draw = np.random.default_rng(5)
    rows = pd.DataFrame({"customer_id": np.tile([f"C{n}" for n in range(customers)], 3)})
    rows["event_timestamp"] = np.repeat(DAYS, customers)
    rows["churned"] = draw.random(len(rows)) < np.repeat([0.1, 0.3, 0.6], customers)
    rows["spend"] = draw.normal(size=len(rows)) + 2 * rows["churned"]
    return rows


def name_rows(rows: pd.DataFrame) -> set[tuple[str, pd.Timestamp]]:
    return set(zip(rows["customer_id"], rows["event_timestamp"], strict=True))


@given(seed=st.integers(0, 1000), rows_max=st.integers(1, 700))
def test_the_same_rows_are_drawn_in_any_order(seed: int, rows_max: int) -> None:
    rows = make_rows(200)
    drawn = draw_rows(rows, rows_max, salt="7")
    shuffled = draw_rows(rows.sample(frac=1, random_state=seed), rows_max, salt="7").sort_index()
    assert len(drawn) == min(rows_max, len(rows))
    assert drawn.drop(columns=WEIGHT).equals(shuffled.drop(columns=WEIGHT))
    assert np.allclose(drawn[WEIGHT], shuffled[WEIGHT])


def test_chunks_hold_the_draw_of_the_whole() -> None:
    rows = make_rows()
    chunks = [draw_rows(rows.iloc[start : start + 500], 300, salt="7") for start in range(0, len(rows), 500)]
    again = draw_rows(pd.concat(chunks), 300, salt="7")
    assert name_rows(again) == name_rows(draw_rows(rows, 300, salt="7"))
    assert again[WEIGHT].sum() == pytest.approx(len(rows))


def test_those_with_the_smallest_hashes_are_drawn_computed_by_hand() -> None:
    rows = make_rows(50)
    shares = [
        hashlib.sha256(f"rows 7\x1f{one}\x1f{int(day.timestamp()) * 1_000_000}".encode()).digest()[:8]
        for one, day in zip(rows["customer_id"], rows["event_timestamp"], strict=True)
    ]
    expected = rows.iloc[sorted(np.argsort(np.array([int.from_bytes(one, "big") >> 11 for one in shares]))[:40])]
    assert name_rows(draw_rows(rows, 40, salt="7")) == name_rows(expected)


def test_rows_that_came_later_leave_the_draw_of_the_earlier_ones_nested() -> None:
    rows = make_rows()
    small, large = (name_rows(draw_rows(rows, size, salt="7")) for size in (500, 2_000))
    assert small < large
    earlier = rows[rows["event_timestamp"] < DAYS[2]]
    kept = name_rows(draw_rows(rows, 900, salt="7")) & name_rows(earlier)
    assert kept <= name_rows(draw_rows(earlier, 900, salt="7"))


def test_the_weights_of_each_class_of_each_snapshot_add_up_to_its_rows() -> None:
    rows = make_rows()
    drawn = draw_rows(rows, 600, salt="7")
    cells = ["event_timestamp", "churned"]
    assert np.allclose(drawn.groupby(cells)[WEIGHT].sum(), rows.groupby(cells).size())
    assert drawn[WEIGHT].sum() == pytest.approx(len(rows))
    assert np.average(drawn["churned"], weights=drawn[WEIGHT]) == pytest.approx(rows["churned"].mean())


def test_the_sum_stands_for_all_where_a_class_was_not_drawn() -> None:
    rows = make_rows(400).assign(churned=False)
    rows.loc[3, "churned"] = True
    drawn = draw_rows(rows, 20, salt="7")
    assert not drawn["churned"].any()
    assert drawn[WEIGHT].sum() == pytest.approx(len(rows))


def test_a_row_that_repeats_counts_as_often() -> None:
    rows = make_rows(500).assign(repeats=np.tile([1, 3, 1], 500))
    drawn = draw_rows(rows, 400, salt="7")
    assert 398 <= drawn["repeats"].sum() <= 400
    assert (drawn[WEIGHT] * drawn["repeats"]).sum() == pytest.approx(rows["repeats"].sum())


def test_a_bound_that_is_not_reached_changes_nothing() -> None:
    rows = make_rows(100)
    drawn = draw_rows(rows, len(rows), salt="7")
    assert drawn.drop(columns=WEIGHT).equals(rows)
    assert (drawn[WEIGHT] == 1).all()


def test_half_of_a_draw_stands_for_all_too() -> None:
    rows = make_rows()
    drawn = draw_rows(rows, 1_000, salt="7")
    half = draw_rows(drawn, 500, salt="7")
    assert name_rows(half) == name_rows(draw_rows(rows, 500, salt="7"))
    assert half[WEIGHT].sum() == pytest.approx(len(rows))


@pytest.mark.parametrize("model_type", ["logistic_regression", "random_forest", "hist_gradient_boosting"])
def test_weights_reach_the_fit(model_type: str) -> None:
    rows = make_rows()
    rows[WEIGHT] = np.where(rows["churned"], 30.0, 1.0)
    means = []
    for frame in (rows, rows.drop(columns=WEIGHT)):
        features = describe_features(frame, ["spend"], [])
        asked = {"model_type": model_type, "model_params": {}, "normalize": True, "feature_selection": 1, "seed": 1}
        pipeline = build_pipeline(features, **asked)
        given = list_fit_weights(pipeline, frame)
        assert sorted(given) == (["model__sample_weight", "select__sample_weight"] if WEIGHT in frame else [])
        assert all(weights.mean() == pytest.approx(1) for weights in given.values())
        means.append(score(pipeline.fit(frame, frame["churned"].to_numpy(), **given), rows).mean())
    weighted, plain = means
    assert plain == pytest.approx(rows["churned"].mean(), abs=0.03)
    assert weighted > plain + 0.2


def test_a_classifier_without_weights_is_fitted_without() -> None:
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import Pipeline

    rows = make_rows(100).assign(**{WEIGHT: 2.0})
    assert list_fit_weights(Pipeline([("model", KNeighborsClassifier())]), rows) == {}
