"""How a person types a command of ours here, so that what we print works as it stands."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

PROGRAM_VARIABLE = "CLOSEDLOOP_PROGRAM"  # the Makefile sets it: whoever types make may not have activated .venv


def name_call(words: str, dataset: str | None = None) -> str:
    """The words of a command of ours behind the program that a person calls, with its data set."""
    program, of = os.environ.get(PROGRAM_VARIABLE, "closedloop"), name_option(dataset) if dataset else ""
    return f"{program.removesuffix(of)}{of} {words}"


def name_option(dataset: str) -> str:
    """The option, before a command, that chooses a data set."""
    return f" --dataset {shlex.quote(dataset)}"


def list_calls(dataset: str | None, features: Path, *, by_make: bool, missing: Mapping[str, str]) -> dict[str, str]:
    """The commands to type after a training run, as targets of make or as commands of ours.

    Parameters
    ----------
    dataset
        The data set, if it is not that of the project's own params.yaml.
    features
        A file of feature rows, to score.
    missing
        The commands that cannot run here, each with the extras that it needs.
    """
    scores, given = shlex.quote(str(features.parent.parent / "scores.parquet")), shlex.quote(str(features))
    of = f" DATASET={shlex.quote(dataset)}" if dataset else ""

    def call(command: str) -> str:
        return f"make {command}{of}" if by_make else name_call(command, dataset)

    rows = f" INPUT={given} OUTPUT={scores}" if by_make else f" --input {given} --output {scores}"
    served = f"  # install closedloop[{missing['serve']}] first" if "serve" in missing else ""
    watched = [call(command) for command in ("demo", "status") if command not in missing]
    return {
        "MLflow": call("ui"),
        "Serve": f"{call('serve')}{served}",
        "Score": f"{call('score')}{rows}",
        "Watch": "; ".join(watched),
        "Release": name_call("release history", dataset),
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
    os.environ[PROGRAM_VARIABLE] = name_call("", name).rstrip()
