"""The classifier: from training rows to one scikit-learn pipeline, whose part after "encode" exports to ONNX.

"encode" packs a frame into one float32 matrix in the contract's order, as the server packs a request; what
follows it (prepare, select, model) is the exported graph. Both sides start from the same float32 values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from closedloop.contract import CategoricalFeature, Feature, NumericFeature
from closedloop.core.training.encoding import encode_columns, read_column, read_numbers
from closedloop.core.training.model_types import ModelType, find_model_type
from closedloop.errors import ConfigError, DataError, count_noun

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator
    from sklearn.pipeline import Pipeline


def describe_features(
    frame: pd.DataFrame, numeric: Sequence[str], categorical: Sequence[str], *, categories_max: int = 100
) -> tuple[Feature, ...]:
    """Ranges and sorted categories of the training rows, numeric features first.

    Beyond ``categories_max`` categories the most frequent stay (ties: by name) and the rest is coded like an
    unknown one, so that a column of city names cannot blow up the one-hot matrix.

    Raises
    ------
    DataError
        If a column is missing, a numeric one holds text or more than float32 can, or a categorical one holds
        anything but strings.

    Examples
    --------
    >>> frame = pd.DataFrame({"age": [30.0, None], "plan": ["b", "a"]})
    >>> [feature.name for feature in describe_features(frame, ["age"], ["plan"])]
    ['age', 'plan']
    >>> describe_features(frame, [], ["plan"])[0].categories
    ('a', 'b')
    """
    features: list[Feature] = []
    for name in numeric:
        values = read_numbers(frame, name)
        known = values[~np.isnan(values)]
        low, high = (float(known.min()), float(known.max())) if known.size else (None, None)
        features.append(NumericFeature(name=name, minimum=low, maximum=high))
    for name in categorical:
        strings = read_column(frame, name).dropna().astype(object)
        wrong = [value for value in strings.unique() if not isinstance(value, str)]
        if wrong:
            raise DataError(f"column {name}: found {wrong[:3]}, a categorical feature holds strings: quote them")
        counts = strings.value_counts()
        kept = sorted(counts.index, key=lambda category: (-counts[category], category))[:categories_max]
        features.append(CategoricalFeature(name=name, categories=tuple(sorted(kept))))
    return tuple(features)


def list_missing(features: Sequence[Feature], frame: pd.DataFrame) -> list[str]:
    """Numeric features with a missing value in these rows."""
    names = [feature.name for feature in features if isinstance(feature, NumericFeature)]
    return [name for name in names if frame[name].isna().any()]


def encode_frame(features: Sequence[Feature], frame: pd.DataFrame) -> np.ndarray:
    """Pack rows as the graph takes them: float32, shape (n, n_features), equal to `closedloop.rules.Rules.pack`.

    Raises
    ------
    DataError
        If a column is missing, or a numeric one holds text, infinity or more than float32 can.

    Examples
    --------
    >>> plan = CategoricalFeature(name="plan", categories=("a", "b"))
    >>> encode_frame([plan], pd.DataFrame({"plan": ["b", None, "z"]})).tolist()
    [[1.0], [-1.0], [-1.0]]
    """
    return encode_columns(frame, **_list_columns(features))


def build_pipeline(
    features: Sequence[Feature],
    *,
    model_type: str,
    model_params: Mapping[str, Any],
    normalize: bool,
    feature_selection: int | None,
    seed: int,
    missing: Sequence[str] = (),
) -> Pipeline:
    """An unfitted pipeline for raw rows (a frame with at least the feature columns) and boolean labels.

    Parameters
    ----------
    normalize
        Standardise numeric features. Linear models only: trees do not care, and a scaler in float32 moves
        values across a tree's thresholds, so that the exported graph decides differently.
    feature_selection
        Number of prepared columns (numeric features and single categories) to keep, by the importances of
        extremely randomised trees; None keeps all.
    seed
        For the classifier and the selection, in [0, 2**32).
    missing
        Numeric features with missing values in training (`list_missing`): linear models get a column for each that
        is 1 where the value is missing.

    Raises
    ------
    ConfigError
        If the type, a parameter's name or value, or the number of columns to keep is not allowed.
    """
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.feature_selection import SelectFromModel
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import FunctionTransformer

    kind = find_model_type(model_type)
    model = kind.build(model_type, model_params, seed)
    prepare, width = _build_prepare(features, kind, normalize, missing)
    steps: list[tuple[str, Any]] = [
        ("encode", FunctionTransformer(encode_columns, kw_args=_list_columns(features))),
        ("prepare", prepare),
    ]
    if feature_selection is not None:
        if not 1 <= feature_selection <= width:
            raise ConfigError(
                f"feature_selection is {feature_selection}, allowed: 1 to {width} (prepared columns) or null"
            )
        trees = ExtraTreesClassifier(
            n_estimators=50, min_samples_leaf=0.01, max_samples=0.3, bootstrap=True, random_state=seed
        )
        steps.append(("select", SelectFromModel(trees, max_features=feature_selection, threshold=-np.inf)))
    return Pipeline([*steps, ("model", model)])


def score(pipeline: Pipeline, frame: pd.DataFrame) -> np.ndarray:
    """Probability of churn of each row: float64 in [0, 1], shape (n,)."""
    return np.asarray(pipeline.predict_proba(frame)[:, 1], dtype=np.float64)


def _list_columns(features: Sequence[Feature]) -> dict[str, Any]:
    categories = {f.name: list(f.categories) for f in features if isinstance(f, CategoricalFeature)}
    return {"columns": [feature.name for feature in features], "categories": categories}


def require_hyper_parameters(model_type: str, model_params: Mapping[str, Any]) -> None:
    """Refuse hyper-parameters that the model's library does not know or take.

    Raises
    ------
    ConfigError
        Naming the parameter and what is allowed.
    ModuleNotFoundError
        If the library is not installed.
    """
    find_model_type(model_type).build(model_type, model_params, seed=0)


def _build_prepare(
    features: Sequence[Feature], kind: ModelType, normalize: bool, missing: Sequence[str]
) -> tuple[BaseEstimator, int]:
    """The step that imputes, scales and one-hot encodes packed columns, and how many columns it returns."""
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Binarizer, OneHotEncoder, StandardScaler

    # A column without a single training value says nothing, and binning it fails: it is left out.
    numeric = [i for i, f in enumerate(features) if isinstance(f, NumericFeature) and f.minimum is not None]
    coded = {i: f for i, f in enumerate(features) if isinstance(f, CategoricalFeature) and f.categories}
    if not numeric and not coded:
        raise DataError(f"none of the {count_noun(len(features), 'feature')} has a value in the training rows")
    parts: list[tuple[str, Any, list[int]]] = []
    if numeric:
        numbers: Any = "passthrough"
        if not kind.takes_missing:
            numbers = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True))
            if normalize and kind.is_linear:
                numbers.steps.append(("scale", StandardScaler()))
        parts.append(("numeric", numbers, numeric))
    blank = [i for i in numeric if features[i].name in missing and kind.is_linear]
    if blank:
        # skl2onnx 1.20 leaves out SimpleImputer's add_indicator without a warning: what no value can be stands for it
        largest = np.finfo(np.float32).max
        filled = SimpleImputer(strategy="constant", fill_value=largest, keep_empty_features=True)
        parts.append(("missing", make_pipeline(filled, Binarizer(threshold=float(largest) * 0.99)), blank))
    if coded:
        codes = [np.arange(len(feature.categories), dtype=np.float32) for feature in coded.values()]
        one_hot = OneHotEncoder(categories=codes, handle_unknown="ignore", sparse_output=False, dtype=np.float32)
        parts.append(("categorical", one_hot, list(coded)))
    width = len(numeric) + len(blank)
    return ColumnTransformer(parts), width + sum(len(feature.categories) for feature in coded.values())
