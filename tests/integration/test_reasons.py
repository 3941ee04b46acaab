"""Reasons of really trained and exported models: they sum to the raw score, and are what the definition says."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest

from closedloop.adapters.onnx_explainer import open_explainer
from closedloop.contract import CONTRACT_FILE, MODEL_FILE, ModelContract
from closedloop.core.reasons import shapley
from closedloop.core.training.estimators import encode_frame
from closedloop.core.training.model_types import MODEL_TYPES, SCIKIT_LEARN
from closedloop.errors import DataError
from closedloop.stages.parts.measure import IMPORTANCE_ROWS, measure_importance, open_reasons
from tests.model_folders import write_model_folder
from tests.trained_folders import CATEGORICAL, NUMERIC, Trained, make_people, write_trained_folder

TREE_TYPES = [name for name in MODEL_TYPES if name != "logistic_regression"]
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "selected": {"selected": 6},
    "calibrated": {"calibrated": True},
}


def explain(trained: Trained) -> Any:
    return open_explainer(trained.folder / MODEL_FILE, trained.contract)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_base_and_contributions_sum_to_the_raw_score_of_ten_thousand_rows(
    tmp_path: Path, model_type: str, variant: str
) -> None:
    trained = write_trained_folder(tmp_path, model_type, **VARIANTS[variant])
    frame, _ = make_people(10_000, 1)
    frame.loc[::50, "city"] = "never seen"
    explainer = explain(trained)
    found = explainer.base + explainer.weigh(encode_frame(trained.contract.features, frame)).sum(axis=1)
    np.testing.assert_allclose(found, trained.read_raw_scores(frame), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", [name for name in TREE_TYPES if name in SCIKIT_LEARN])
def test_contributions_are_the_shapley_values_of_the_trees_expectations(tmp_path: Path, model_type: str) -> None:
    """Against the definition: every subset of columns, and scikit-learn's own trees followed by recursion."""
    trained = write_trained_folder(tmp_path, model_type)
    frame, _ = make_people(8, 2)
    rows = trained.prepare(frame)
    expected = np.array([list_shapley_values(trained, row) for row in rows])
    # columns in their order: the numbers, then the categories of plan and of city; "empty" is left out
    owners = [0, 1, 2, 4, 4, 5, 5, 5, 5]
    by_feature = np.zeros((len(rows), 6))
    for column, owner in enumerate(owners):
        by_feature[:, owner] += expected[:, column]
    found = explain(trained).weigh(encode_frame(trained.contract.features, frame))
    np.testing.assert_allclose(found, by_feature, rtol=0, atol=1e-6)
    assert np.abs(found[:, [2, 4]]).max(axis=0).min() > 0.001  # each of these says something
    assert not found[:, 3].any()


def list_shapley_values(trained: Trained, row: np.ndarray) -> list[float]:
    columns = range(len(row))
    worth = {
        known: sum(expect(tree, 0, row, known) for tree in list_trees(trained.pipeline[-1]))
        for size in range(len(row) + 1)
        for known in combinations(columns, size)
    }
    found = []
    for column in columns:
        others = [one for one in columns if one != column]
        total = 0.0
        for size in range(len(others) + 1):
            weight = math.factorial(size) * math.factorial(len(row) - size - 1) / math.factorial(len(row))
            for known in combinations(others, size):
                total += weight * (worth[tuple(sorted((*known, column)))] - worth[known])
        found.append(total)
    return found


