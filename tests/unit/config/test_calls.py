"""What we print is typed as it stands."""

from __future__ import annotations

import os
import sys

import pytest

from closedloop.config.calls import PROGRAM_VARIABLE, name_call, remember_program


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
