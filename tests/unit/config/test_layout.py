"""The layout is dvc.yaml's: the same outputs of the same stages, read by the same stages."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from closedloop.config.layout import HELP, READS, WRITES, Layout

GRAPH: dict[str, Any] = yaml.safe_load((Path(__file__).parents[3] / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
WAITED_FOR = {("features", "metrics/data_quality.json")}  # the data gate must have passed; nothing in it is read


def name_outputs(stage: str) -> set[str]:
    entries = GRAPH[stage].get("outs", []) + GRAPH[stage].get("metrics", [])
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


@pytest.mark.parametrize("stage", GRAPH)
def test_a_stage_writes_what_dvc_expects_of_it(stage: str) -> None:
    assert {str(getattr(Layout(), name)) for name in WRITES[stage]} == name_outputs(stage)


@pytest.mark.parametrize("stage", GRAPH)
def test_a_stage_reads_what_dvc_lets_it_wait_for(stage: str) -> None:
    made = set().union(*map(name_outputs, GRAPH))
    waited = {dep for dep in GRAPH[stage]["deps"] if dep in made and (stage, dep) not in WAITED_FOR}
    assert {str(getattr(Layout(), name)) for name in READS[stage]} == waited


def test_every_path_is_written_by_one_stage_and_described() -> None:
    written = [name for names in WRITES.values() for name in names]
    assert sorted(written) == sorted(HELP) == sorted(one.name for one in fields(Layout))
    assert len({getattr(Layout(), name) for name in written}) == len(written)
