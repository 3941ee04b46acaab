"""XGBoost: regularised gradient boosting. Extra ``boost``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from xgboost import XGBClassifier
from xgboost.core import XGBoostError

from closedloop.core.reasons.paths import TreeNodes
from closedloop.core.training.model_types import ModelType
from closedloop.core.training.trees import check_by_fitting, list_probabilities, place_children


class XGBoost(XGBClassifier):  # type: ignore[misc]
    """XGBoost's classifier, with its log-odds, its scores as it grew, and its trees (`GrownTrees`)."""

    @property
    def intercept(self) -> float:
        """Log-odds before the first tree."""
        config = json.loads(self.get_booster().save_config())
        rate = float(config["learner"]["learner_model_param"]["base_score"].strip("[]"))
        return math.log(rate / (1 - rate))

    def decision_function(self, matrix: np.ndarray) -> np.ndarray:
        """Log-odds of churn, float64 (n,)."""
        return np.asarray(self.predict(matrix, output_margin=True), dtype=np.float64)

    def staged_predict_proba(self, matrix: np.ndarray) -> Iterator[np.ndarray]:
        """Probabilities of both classes, (n, 2), after each tree."""
        log_odds = np.full(len(matrix), self.intercept)
        for tree in range(self.get_booster().num_boosted_rounds()):
            alone = self.predict(matrix, output_margin=True, iteration_range=(tree, tree + 1))
            log_odds += alone - self.intercept
            yield list_probabilities(log_odds)

    def list_nodes(self) -> TreeNodes:
        """All trees; the cover of a node is its sum of hessians, as in XGBoost's own contributions."""
        table = self.get_booster().trees_to_dataframe()
        is_leaf = (table["Feature"] == "Leaf").to_numpy()
        columns = table["Feature"].where(~is_leaf, "f0").str.removeprefix("f")
        threshold = table["Split"].to_numpy(dtype=np.float32, na_value=0.0)
        return TreeNodes(
            tree=table["Tree"].to_numpy(dtype=np.int64),
            column=columns.to_numpy(dtype=np.int64),
            # "below", in float32, is "at most the number before"
            threshold=np.nextafter(threshold, np.float32(-np.inf)),
            yes=place_children(table["ID"], table["Yes"]),
            no=place_children(table["ID"], table["No"]),
            is_leaf=is_leaf,
            is_missing_yes=(table["Missing"] == table["Yes"]).to_numpy() & ~is_leaf,
            cover=table["Cover"].to_numpy(dtype=np.float64),
            value=np.where(is_leaf, table["Gain"].to_numpy(dtype=np.float64), 0.0),
        )


def _check(model: Any) -> None:
    check_by_fitting(model, XGBoostError)


MODEL_TYPE = ModelType(
    lambda: XGBoost,
    {"n_estimators": 150, "learning_rate": 0.08, "max_depth": 5, "min_child_weight": 10, "tree_method": "hist"},
    {"n_estimators": 80, "learning_rate": 0.05, "max_depth": 3, "min_child_weight": 12},
    refused=(
        "base_score",
        "booster",
        "callbacks",
        "device",
        "early_stopping_rounds",
        "enable_categorical",
        "eval_metric",
        "feature_types",
        "feature_weights",
        "importance_type",
        "missing",
        "multi_strategy",
        "objective",
        "tree_method",
        "validate_parameters",
        "verbosity",
    ),
    takes_missing=True,
    check=_check,
    trusted=("closedloop.adapters.xgboost.XGBoost", "xgboost.core.Booster"),
    requirements=("xgboost",),
)
