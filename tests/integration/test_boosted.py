"""LightGBM and XGBoost as model types: against the libraries' own scores and contributions, and a second exporter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest

from closedloop.adapters.onnx import export_model, measure_parity
from closedloop.adapters.onnx_explainer import open_explainer
from closedloop.adapters.onnxruntime import OnnxScorer
from closedloop.contract import MODEL_FILE, digest_folder
from closedloop.core.training.estimators import build_pipeline, describe_features, encode_frame, score
from closedloop.core.training.learning_curve import trace_training
from closedloop.core.training.model_types import MODULES
from closedloop.errors import ConfigError
from closedloop.scoring.batch import BatchOptions, score_batch
from closedloop.scoring.edge import export_edge
from closedloop.serving.slots.slots import Slot
from tests.conftest import Project
from tests.trained_folders import Trained, list_values, make_people, write_trained_folder

# columns of `make_people` in the model's order: the numbers, then the categories of plan and city; "empty" is left out
OWNERS = [0, 1, 2, 4, 4, 5, 5, 5, 5]


@pytest.fixture(scope="module", params=MODULES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """As a run trains it: the defaults' 150 trees, whose sums would show a small error many times."""
    return write_trained_folder(tmp_path_factory.mktemp(request.param), request.param, params={}, rows=4_000)


def weigh_by_library(trained: Trained, prepared: np.ndarray) -> np.ndarray:
    """The library's own contributions, with the base in the last column."""
    model = trained.pipeline[-1]
    if trained.contract.model_type == "lightgbm":
        return np.asarray(model.booster_.predict(prepared, pred_contrib=True))
    from xgboost import DMatrix

    return np.asarray(model.get_booster().predict(DMatrix(prepared), pred_contribs=True))


def test_reasons_are_the_librarys_own_contributions(trained: Trained) -> None:
    frame, _ = make_people(1_000, 7)
    explainer = open_explainer(trained.folder / MODEL_FILE, trained.contract)
    found = explainer.weigh(encode_frame(trained.contract.features, frame))
    by_column = weigh_by_library(trained, trained.prepare(frame))
    assert by_column.shape == (1_000, len(OWNERS) + 1)
    expected = np.zeros_like(found)
    for column, owner in enumerate(OWNERS):
        expected[:, owner] += by_column[:, column]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(explainer.base, by_column[:, -1], rtol=0, atol=1e-4)
    assert np.abs(found).max() > 0.5


def test_the_graph_scores_as_the_librarys_own_prediction(trained: Trained) -> None:
    frame, _ = make_people(5_000, 8)
    found = OnnxScorer(trained.folder / MODEL_FILE).score(encode_frame(trained.contract.features, frame))
    if trained.contract.model_type == "lightgbm":
        own = trained.pipeline[-1].booster_.predict(trained.prepare(frame))
    else:
        own = trained.pipeline[-1].get_booster().inplace_predict(trained.prepare(frame))
    np.testing.assert_allclose(found, own, rtol=0, atol=1e-6)


