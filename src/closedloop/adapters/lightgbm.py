"""LightGBM: gradient boosting whose trees grow by their best leaf. Extra ``boost``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from closedloop.core.reasons.paths import TreeNodes
from closedloop.core.training.model_types import ModelType
from closedloop.core.training.trees import check_by_fitting, floor_float32, list_probabilities, place_children

try:
    from lightgbm import LGBMClassifier
    from lightgbm.basic import LightGBMError
except OSError as error:  # the wheel for Linux brings no OpenMP
    from closedloop.errors import ConfigError

    raise ConfigError(f"LightGBM cannot be loaded ({error}); on Debian: apt-get install libgomp1") from error


class LightGbm(LGBMClassifier):  # type: ignore[misc]
    """LightGBM's classifier, with its log-odds, its scores as it grew, and its trees (`GrownTrees`)."""

    intercept = 0.0  # the first tree's leaves hold it

    def decision_function(self, matrix: np.ndarray) -> np.ndarray:
        """Log-odds of churn, float64 (n,)."""
        return np.asarray(self.booster_.predict(matrix, raw_score=True))

    def staged_predict_proba(self, matrix: np.ndarray) -> Iterator[np.ndarray]:
        """Probabilities of both classes, (n, 2), after each tree."""
        log_odds = np.zeros(len(matrix))
        for tree in range(self.booster_.current_iteration()):
            log_odds += self.booster_.predict(matrix, raw_score=True, start_iteration=tree, num_iteration=1)
            yield list_probabilities(log_odds)

    def list_nodes(self) -> TreeNodes:
        """All trees; the cover of a node is its number of training rows, as in LightGBM's own contributions."""
        table = self.booster_.trees_to_dataframe()
        is_leaf = table["left_child"].isna().to_numpy()
        threshold = table["threshold"].to_numpy(dtype=np.float64, na_value=0.0)
        columns = {name: place for place, name in enumerate(self.booster_.feature_name())}
        # where training met no missing value, LightGBM takes one for 0
        missing_as_zero = (table["missing_type"] == "None").to_numpy() & ~is_leaf
        goes_left = (table["missing_direction"] == "left").to_numpy()
        return TreeNodes(
            tree=table["tree_index"].to_numpy(dtype=np.int64),
            column=table["split_feature"].map(columns).to_numpy(dtype=np.float64, na_value=0.0).astype(np.int64),
            threshold=floor_float32(threshold).astype(np.float32),
            yes=place_children(table["node_index"], table["left_child"]),
            no=place_children(table["node_index"], table["right_child"]),
            is_leaf=is_leaf,
            is_missing_yes=np.where(missing_as_zero, threshold >= 0.0, goes_left),
            cover=np.maximum(table["count"].to_numpy(dtype=np.float64, na_value=1.0), 1.0),
            value=np.where(is_leaf, table["value"].to_numpy(dtype=np.float64), 0.0),
        )


def _check(model: Any) -> None:
    check_by_fitting(model, LightGBMError)


MODEL_TYPE = ModelType(
    lambda: LightGbm,
    {
        "n_estimators": 150,
        "learning_rate": 0.08,
        "min_child_samples": 50,
        "n_jobs": 0,  # as many threads as OpenMP is told to use
        # the same trees whatever the number of threads
        "deterministic": True,
        "force_row_wise": True,
        "verbosity": -1,
    },
    {"n_estimators": 80, "learning_rate": 0.05, "num_leaves": 7, "min_child_samples": 60},
    also_allowed=("max_bin", "scale_pos_weight"),
    refused=("boosting_type", "importance_type", "objective", "verbosity"),
    takes_missing=True,
    check=_check,
    trusted=("closedloop.adapters.lightgbm.LightGbm", "collections.OrderedDict", "lightgbm.basic.Booster"),
    requirements=("lightgbm",),
)
