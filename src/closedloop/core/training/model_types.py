"""The kinds of classifiers that can be trained: scikit-learn's here, any other in a module of its own.

A module holds ``MODEL_TYPE``. It is found by its name, so that nothing of its library is imported for the other kinds.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from closedloop.errors import ConfigError

DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class ModelType:
    """A kind of classifier, as the stages need it.

    Parameters
    ----------
    load
        Imports the library and returns a classifier's class, whose constructor and methods are as scikit-learn's. Its
        export needs a converter of skl2onnx, or the methods of `closedloop.core.training.trees.GrownTrees`.
    defaults
        Hyper-parameters that differ from the library's own defaults.
    small
        Those of a smaller model, for few rows or few customers; empty: there is none. It is tried beside the defaults
        where ``model.params`` and the search say nothing.
    also_allowed
        Hyper-parameters that ``get_params`` does not list.
    refused
        Parameters that ``model.params`` must not name: training sets them, or the export cannot follow them.
    is_linear
        Columns are scaled, and get another that says where they are missing.
    takes_missing
        Missing numbers are left as they are; for the other kinds the median stands for them.
    check
        Raises a ValueError where a classifier's hyper-parameters have values that are not allowed.
    trusted
        Types in a fitted classifier's skops file that were reviewed: nothing else is ever loaded.
    requirements
        Modules whose packages a logged model needs beside scikit-learn.
    """

    load: Callable[[], type[Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)
    also_allowed: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    is_linear: bool = False
    takes_missing: bool = False
    check: Callable[[Any], None] = lambda model: model._validate_params()
    trusted: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()

    def build(self, name: str, given: Mapping[str, Any], seed: int) -> Any:
        """Return an unfitted classifier with these hyper-parameters; ``name`` is that of the kind, for errors.

        Raises
        ------
        ConfigError
            If a hyper-parameter or its value is not allowed.
        """
        kind = self.load()
        allowed = sorted({*kind().get_params(), *self.also_allowed} - {"random_state", *self.refused})
        for parameter in given:
            if parameter not in allowed:
                known = ", ".join(allowed)
                raise ConfigError(f"model parameter {parameter} is not allowed for {name}; allowed: {known}")
        model = kind(**{**self.defaults, **given, "random_state": seed})
        try:
            self.check(model)
        except ValueError as error:
            raise ConfigError(f"model parameter of {name}: {error}") from error
        return model


def _load_logistic() -> type[Any]:
    from sklearn.linear_model import LogisticRegression

    found: type[Any] = LogisticRegression
    return found


def _of_ensemble(name: str) -> Callable[[], type[Any]]:
    def load() -> type[Any]:
        found: type[Any] = getattr(importlib.import_module("sklearn.ensemble"), name)
        return found

    return load


# Defaults take seconds on 150,000 rows, and are good enough to start a search from. No early stopping: it would hold
# out random rows, where all other splits go by time.
SCIKIT_LEARN: Mapping[str, ModelType] = {
    "logistic_regression": ModelType(_load_logistic, {"max_iter": 1000}, is_linear=True),
    "random_forest": ModelType(
        _of_ensemble("RandomForestClassifier"),
        {"n_estimators": 60, "max_depth": 12, "min_samples_leaf": 20, "max_samples": 0.4},
    ),
    "gradient_boosting": ModelType(
        _of_ensemble("GradientBoostingClassifier"),
        {"n_estimators": 100, "max_depth": 4, "subsample": 0.3, "max_features": "sqrt"},
    ),
    "hist_gradient_boosting": ModelType(
        _of_ensemble("HistGradientBoostingClassifier"),
        {"max_iter": 150, "learning_rate": 0.08, "min_samples_leaf": 50, "early_stopping": False},
        {"max_iter": 80, "learning_rate": 0.05, "max_leaf_nodes": 7, "min_samples_leaf": 60},
        # skl2onnx 1.20 converts native categoricals without a warning, and the graph is wrong on most rows
        refused=("categorical_features",),
        takes_missing=True,
    ),
}
MODULES = {"lightgbm": "closedloop.adapters.lightgbm", "xgboost": "closedloop.adapters.xgboost"}
MODEL_TYPES = (*SCIKIT_LEARN, *MODULES)


def is_model_type(name: str) -> bool:
    """Whether ``model.type`` may be this: a known kind, or the module of another.

    >>> is_model_type("lightgbm"), is_model_type("my_types.extra_trees"), is_model_type("lightgb")
    (True, True, False)
    """
    return name in MODEL_TYPES or DOTTED_NAME.fullmatch(name) is not None


def find_model_type(name: str) -> ModelType:
    """Find a kind of classifier by its name.

    Parameters
    ----------
    name
        One of `MODEL_TYPES`, or a module on Python's path that holds ``MODEL_TYPE``.

    Raises
    ------
    ConfigError
        If there is no such module, or it holds none.
    ModuleNotFoundError
        If a package that the module imports is not installed.
    """
    if name in SCIKIT_LEARN:
        return SCIKIT_LEARN[name]
    module = MODULES.get(name, name)
    try:
        found = getattr(importlib.import_module(module), "MODEL_TYPE", None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        known = ", ".join(MODEL_TYPES)
        raise ConfigError(f"model.type is {name}: there is no module {error.name} on Python's path ({known})") from None
    if not isinstance(found, ModelType):
        raise ConfigError(f"model.type is {name}: the module must hold MODEL_TYPE, a ModelType (docs/replace.md)")
    return found
