"""What the last stages do in `dvc exp run`: they check, and register and build nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from closedloop.config.layout import Layout
from closedloop.errors import GateFailed
from closedloop.stages import register as stage
from closedloop.stages.package import package
from closedloop.stages.register import check_experiment

NOBODY = cast(Any, SimpleNamespace(tracking=None))  # a registry that cannot be asked for anything


def run_register(folder: Path, monkeypatch: pytest.MonkeyPatch, *, passed: bool) -> Layout:
    layout = Layout(gates=folder / "gates.json", registration=folder / "r.json", bento=folder / "bento",
                    package_metrics=folder / "p.json")  # fmt: skip
    layout.gates.write_text(json.dumps({"folder_sha256": "d", "passed": passed, "gates": {}}), encoding="utf-8")
    monkeypatch.setattr(stage, "read_contract", lambda _: SimpleNamespace(model_name="shop_churn"))
    monkeypatch.setattr(stage, "digest_folder", lambda _: "d")
    check_experiment(layout)
    return layout


def test_an_experiment_registers_no_version_and_builds_no_bento(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = run_register(tmp_path, monkeypatch, passed=True)
    told = {"model_name": "shop_churn", "version": None, "alias": None, "folder_sha256": "d", "kind": "experiment"}
    assert json.loads(layout.registration.read_text(encoding="utf-8")) == told
    package(NOBODY, layout)
    assert json.loads(layout.package_metrics.read_text(encoding="utf-8"))["bento"] is None
    assert [file.name for file in layout.bento.iterdir()] == ["README.txt"]


def test_an_experiment_that_failed_its_gates_ends_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GateFailed):
        run_register(tmp_path, monkeypatch, passed=False)
