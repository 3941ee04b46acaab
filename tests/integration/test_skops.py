"""Pipelines through real skops files: back to the last bit, and nothing unknown is ever loaded."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import skops.io
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from closedloop.adapters.skops import TRUSTED_TYPES, list_trusted, load_pipeline, save_pipeline
from closedloop.core.training.calibration import calibrate_pipeline
from closedloop.core.training.estimators import build_pipeline, describe_features
from closedloop.core.training.model_types import MODEL_TYPES, find_model_type
from closedloop.core.training.trees import round_thresholds
from closedloop.errors import DataError
from tests.trained_folders import SMALL


def make_rows(seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows with missing numbers and categories, and labels that follow them in part."""
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame({"spent": draw.gamma(2, 50, 600), "visits": draw.normal(size=600)})
    frame["plan"] = draw.choice(np.array(["free", "paid", None], dtype=object), 600)
    labels = np.asarray(draw.random(600) < 1 / (1 + np.exp(-frame["visits"] - (frame["plan"] == "free"))))
    frame.loc[draw.random(600) < 0.1, ["spent", "visits"]] = np.nan
    return frame, labels


def fit(model_type: str, *, calibrated: bool, selection: int | None = None) -> Pipeline:
    """A pipeline as the train stage makes it; turned labels make calibration worth its while."""
    frame, labels = make_rows(0)
    features = describe_features(frame, ["spent", "visits"], ["plan"])
    pipeline = build_pipeline(
        features,
        model_type=model_type,
        model_params=SMALL[model_type],
        normalize=True,
        feature_selection=selection,
        seed=0,
    )
    pipeline = round_thresholds(pipeline.fit(frame, labels))
    if not calibrated:
        return pipeline
    rows, truth = make_rows(1)
    found, note = calibrate_pipeline(pipeline, rows, ~truth, [str(row) for row in range(600)])
    assert note.startswith("sigmoid")
    return found


@pytest.mark.parametrize("calibrated", [False, True], ids=["raw", "calibrated"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_pipeline_comes_back_to_the_last_bit(model_type: str, calibrated: bool, tmp_path: Path) -> None:
    pipeline = fit(model_type, calibrated=calibrated)
    save_pipeline(tmp_path / "pipeline.skops", pipeline)
    loaded = load_pipeline(tmp_path / "pipeline.skops", model_type)
    rows, _ = make_rows(3)
    expected = pipeline.predict_proba(rows)
    np.testing.assert_array_equal(loaded.predict_proba(rows), expected)
    assert len(np.unique(expected[:, 1])) > 10


def test_the_list_holds_what_our_pipelines_need_and_no_more(tmp_path: Path) -> None:
    needed = set()
    for model_type in MODEL_TYPES:
        for calibrated in (False, True):
            path = tmp_path / f"{model_type}-{calibrated}.skops"
            save_pipeline(path, fit(model_type, calibrated=calibrated, selection=2))
            found = set(skops.io.get_untrusted_types(file=path))
            assert found <= set(list_trusted(model_type))
            assert found >= set(find_model_type(model_type).trusted)
            needed |= found
    assert needed >= set(TRUSTED_TYPES)


def test_a_pipeline_that_an_older_release_stored_is_read(tmp_path: Path) -> None:
    pipeline, old = fit("logistic_regression", calibrated=False), tmp_path / "old.skops"
    save_pipeline(tmp_path / "new.skops", pipeline)
    with zipfile.ZipFile(tmp_path / "new.skops") as new, zipfile.ZipFile(old, "w") as written:
        for name in new.namelist():
            content = new.read(name)
            if name == "schema.json":
                assert content.count(b"closedloop.core.training.encoding") == 1
                content = content.replace(b"closedloop.core.training.encoding", b"closedloop.core.training.estimators")
            written.writestr(name, content)
    assert skops.io.get_untrusted_types(file=old) != skops.io.get_untrusted_types(file=tmp_path / "new.skops")
    rows, _ = make_rows(3)
    np.testing.assert_array_equal(
        load_pipeline(old, "logistic_regression").predict_proba(rows), pipeline.predict_proba(rows)
    )


@pytest.mark.parametrize(
    ("model", "unknown"),
    [
        (FunctionTransformer(os.system), f"{os.system.__module__}.system"),
        (FunctionTransformer(eval), "builtins.eval"),
        (KNeighborsClassifier(algorithm="kd_tree").fit([[0.0], [1.0]], [0, 1]), "sklearn.neighbors._kd_tree.KDTree"),
    ],
    ids=["a command", "an evaluation", "a model we do not make"],
)
def test_a_type_that_is_not_on_the_list_is_refused_by_name(model: Any, unknown: str, tmp_path: Path) -> None:
    path = tmp_path / "pipeline.skops"
    save_pipeline(path, Pipeline([("model", model)]))
    with pytest.raises(DataError, match=r"pipeline\.skops: refused, it holds types that are not on the") as refused:
        load_pipeline(path, "logistic_regression")
    assert unknown in str(refused.value)


class Trap:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    path, trace = tmp_path / "pipeline.skops", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Trap(trace)))
    with pytest.raises(DataError, match=r"pipeline\.skops: cannot be read as a pipeline"):
        load_pipeline(path, "logistic_regression")
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # it would have


def test_a_member_that_is_named_like_a_path_elsewhere_is_written_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "a/b"
    folder.mkdir(parents=True)
    save_pipeline(folder / "pipeline.skops", fit("logistic_regression", calibrated=False))
    with zipfile.ZipFile(folder / "pipeline.skops", "a") as archive:
        for name in ("../../outside.txt", str(tmp_path / "absolute.txt")):
            archive.writestr(name, "from the archive")
    load_pipeline(folder / "pipeline.skops", "logistic_regression")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["pipeline.skops"]


def test_a_file_that_is_missing_or_torn_says_who_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.skops"
    with pytest.raises(DataError, match=r"pipeline\.skops: cannot be read .*'closedloop train' writes it"):
        load_pipeline(path, "logistic_regression")
    save_pipeline(path, fit("logistic_regression", calibrated=False))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"pipeline\.skops: cannot be read .*'closedloop train' writes it"):
        load_pipeline(path, "logistic_regression")