def list_trees(model: Any) -> list[list[dict[str, Any]]]:
    if hasattr(model, "_predictors"):
        return [
            [
                {
                    "leaf": bool(node["is_leaf"]),
                    "column": int(node["feature_idx"]),
                    "threshold": float(node["num_threshold"]),
                    "left": int(node["left"]),
                    "right": int(node["right"]),
                    "missing_left": bool(node["missing_go_to_left"]),
                    "rows": float(node["count"]),
                    "value": float(node["value"]),
                }
                for node in tree.nodes
            ]
            for (tree,) in model._predictors
        ]
    is_forest = hasattr(model, "oob_score")
    factor = 1 / len(model.estimators_) if is_forest else model.learning_rate
    found = []
    for one in np.ravel(model.estimators_):
        tree = one.tree_
        values = tree.value[:, 0, 1] / tree.value[:, 0, :].sum(axis=1) if is_forest else tree.value[:, 0, 0]
        found.append(
            [
                {
                    "leaf": tree.children_left[node] < 0,
                    "column": tree.feature[node],
                    "threshold": tree.threshold[node],
                    "left": tree.children_left[node],
                    "right": tree.children_right[node],
                    "missing_left": False,
                    "rows": tree.weighted_n_node_samples[node],
                    "value": factor * values[node],
                }
                for node in range(tree.node_count)
            ]
        )
    return found


def expect(tree: list[dict[str, Any]], place: int, row: np.ndarray, known: tuple[int, ...]) -> float:
    node = tree[place]
    if node["leaf"]:
        return node["value"]
    left, right = node["left"], node["right"]
    if node["column"] in known:
        value = row[node["column"]]
        goes_left = node["missing_left"] if np.isnan(value) else value <= node["threshold"]
        return expect(tree, left if goes_left else right, row, known)
    shares = tree[left]["rows"] / node["rows"], tree[right]["rows"] / node["rows"]
    return shares[0] * expect(tree, left, row, known) + shares[1] * expect(tree, right, row, known)


