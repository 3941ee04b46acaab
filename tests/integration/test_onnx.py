"""Export and scoring with the real converter and runtime; exports known to be wrong must be seen as such."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from closedloop.adapters.onnx import Parity, export_model, measure_latency_ratio, measure_parity
from closedloop.adapters.onnxruntime import OnnxScorer
from closedloop.contract import Feature, NumericFeature, digest_file
from closedloop.core.training.calibration import calibrate_pipeline
from closedloop.core.training.estimators import (
    build_pipeline,
    describe_features,
    encode_columns,
    encode_frame,
    list_missing,
    score,
)
from closedloop.core.training.model_types import MODEL_TYPES, find_model_type
from closedloop.core.training.trees import round_thresholds
from closedloop.errors import DataError
from tests.model_folders import pack_row

PARAMS: dict[str, dict[str, Any]] = {
    "logistic_regression": {},
    "random_forest": {"n_estimators": 10, "max_depth": 8, "min_samples_leaf": 3},
    "gradient_boosting": {"n_estimators": 15},
    "hist_gradient_boosting": {"max_iter": 15, "min_samples_leaf": 5},
    "lightgbm": {"n_estimators": 15, "min_child_samples": 5},
    "xgboost": {"n_estimators": 15, "min_child_weight": 1},
}
TREE_TYPES = [name for name in MODEL_TYPES if not find_model_type(name).is_linear]
NUMERIC = ["age", "amount", "clock", "empty"]
CATEGORICAL = ["plan", "city"]


def make_rows(rows: int, seed: int, *, gaps: bool = True) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows with values whose midpoints are not float32 numbers, near a million among them."""
    generator = np.random.default_rng(seed)
    frame = pd.DataFrame({"age": generator.normal(size=rows), "amount": generator.gamma(2, 50, rows).round(2)})
    frame["clock"] = (1e6 + generator.integers(0, 64, rows) / 16).astype(np.float32).astype(np.float64)
    frame["empty"] = np.nan
    frame["plan"] = generator.choice(np.array(["basic", "plus", None], dtype=object), rows)
    frame["city"] = generator.choice(np.array(list("ABCDEF"), dtype=object), rows)
    logit = frame["age"] + (frame["amount"] > 100) + (frame["clock"] * 16 % 2) - (frame["plan"] == "plus")
    labels = np.asarray(generator.random(rows) < 1 / (1 + np.exp(-2 * logit)))
    if gaps:
        frame.loc[generator.random(rows) < 0.1, ["age", "amount"]] = np.nan
        frame.loc[generator.random(rows) < 0.05, "city"] = "never seen"
    return frame, labels


def export(pipeline: Any, folder: Path, n_features: int) -> OnnxScorer:
    export_model(pipeline, folder / "model.onnx", n_features)
    return OnnxScorer(folder / "model.onnx")


def sigmoid_on(pipeline: Any, frame: pd.DataFrame, labels: np.ndarray) -> Any:
    """Labels turned at random make any model overconfident, so that calibration is taken."""
    noisy = np.where(np.random.default_rng(9).random(len(labels)) < 0.4, ~labels, labels)
    found, note = calibrate_pipeline(pipeline, frame, noisy, [str(row) for row in range(len(frame))])
    assert note.startswith("sigmoid")
    return found


@pytest.mark.parametrize(
    ("categorical", "selection", "calibrated"),
    [(CATEGORICAL, None, False), (CATEGORICAL, 2, True), ([], None, True), ([], 2, False)],
)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_graph_and_pipeline_agree(
    model_type: str, categorical: list[str], selection: int | None, calibrated: bool, tmp_path: Path
) -> None:
    train, labels = make_rows(800, 0, gaps=False)
    holdout, truth = make_rows(800, 1)
    features = describe_features(train, NUMERIC, categorical)
    options: dict[str, Any] = {"normalize": True, "feature_selection": selection, "seed": 0}
    pipeline = build_pipeline(features, model_type=model_type, model_params=PARAMS[model_type], **options)
    pipeline = round_thresholds(pipeline.fit(train, labels))
    if calibrated:
        pipeline = sigmoid_on(pipeline, holdout, truth)
    scorer = export(pipeline, tmp_path, len(features))
    for frame in (train, holdout):
        parity = measure_parity(pipeline, scorer, frame, features)
        assert parity.rows_over == 0
        assert parity.difference_max < 1e-6
        assert parity.rows == 800
    # Not a constant: the agreement above means something.
    assert score(pipeline, holdout).std() > 0.01


