"""What we print is typed as it stands."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from closedloop.config.calls import PROGRAM_VARIABLE, list_calls, name_call, remember_dataset, remember_program


@pytest.mark.parametrize(
    ("activated", "said"), [(None, ".venv/bin/closedloop"), ("other", ".venv/bin/closedloop"), (".venv", "closedloop")]
)
def test_a_command_is_named_by_the_program_that_is_run(tmp_path, monkeypatch, activated, said):
    for name in (".venv", "other"):
        script = tmp_path / name / "bin/closedloop"
        script.parent.mkdir(parents=True)
        script.write_text("#!/bin/sh\n", encoding="utf-8")
        script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv/bin/closedloop")])
    monkeypatch.setenv("PATH", os.pathsep.join([*([str(tmp_path / activated / "bin")] if activated else []), "/bin"]))
    monkeypatch.setenv(PROGRAM_VARIABLE, "to be put back")
    monkeypatch.delenv(PROGRAM_VARIABLE)
    remember_program()
    assert name_call("serve") == f"{said} serve"


def test_a_data_set_is_named_once(monkeypatch):
    monkeypatch.setenv(PROGRAM_VARIABLE, ".venv/bin/closedloop")
    remember_dataset("telco")
    for call in ("status", "run"):
        assert name_call(call) == name_call(call, "telco") == f".venv/bin/closedloop --dataset telco {call}"
    calls = list_calls("telco", Path("data/features/2024-01-01.parquet"), by_make=False, missing={})
    assert all(one.count("--dataset telco") == one.count("closedloop") for one in calls.values()), calls


def test_what_is_not_installed_is_offered_with_its_extra_or_not_at_all(monkeypatch):
    monkeypatch.setenv(PROGRAM_VARIABLE, "closedloop")
    file = Path("data/features/2024-01-01.parquet")
    every = list_calls(None, file, by_make=False, missing={})
    assert (every["Serve"], every["Watch"]) == ("closedloop serve", "closedloop demo; closedloop status")
    lower = list_calls(None, file, by_make=False, missing={"serve": "serve", "demo": "serve"})
    assert lower["Serve"] == "closedloop serve  # install closedloop[serve] first"
    assert lower["Watch"] == "closedloop status"
