"""Parts are replaced: another tracker without MLflow, and a model type of one's own in the file that the page shows."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from closedloop import bootstrap
from closedloop.adapters.onnx_explainer import open_explainer
from closedloop.adapters.onnxruntime import OnnxScorer
from closedloop.adapters.skops import load_pipeline
from closedloop.contract import MODEL_FILE, read_contract
from closedloop.core.training.estimators import encode_frame, score
from closedloop.core.training.model_types import find_model_type
from closedloop.errors import ConfigError
from tests.unit.tabular.test_describe import write_german_table


class JsonTracking:
    """What `closedloop train` asks of a tracker, kept as one JSON file a run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, {}

    @contextmanager
    def start_run(self, name: str, *, tags: Mapping[str, str], **_: Any) -> Iterator[str]:
        self.run = {"name": name, "tags": dict(tags), "params": {}, "metrics": {}, "files": []}
        yield "run-1"
        (self.folder / "run-1.json").write_text(json.dumps(self.run, default=str), encoding="utf-8")

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.run["params"] |= params

    def log_metrics(self, metrics: Mapping[str, float], *, prefix: str = "") -> None:
        self.run["metrics"] |= {f"{prefix}{name}": value for name, value in metrics.items()}

    def log_curves(self, curves: pd.DataFrame) -> None:
        self.run["curves"] = len(curves)

    def log_inputs(self, frames: Mapping[str, Any]) -> None:
        self.run["inputs"] = {name: len(rows) for name, (rows, _, _) in frames.items()}

    def log_files(self, paths: Mapping[str, Path]) -> None:
        self.run["files"] += sorted(paths)

    def log_pipeline(self, pipeline: Any, example: pd.DataFrame, model_type: str) -> str:
        return f"json:{type(pipeline).__name__}"

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.run["tags"] |= tags


def test_a_table_is_tracked_by_another_tool(tmp_path, make_project, monkeypatch):
    project = make_project(tmp_path / "project")
    write_german_table(project.root / "members.csv", 800)
    project.run("describe", "members.csv")
    project.change_params({"dataset": "members", "model": {"type": "logistic_regression"}})
    project.run_stages("ingest", "validate", "features", "training-set")
    monkeypatch.setitem(sys.modules, "mlflow", None)  # importing it fails from here on
    monkeypatch.setattr(bootstrap, "build_tracking", lambda run: JsonTracking(project.root))
    project.run_stages("train")
    run = json.loads((project.root / "run-1.json").read_text(encoding="utf-8"))
    assert run["metrics"]["validation_roc_auc"] > 0.6
    assert set(run["inputs"]) == {"train", "validation", "test"}
    assert "contract" in run["files"]


PAGE = Path(__file__).parents[2] / "docs/replace.md"
OWN = "my_types.extra_trees"


@pytest.mark.thorough
def test_a_model_type_of_ones_own_is_the_one_file_of_the_page(tmp_path, make_project, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_types").mkdir()
    (tmp_path / "my_types/extra_trees.py").write_text(code, encoding="utf-8")
    project = make_project(tmp_path / "project")
    write_german_table(project.root / "members.csv", 800)
    project.run("describe", "members.csv")
    searched = {"trials": 2, "folds": 2, "space": {OWN: {"max_depth": {"type": "int", "low": 2, "high": 8}}}}
    project.change_params({"dataset": "members", "model": {"type": OWN, "params": {}}, "tuning": searched})
    refused = " ".join(project.run("run", status=1).output.split())
    assert "there is no module my_types on Python's path" in refused
    monkeypatch.syspath_prepend(tmp_path)
    project.run_stages("ingest", "validate", "features", "training-set", "train", "evaluate")

    folder = project.root / "models/candidate"
    contract = read_contract(folder)
    assert contract.model_type == OWN
    rows = pd.read_parquet(project.root / "data/training/test.parquet")
    pipeline = load_pipeline(project.root / "models/pipeline/pipeline.skops", OWN)
    matrix = encode_frame(contract.features, rows)
    assert "ExtraTrees" in repr(pipeline)
    assert OnnxScorer(folder / MODEL_FILE).score(matrix) == pytest.approx(score(pipeline, rows), abs=1e-6)
    assert abs(open_explainer(folder / MODEL_FILE, contract).weigh(matrix)).max() > 0.01


@pytest.mark.parametrize(
    ("name", "message"), [("json.decoder", "must hold MODEL_TYPE"), ("json.none", "no module json.none")]
)
def test_a_module_without_a_model_type_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        find_model_type(name)
