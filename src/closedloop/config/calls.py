"""How a person types a command of ours here, so that what we print works as it stands."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

PROGRAM_VARIABLE = "CLOSEDLOOP_PROGRAM"  # the Makefile sets it: whoever types make may not have activated .venv


def name_call(words: str) -> str:
    """The words of a command of ours behind the program that a person calls, with its data set."""
    return f"{os.environ.get(PROGRAM_VARIABLE, 'closedloop')} {words}"


def list_calls(dataset: str | None, features: Path, *, by_make: bool) -> dict[str, str]:
    """The commands to type after a training run, as targets of make or as commands of ours.

    Parameters
    ----------
    dataset
        The data set, if it is not that of the project's own params.yaml.
    features
        A file of feature rows, to score.
    """
    scores = shlex.quote(str(features.parent.parent / "scores.parquet"))
    given = shlex.quote(str(features))
    if by_make:
        of = f" DATASET={shlex.quote(dataset)}" if dataset else ""
        program = name_call(f"--dataset {shlex.quote(dataset)} " if dataset else "")
        return {
            "MLflow": f"make ui{of}",
            "Serve": f"make serve{of}",
            "Score": f"make score{of} INPUT={given} OUTPUT={scores}",
            "Watch": f"make demo{of}; make status{of}",
            "Release": f"{program.rstrip()} release history",
        }
    of = f"--dataset {shlex.quote(dataset)} " if dataset else ""
    return {
        "MLflow": name_call(f"{of}ui"),
        "Serve": name_call(f"{of}serve"),
        "Score": name_call(f"{of}score --input {given} --output {scores}"),
        "Watch": f"{name_call(f'{of}demo')}; {name_call(f'{of}status')}",
        "Release": name_call(f"{of}release history"),
    }


def remember_program() -> None:
    """Keep how this process was called, unless whoever started it said so; paths are relative to where we began."""
    script, found = Path(sys.argv[0]), shutil.which("closedloop")
    if PROGRAM_VARIABLE in os.environ or script.name != "closedloop":
        return
    if found and script.exists() and script.samefile(found):  # not that of another environment
        return
    inside = script.is_absolute() and script.is_relative_to(Path.cwd())
    os.environ[PROGRAM_VARIABLE] = shlex.quote(str(script.relative_to(Path.cwd()) if inside else script))


def remember_dataset(name: str) -> None:
    """Every call from here on is of this data set's workspace."""
    os.environ[PROGRAM_VARIABLE] = name_call(f"--dataset {shlex.quote(name)}")