def test_onnxmltools_exports_the_same_scores(trained: Trained) -> None:
    """Where no threshold lies between two float32 numbers, on which its rounding would move rows."""
    import onnxmltools
    from onnxmltools.convert.common.data_types import FloatTensorType
    from xgboost import XGBClassifier

    frame, _ = make_people(2_000, 9)
    prepared = trained.prepare(frame)
    model = trained.pipeline[-1]
    inputs = [("input", FloatTensorType([None, prepared.shape[1]]))]
    if trained.contract.model_type == "lightgbm":
        converted = onnxmltools.convert_lightgbm(model.booster_, initial_types=inputs, target_opset=15, zipmap=False)
    else:
        plain = XGBClassifier.__new__(XGBClassifier)  # it takes no subclass
        plain.__dict__ = model.__dict__
        converted = onnxmltools.convert_xgboost(plain, initial_types=inputs, target_opset=15)
    session = onnxruntime.InferenceSession(converted.SerializeToString(), providers=["CPUExecutionProvider"])
    other = np.asarray(session.run(None, {"input": prepared})[1])[:, 1]
    found = OnnxScorer(trained.folder / MODEL_FILE).score(encode_frame(trained.contract.features, frame))
    np.testing.assert_allclose(found, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", MODULES)
def test_a_value_that_training_never_missed_may_be_missing(model_type: str, tmp_path: Path) -> None:
    """LightGBM takes it for 0, XGBoost sends it its own way; negative thresholds tell the two sides apart."""
    draw = np.random.default_rng(3)
    frame = pd.DataFrame(
        {"a": draw.normal(size=2_000), "b": draw.normal(size=2_000) - 2, "c": draw.integers(-2, 3, 2_000)}
    )
    labels = np.asarray(frame["a"] + frame["b"] + 2 + (frame["c"] < 0) + draw.normal(size=2_000) > 0)
    features = describe_features(frame, ["a", "b", "c"], [])
    options: dict[str, Any] = {"normalize": True, "feature_selection": None, "seed": 0}
    pipeline = build_pipeline(features, model_type=model_type, model_params={}, **options).fit(frame, labels)
    export_model(pipeline, tmp_path / "model.onnx", 3)
    holdout = frame.astype(float).mask(draw.random(frame.shape) < 0.3)
    assert holdout.isna().any().all()
    parity = measure_parity(pipeline, OnnxScorer(tmp_path / "model.onnx"), holdout, features)
    assert (parity.rows_over, parity.difference_max < 1e-6) == (0, True)


def test_batch_and_edge_script_take_it_as_any_model(trained: Trained, tmp_path: Path) -> None:
    frame, _ = make_people(300, 12)
    frame.insert(0, "customer_id", [f"C{row}" for row in range(300)])
    frame.to_parquet(tmp_path / "in.parquet", index=False)
    slot = Slot("1", str(trained.folder), digest_folder(trained.folder))
    options = BatchOptions(range_margin=10.0, id_key=b"key", reasons=3)
    score_batch(
        str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"), slot, options, state_dir=tmp_path / "state"
    )
    scored = pd.read_parquet(tmp_path / "out.parquet")
    expected = score(trained.pipeline, frame)
    np.testing.assert_allclose(scored["score"], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(scored["raw_score"], trained.read_raw_scores(frame), rtol=0, atol=1e-5)

    export_edge(slot, tmp_path / "edge", range_margin=10.0)
    lines = "".join(
        json.dumps({"features": list_values(frame.drop(columns="customer_id"), row)}) + "\n" for row in range(20)
    )
    command = [sys.executable, "-I", str(tmp_path / "edge/score.py")]
    ran = subprocess.run(command, input=lines, capture_output=True, text=True, check=True, cwd=tmp_path)
    answers = [json.loads(line)["probability"] for line in ran.stdout.splitlines()]
    np.testing.assert_allclose(answers, expected[:20], rtol=0, atol=1e-6)


TRAIN = """
import sys; sys.path[:0] = sys.argv[3:]
from pathlib import Path
from tests.trained_folders import write_trained_folder
write_trained_folder(Path(sys.argv[1]), sys.argv[2], params={"subsample": 0.7, "colsample_bytree": 0.8}, rows=6_000)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("model_type", MODULES)
def test_same_data_same_bytes_whatever_the_threads(model_type: str, tmp_path: Path) -> None:
    found = []
    for threads in ("1", "3"):
        folder = tmp_path / threads
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        subprocess.run([sys.executable, "-c", TRAIN, str(folder), model_type, *sys.path], env=environment, check=True)
        found.append((folder / MODEL_FILE).read_bytes())
    assert found[0] == found[1]


def test_the_learning_curve_ends_at_the_models_own_loss(trained: Trained) -> None:
    frame, labels = make_people(1_500, 11)
    curve = trace_training(trained.pipeline, trained.frame, make_people(4_000, 0)[1], frame, labels)
    assert (curve["step"].iloc[0], curve["step"].iloc[-1], len(curve)) == (1, 150, 30)
    scores = score(trained.pipeline, frame)
    own = -np.log(np.where(labels, scores, 1 - scores)).mean()
    assert curve["validation_log_loss"].iloc[-1] == pytest.approx(own, abs=1e-6)
    assert curve["train_log_loss"].iloc[-1] < curve["train_log_loss"].iloc[0] - 0.1


@pytest.mark.parametrize(
    ("model_type", "params", "message"),
    [
        ("lightgbm", {"max_iter": 5}, "max_iter is not allowed for lightgbm; allowed: .*num_leaves.*scale_pos_weight"),
        ("lightgbm", {"objective": "regression"}, "objective is not allowed"),
        ("lightgbm", {"num_leaves": 1}, "model parameter of lightgbm: .*num_leaves"),
        ("lightgbm", {"n_estimators": 0}, "n_estimators must be a whole number from 1, found 0"),
        ("xgboost", {"booster": "gblinear"}, "booster is not allowed for xgboost; allowed: .*max_depth"),
        ("xgboost", {"learning_rate": -1}, "model parameter of xgboost: .*"),
        ("xgboost", {"max_depth": "deep"}, "model parameter of xgboost: .*max_depth"),
    ],
)
def test_hyper_parameters_are_refused_by_name(model_type: str, params: dict[str, Any], message: str) -> None:
    frame, _ = make_people(50, 0)
    features = describe_features(frame, ["age"], [])
    options: dict[str, Any] = {"normalize": True, "feature_selection": None, "seed": 0}
    with pytest.raises(ConfigError, match=message):
        build_pipeline(features, model_type=model_type, model_params=params, **options)


@pytest.mark.parametrize("model_type", MODULES)
def test_a_library_that_is_not_installed_is_named_with_its_extra(
    model_type: str, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first stage runs."""
    project.change_params({"model": {"type": model_type, "params": {}}})
    monkeypatch.setitem(sys.modules, model_type, None)  # importing it fails from here on
    monkeypatch.delitem(sys.modules, MODULES[model_type], raising=False)
    output = " ".join(project.run("run", status=1).output.split())
    assert f"needs the Python package {model_type}, which is not installed: install closedloop[boost]" in output
    assert not (project.root / "data").exists()
