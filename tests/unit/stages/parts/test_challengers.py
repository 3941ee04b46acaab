"""Which of a training's sizes is taken."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from closedloop.config.featureset import FeatureSet
from closedloop.config.params import Params, parse_params
from closedloop.core.training.model_types import SCIKIT_LEARN
from closedloop.stages.parts.challengers import fit_best, fit_recent, fit_sizes

COLUMNS = tuple(f"x{number}" for number in range(8))
FEATURES = FeatureSet(COLUMNS, (), "drawn")
SMALL = dict(SCIKIT_LEARN["hist_gradient_boosting"].small)


def draw_rows(customers: int, snapshots: int, seed: int) -> pd.DataFrame:
    """Customers who hardly move from week to week: a row in each snapshot, with an outcome that overlaps the last."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(customers, len(COLUMNS)))
    odds = np.where(values[:, 0] * values[:, 1] > 0, 1, -1) * values[:, 2] + values[:, 3:6].sum(axis=1) / 2
    churned = generator.random(customers) < 1 / (1 + np.exp(-odds))
    weeks = []
    for week in range(snapshots):
        some = pd.DataFrame(values + 0.02 * generator.normal(size=values.shape), columns=list(COLUMNS))
        some["customer_id"], some["churned"] = [f"C{seed}-{one}" for one in range(customers)], churned
        some["event_timestamp"] = pd.Timestamp("2024-01-01", tz="UTC") + pd.Timedelta(weeks=week)
        weeks.append(some)
    return pd.concat(weeks, ignore_index=True)


def make_params(kind: str = "hist_gradient_boosting") -> Params:
    return parse_params({"dataset": "d", "as_of": "2024-05-31", "seed": 7, "model": {"type": kind}}, "params.yaml")


@pytest.mark.parametrize(("customers", "snapshots", "chosen"), [(400, 12, SMALL), (20_000, 1, {})])
def test_few_customers_get_a_small_model_however_many_rows_they_have(
    customers: int, snapshots: int, chosen: dict[str, object]
) -> None:
    rows = {"train": draw_rows(customers, snapshots, 1), "validation": draw_rows(2_000, 1, 2)}
    assert fit_best(make_params(), FEATURES, {}, rows).hyper_parameters == chosen


def test_hyper_parameters_that_are_given_or_found_are_the_only_ones() -> None:
    rows = {"train": draw_rows(300, 1, 1), "validation": draw_rows(300, 1, 2)}
    assert [one.hyper_parameters for one in fit_sizes(make_params(), FEATURES, {"max_iter": 9}, rows)] == [
        {"max_iter": 9}
    ]
    assert len(fit_sizes(make_params("logistic_regression"), FEATURES, {}, rows)) == 1


def test_the_newest_snapshots_alone_train_small_models_where_all_of_them_do() -> None:
    rows = {"train": draw_rows(400, 12, 1), "validation": draw_rows(400, 1, 2)}
    for size, trained in ({}, 2), (SMALL, 1):
        whole = fit_sizes(make_params(), FEATURES, size, rows)[-1 if size else 0]
        found = fit_recent(make_params(), FEATURES, whole, rows)
        assert [one.recent_share for one in found] == [share for share in (3, 6, 12) for _ in range(trained)]
        assert [one.hyper_parameters for one in found] == ([{}, SMALL] if trained == 2 else [SMALL]) * 3


def test_what_was_trained_is_said_with_its_size() -> None:
    rows = {"train": draw_rows(400, 12, 1), "validation": draw_rows(400, 1, 2)}
    default, small = fit_sizes(make_params(), FEATURES, {}, rows)
    assert (default.kind, small.kind) == ("training", "training of a smaller model")
    for whole, kinds in (default, (default.kind, small.kind)), (small, (small.kind,)):
        found = [one.kind for one in fit_recent(make_params(), FEATURES, whole, rows)]
        assert found[: len(kinds)] == [f"{kind} on the newest 4 snapshots" for kind in kinds]
