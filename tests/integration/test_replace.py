"""A part is replaced: a table is trained and tracked by another tracker, without MLflow."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from closedloop import bootstrap
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

    def log_pipeline(self, pipeline: Any, example: pd.DataFrame) -> str:
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