def test_a_linear_models_contributions_are_distances_from_the_mean(tmp_path: Path) -> None:
    trained = write_trained_folder(tmp_path, "logistic_regression")
    frame, _ = make_people(200, 3)
    prepared = trained.prepare(frame).astype(np.float64)
    means = trained.prepare(trained.frame).astype(np.float64).mean(axis=0)
    by_column = (prepared - means) * trained.pipeline[-1].coef_[0]
    # numbers, then whether age and visits_30d are missing, and "empty", which always is; then the categories
    owners = [0, 1, 2, 0, 2, 4, 4, 5, 5, 5, 5]
    assert len(owners) == by_column.shape[1]
    found = explain(trained).weigh(encode_frame(trained.contract.features, frame))
    for feature in range(6):
        mine = [column for column, owner in enumerate(owners) if owner == feature]
        np.testing.assert_allclose(found[:, feature], by_column[:, mine].sum(axis=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", TREE_TYPES)
def test_many_rows_are_explained_as_each_alone_from_several_threads(tmp_path: Path, model_type: str) -> None:
    trained = write_trained_folder(tmp_path, model_type)
    frame, _ = make_people(4 * shapley.TABLE_ROWS_MIN, 4)
    matrix = encode_frame(trained.contract.features, frame)
    explainer = explain(trained)
    with ThreadPoolExecutor(4) as pool:
        found = np.concatenate(list(pool.map(explainer.weigh, np.split(matrix, 4))))
    alone = np.concatenate([explainer.weigh(part) for part in np.split(matrix, 16)])
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-12)


def test_a_column_that_misses_a_value_for_the_first_time_after_many_rows(tmp_path: Path) -> None:
    """Tables are laid out for the columns that missed values so far."""
    trained = write_trained_folder(tmp_path, "hist_gradient_boosting")
    frame, _ = make_people(6 * shapley.TABLE_ROWS_MIN, 4)
    matrix = encode_frame(trained.contract.features, frame)
    is_whole = ~np.isnan(matrix[:, :3]).any(axis=1)
    whole, others = matrix[is_whole][: shapley.TABLE_ROWS_MIN], matrix[~is_whole][: shapley.TABLE_ROWS_MIN]
    assert min(len(whole), len(others)) == shapley.TABLE_ROWS_MIN
    explainer = explain(trained)
    for rows in (whole, others, whole):
        alone = np.concatenate([explainer.weigh(part) for part in np.split(rows, 4)])
        np.testing.assert_allclose(explainer.weigh(rows), alone, rtol=0, atol=1e-12)


def test_reasons_are_summed_by_group_and_sorted_by_size(tmp_path: Path) -> None:
    groups = {"visits": ("visits_7d", "visits_30d")}
    trained = write_trained_folder(tmp_path, "hist_gradient_boosting", reasons=groups)
    explainer = explain(trained)
    matrix = encode_frame(trained.contract.features, trained.frame.head(50))
    rows = [tuple(row) for row in trained.frame[NUMERIC + CATEGORICAL].head(50).itertuples(index=False)]
    contributions = explainer.weigh(matrix)
    for explained, row, by_feature in zip(explainer.explain(matrix, rows, 20), rows, contributions, strict=True):
        assert explained.raw_score == pytest.approx(explainer.base + by_feature.sum())
        named = {one.reason: one for one in explained.reasons}
        assert set(named) == {"visits", "age", "empty", "plan", "city"}
        assert named["visits"].contribution == pytest.approx(by_feature[1] + by_feature[2])
        leading = max((1, 2), key=lambda place: abs(by_feature[place]))
        assert (named["visits"].feature, named["visits"].value) == ((NUMERIC + CATEGORICAL)[leading], row[leading])
        sizes = [(-abs(one.contribution), one.reason) for one in explained.reasons]
        assert sizes == sorted(sizes)
    assert [len(one.reasons) for one in explainer.explain(matrix, rows, 2)] == [2] * 50


def test_equal_contributions_are_sorted_by_name(tmp_path: Path) -> None:
    trained = write_trained_folder(tmp_path, "gradient_boosting")
    ranked = explain(trained).rank(np.array([[0.5, -0.5, 0.0, 0.0, 0.5, 1.0]]), 6)
    names = explain(trained).names
    assert [names[place] for place in ranked.reason[0]] == ["city", "age", "plan", "visits_7d", "empty", "visits_30d"]


def test_the_card_shows_what_a_model_looks_at_and_in_which_direction(tmp_path: Path) -> None:
    trained = write_trained_folder(tmp_path, "gradient_boosting")
    candidate: Any = SimpleNamespace(contract=trained.contract, test=trained.frame)
    found = measure_importance(explain(trained), candidate, 0)
    rows = trained.frame.sample(IMPORTANCE_ROWS, random_state=0)
    means = np.abs(explain(trained).weigh(encode_frame(trained.contract.features, rows))).mean(axis=0)
    assert {one.feature: one.mean for one in found} == pytest.approx(
        dict(zip(NUMERIC + CATEGORICAL, means, strict=True))
    )
    assert [one.mean for one in found] == pytest.approx(sorted(means, reverse=True))
    directions = {one.feature: one.direction for one in found}
    # as `make_people` draws them
    assert (directions["visits_30d"], directions["plan"], directions["empty"]) == ("lowers", "by category", "both")
    other = write_model_folder(tmp_path / "other") / MODEL_FILE
    assert open_reasons(other, candidate) is None


def test_a_graph_without_the_rows_of_its_nodes_gives_no_reasons(tmp_path: Path) -> None:
    trained = write_trained_folder(tmp_path, "hist_gradient_boosting")
    model = onnx.load(trained.folder / MODEL_FILE)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "nodes_hitrates":
                attribute.floats[:] = [1.0] * len(attribute.floats)
    onnx.save(model, trained.folder / MODEL_FILE)
    with pytest.raises(DataError, match="does not say how many training rows"):
        explain(trained)


def test_another_graph_gives_no_reasons(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    contract = ModelContract.model_validate_json((folder / CONTRACT_FILE).read_bytes())
    with pytest.raises(DataError, match="0 tree ensembles or linear models, expected 1"):
        open_explainer(folder / MODEL_FILE, contract)
    (folder / MODEL_FILE).write_bytes(b"\x0anothing")
    with pytest.raises(DataError, match="no ONNX file"):
        open_explainer(folder / MODEL_FILE, contract)


def test_a_contract_without_groups_loads(tmp_path: Path) -> None:
    trained = write_trained_folder(tmp_path, "logistic_regression")
    older = pd.Series(trained.contract.model_dump(mode="json")).drop("reasons").to_dict()
    assert ModelContract.model_validate(older).reasons == {}