@pytest.mark.parametrize("model_type", TREE_TYPES)
def test_adjacent_float32_values_stay_on_their_side(model_type: str, tmp_path: Path) -> None:
    step = np.spacing(np.float32(1e6))
    values = np.repeat(np.float32(1e6) + step * np.arange(40, dtype=np.float32), 30)
    assert len(np.unique(values)) == 40
    frame = pd.DataFrame({"x": values.astype(np.float64)})
    labels = np.repeat(np.arange(40) // 2 % 2 == 1, 30)
    features = describe_features(frame, ["x"], [])
    params: dict[str, Any] = {**PARAMS[model_type], **({} if model_type[0] == "h" else {"max_depth": 10})}
    pipeline = build_pipeline(
        features, model_type=model_type, model_params=params, normalize=True, feature_selection=None, seed=0
    ).fit(frame, labels)
    rounded = round_thresholds(pipeline)
    parity = measure_parity(rounded, export(rounded, tmp_path, 1), frame, features)
    assert parity.rows_over == 0
    assert parity.difference_max < 1e-6
    if model_type == "hist_gradient_boosting":
        # The converter rounds down by itself for the other trees, but not for these: the rows do need it.
        unrounded = measure_parity(pipeline, export(pipeline, tmp_path, 1), frame, features)
        assert unrounded.rows_over > 0


def encode_numbers(columns: list[str]) -> FunctionTransformer:
    return FunctionTransformer(encode_columns, kw_args={"columns": columns, "categories": {}})


def test_missing_indicators_of_a_linear_model_are_in_the_graph_and_better_than_none(tmp_path: Path) -> None:
    """Where it is not at random that a value is missing, an imputed value alone loses what that says."""
    train, holdout = (make_gaps(2_000, seed) for seed in (0, 1))
    features = describe_features(train[0], ["spend", "visits"], [])
    found = {}
    for name, missing in (("with", list_missing(features, train[0])), ("without", [])):
        options: dict[str, Any] = {"normalize": True, "feature_selection": None, "seed": 0, "missing": missing}
        pipeline = build_pipeline(features, model_type="logistic_regression", model_params={}, **options).fit(*train)
        folder = tmp_path / name
        folder.mkdir()
        scorer = export(pipeline, folder, len(features))
        for frame, _ in (train, holdout):
            parity = measure_parity(pipeline, scorer, frame, features)
            assert (parity.rows_over, parity.difference_max < 1e-6) == (0, True)
        found[name] = roc_auc_score(holdout[1], scorer.score(encode_frame(features, holdout[0])))
    assert list_missing(features, train[0]) == ["spend", "visits"]
    assert found["with"] > 0.85 > 0.7 > found["without"]


def make_gaps(rows: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Spending is missing for most who leave; what is known of it, and of visits, says little."""
    generator = np.random.default_rng(seed)
    labels = generator.random(rows) < 0.3
    frame = pd.DataFrame({"spend": generator.gamma(2, 50, rows) - 5 * labels, "visits": generator.normal(size=rows)})
    frame.loc[generator.random(rows) < np.where(labels, 0.85, 0.1), "spend"] = np.nan
    frame.loc[generator.random(rows) < 0.2, "visits"] = np.nan  # at random
    return frame, labels


def test_parity_sees_native_categoricals(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    frame = pd.DataFrame({"code": generator.integers(0, 8, 1000).astype(float), "x": generator.normal(size=1000)})
    labels = np.asarray(frame["code"].isin([1, 4, 6]) ^ (generator.random(1000) < 0.1))
    model = HistGradientBoostingClassifier(max_iter=10, categorical_features=[0], random_state=0)
    pipeline = Pipeline([("encode", encode_numbers(["code", "x"])), ("model", model)]).fit(frame, labels)
    parity = measure_parity(pipeline, export(pipeline, tmp_path, 2), frame, describe_features(frame, ["code", "x"], []))
    assert parity.rows_over > 100
    assert parity.difference_max > 0.1


def test_parity_sees_a_scaler_before_a_forest(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 60, (2000, 4)).astype(float)
    frame = pd.DataFrame(counts, columns=["a", "b", "c", "d"])
    labels = np.asarray((counts[:, 0] > 30) ^ (generator.random(2000) < 0.3))
    steps = [
        ("encode", encode_numbers(["a", "b", "c", "d"])),
        ("scale", ColumnTransformer([("numeric", StandardScaler(), list(range(4)))])),
        ("model", RandomForestClassifier(n_estimators=20, random_state=0)),
    ]
    pipeline = Pipeline(steps).fit(frame, labels)
    features = describe_features(frame, ["a", "b", "c", "d"], [])
    parity = measure_parity(pipeline, export(pipeline, tmp_path, 4), frame, features)
    assert parity.rows_over > 0


class Exported(NamedTuple):
    pipeline: Any
    scorer: OnnxScorer
    frame: pd.DataFrame
    labels: np.ndarray
    features: tuple[Feature, ...]
    path: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    frame, labels = make_rows(500, 0)
    features = describe_features(frame, NUMERIC, CATEGORICAL)
    pipeline = fit_boosting(features, frame, labels)
    folder = tmp_path_factory.mktemp("exported")
    return Exported(pipeline, export(pipeline, folder, 6), frame, labels, features, folder / "model.onnx")


def fit_boosting(features: tuple[Feature, ...], frame: pd.DataFrame, labels: np.ndarray) -> Any:
    pipeline = build_pipeline(
        features,
        model_type="hist_gradient_boosting",
        model_params=PARAMS["hist_gradient_boosting"],
        normalize=True,
        feature_selection=None,
        seed=0,
    )
    return round_thresholds(pipeline.fit(frame, labels))


def test_graph_has_one_input_and_one_output(exported: Exported) -> None:
    graph = onnx.load(exported.path)
    onnx.checker.check_model(graph, full_check=True)
    assert [value.name for value in graph.graph.input] == ["features"]
    assert [value.name for value in graph.graph.output] == ["probability"]
    # In this order, which skl2onnx leaves to chance.
    assert [entry.domain for entry in graph.opset_import] == ["", "ai.onnx.ml"]
    assert graph.opset_import[0].version == 21
    assert "ZipMap" not in {node.op_type for node in graph.graph.node}


def test_same_fit_same_bytes_in_another_process(exported: Exported, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
        "from test_onnx import *\n"
        "frame, labels = make_rows(500, 0); features = describe_features(frame, NUMERIC, CATEGORICAL)\n"
        "export_model(fit_boosting(features, frame, labels), Path(sys.argv[1]), 6)"
    )
    command = [
        sys.executable,
        "-c",
        code,
        str(tmp_path / "again.onnx"),
        str(Path(__file__).parent),
        *sys.path,
    ]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "2"}, check=True)
    assert digest_file(tmp_path / "again.onnx") == digest_file(exported.path)


def test_one_row_many_rows_and_threads_agree(exported: Exported) -> None:
    packed = encode_frame(exported.features, exported.frame)
    scores = exported.scorer.score(packed)
    assert scores.dtype == np.float64
    assert scores.shape == (500,)
    singles = [exported.scorer.score(packed[row : row + 1])[0] for row in range(0, 500, 25)]
    np.testing.assert_allclose(singles, scores[::25], rtol=0, atol=1e-6)
    np.testing.assert_allclose(OnnxScorer(exported.path, threads=2).score(packed), scores, rtol=0, atol=1e-6)
    assert exported.scorer.score(packed[:0]).shape == (0,)


def test_scoring_a_request_like_the_server(exported: Exported) -> None:
    row = {"age": 0.5, "amount": None, "clock": 1e6, "empty": None, "plan": "plus", "city": "not in training"}
    found = exported.scorer.score(pack_row(exported.features, row))
    assert found[0] == pytest.approx(score(exported.pipeline, pd.DataFrame([row]))[0], abs=1e-6)


@pytest.mark.parametrize(
    "matrix", [np.zeros((2, 5), np.float32), np.zeros((2, 6), np.float64), np.zeros(6, np.float32)]
)
def test_scorer_refuses_another_layout(exported: Exported, matrix: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"takes float32 \(n, 6\), found float"):
        exported.scorer.score(matrix)


def test_scorer_refuses_what_is_not_a_model(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.onnx: the model cannot be read \(No such file"):
        OnnxScorer(tmp_path / "missing.onnx")
    (tmp_path / "torn.onnx").write_bytes(exported.path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"torn\.onnx: ONNX Runtime cannot load"):
        OnnxScorer(tmp_path / "torn.onnx")
    other = onnx.load(exported.path)
    other.graph.output[0].name = other.graph.node[-1].output[0] = "score"
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(DataError, match=r"\['score'\], expected features to probability"):
        OnnxScorer(tmp_path / "other.onnx")


def test_export_refuses_a_pipeline_without_encode(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot export: steps \['prepare', 'model'\]"):
        export_model(exported.pipeline[1:], tmp_path / "model.onnx", 6)


def test_parity_counts_rows_and_nan() -> None:
    class Skewed:
        def score(self, matrix: np.ndarray) -> np.ndarray:
            return np.array([0.5, 0.75, 0.50005, np.nan])

    class Same:
        def predict_proba(self, frame: pd.DataFrame) -> np.ndarray:
            return np.repeat(frame[["x"]].to_numpy(), 2, axis=1)

    frame = pd.DataFrame({"x": [0.5, 0.5, 0.5, 0.5]})
    found = measure_parity(Same(), Skewed(), frame, (NumericFeature(name="x"),))  # type: ignore[arg-type]
    assert found == Parity(difference_max=1.0, rows_over=2, rows=4)


def test_latency_is_a_ratio_to_the_pipeline(exported: Exported) -> None:
    class Slow:
        def score(self, matrix: np.ndarray) -> np.ndarray:
            exported.pipeline.predict_proba(exported.frame.iloc[[0]])
            return np.zeros(len(matrix))

    quick = measure_latency_ratio(exported.pipeline, exported.scorer, exported.frame, rows=9)
    slow = measure_latency_ratio(exported.pipeline, Slow(), exported.frame, rows=9)  # type: ignore[arg-type]
    assert 0 < quick < slow
    with pytest.raises(DataError, match="at least one row"):
        measure_latency_ratio(exported.pipeline, exported.scorer, exported.frame[:0])
