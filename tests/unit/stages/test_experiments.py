"""What the last stages do in `dvc exp run`: they check, and register and build nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from closedloop.config.layout import Layout
from closedloop.contract import digest_folder
from closedloop.errors import GateFailed
from closedloop.stages.package import package
from closedloop.stages.register import check_experiment
from tests.model_folders import write_model_folder

NOBODY = cast(Any, SimpleNamespace(tracking=None))  # a registry that cannot be asked for anything


def run_register(folder: Path, *, passed: bool) -> Layout:
    model = write_model_folder(folder / "model")
    layout = Layout(model=model, gates=folder / "gates.json", registration=folder / "r.json", bento=folder / "bento",
                    package_metrics=folder / "p.json")  # fmt: skip
    verdict = {"folder_sha256": digest_folder(model), "passed": passed, "gates": {}}
    layout.gates.write_text(json.dumps(verdict), encoding="utf-8")
    check_experiment(layout)
    return layout


def test_an_experiment_registers_no_version_and_builds_no_bento(tmp_path: Path) -> None:
    layout = run_register(tmp_path, passed=True)
    digest = digest_folder(layout.model)
    told = {"model_name": "test_churn", "version": None, "alias": None, "folder_sha256": digest, "kind": "experiment"}
    assert json.loads(layout.registration.read_text(encoding="utf-8")) == told
    package(NOBODY, layout)
    assert json.loads(layout.package_metrics.read_text(encoding="utf-8"))["bento"] is None
    assert [file.name for file in layout.bento.iterdir()] == ["README.txt"]


def test_an_experiment_that_failed_its_gates_ends_as_any_other(tmp_path: Path) -> None:
    with pytest.raises(GateFailed):
        run_register(tmp_path, passed=False)
