"""The command line explains itself, quickly: no help text needs the heavy libraries."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
import typer
import yaml
from typer.core import TyperCommand, TyperGroup
from typer.testing import CliRunner

from closedloop.cli.main import app
from closedloop.cli.options import READ_ONLY
from tests.conftest import SOURCE_ROOT

HEADINGS = ("Workflow", "Serving", "Monitoring", "Release", "Store", "Tools")
HEAVY = [
    "dvc",
    "duckdb",
    "feast",
    "great_expectations",
    "ibis",
    "matplotlib",
    "mlflow",
    "onnx",
    "onnxruntime",
    "optuna",
    "pandas",
    "pyarrow",
    "scipy",
    "sklearn",
    "skl2onnx",
    "skops",
    "statsmodels",
]
# One process for all help texts: what it has imported in the end, any of them needed.
SCRIPT = """
import contextlib, io, json, sys
from closedloop.cli import main as cli
texts = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["closedloop", *([command] if command else []), "--help"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            cli.main()
        except SystemExit as ended:
            assert not ended.code, (command, ended.code)
    texts[command] = output.getvalue()
print(json.dumps({"texts": texts, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""


def test_help_lists_every_command_and_explains_each_without_heavy_imports(project):
    stages = [
        name.replace("_", "-")
        for name in yaml.safe_load((project.root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    ]
    commands = [*stages, "refresh", "run"]
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(["", *commands])],
        capture_output=True,
        text=True,
        cwd=project.root,
        check=True,
    )
    found = json.loads(ran.stdout)
    for command in commands:
        assert f" {command} " in found["texts"][""]
        assert f"Usage: closedloop {command}" in found["texts"][command]
    for stage in stages:
        assert "--params" in found["texts"][stage]
    assert set(HEAVY) & set(found["modules"]) == set()
    assert list(project.root.glob("data")) == []
    text = found["texts"][""]
    places = [text.index(f"─ {heading} ─") for heading in HEADINGS]
    assert places == sorted(places)
    assert "─ Commands ─" not in text  # where a command without a heading would stand


def list_commands(group: TyperGroup, prefix: str = "") -> dict[str, TyperCommand | TyperGroup]:
    found = {}
    for name, command in group.commands.items():
        inner = list_commands(command, f"{prefix}{name} ") if isinstance(command, TyperGroup) else {}
        found |= {f"{prefix}{name}": command} | inner
    return {name: command for name, command in found.items() if not command.hidden}


COMMANDS = list_commands(typer.main.get_command(app))
GROUPS = ["", *(name for name, command in COMMANDS.items() if isinstance(command, TyperGroup))]
CHANGES = {name.split()[-1] for name in COMMANDS if name not in GROUPS} - READ_ONLY


@pytest.mark.parametrize("name", sorted(CHANGES))
@pytest.mark.parametrize("mistype", [lambda name: name[:-1], lambda name: f"{name}e", lambda name: name[1:]])
def test_a_typo_is_never_answered_with_a_command_that_changes_something(project, name, mistype):
    for group in GROUPS:
        words = [*group.split(), mistype(name)]
        output = " ".join(project.run(*words, status=1).output.replace("│", " ").split())
        assert f"No such command '{words[-1]}'" in output
        assert set(re.findall(r"'(\w+)'", output.partition("Did you mean")[2])).isdisjoint(CHANGES), output


@pytest.mark.parametrize(
    ("typed", "meant"), [("statsu", "status"), ("relase", "release"), ("release histry", "history")]
)
def test_a_typo_of_a_command_that_changes_nothing_is_understood(project, typed, meant):
    assert f"Did you mean '{meant}'?" in project.run(*typed.split(), status=1).output


def test_the_version_is_the_package_s(project):
    found = tomllib.loads((SOURCE_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert project.run("--version").output == f"closedloop {found}\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("closedloop rel", {"release"}), ("closedloop release pro", {"promote"}), ("closedloop status --", {"--json"})],
)
def test_bash_completes_commands_and_options(typed, offered):
    words = {"_CLOSEDLOOP_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    asked = subprocess.run(["closedloop"], env=os.environ | words, capture_output=True, text=True, check=False)
    assert offered <= set(asked.stdout.split()), asked.stderr


def test_no_colour_reaches_a_pipe_or_a_person_who_wants_none(project):
    told = {"NO_COLOR": "1", "TERM": "xterm-256color", "PATH": os.environ["PATH"], "HOME": str(project.root)}
    command = ["script", "--quiet", "--return", "--command", "closedloop status", "/dev/null"]
    shown = subprocess.run(command, cwd=project.root, env=told, capture_output=True, text=True, check=True).stdout
    assert "train a first model" in shown
    assert not re.search(r"\x1b\[[0-9;]*[34][0-9]m", shown), shown  # a colour; bold is none
    coloured = {name: value for name, value in told.items() if name != "NO_COLOR"}
    shown = subprocess.run(command, cwd=project.root, env=coloured, capture_output=True, text=True, check=True).stdout
    assert re.search(r"\x1b\[[0-9;]*3[0-9]m", shown), shown
    assert "\x1b" not in project.run("status").output


def test_help_and_screens_fit_80_columns(project):
    narrow = os.environ | {"COLUMNS": "80"}
    for words in ([], ["status"]):
        command = ["closedloop", *words]
        shown = subprocess.run(command, cwd=project.root, env=narrow, capture_output=True, text=True, check=False)
        assert max(map(len, (shown.stdout + shown.stderr).splitlines())) <= 80, command
    for name in COMMANDS:
        text = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "80"}).output
        assert f"Usage: root {name} " in text
        assert max(map(len, text.splitlines())) <= 80, name


@pytest.mark.parametrize(("name", "command"), COMMANDS.items())
def test_a_command_and_its_options_say_what_they_are_in_a_sentence(name, command):
    summary = command.get_short_help_str(1_000).rstrip(".")
    assert re.match(r"[A-Z][a-z]+[ ,]", summary), "it begins with what the command does"
    assert len(summary) <= 90
    for option in command.params:
        text = getattr(option, "help", None)
        assert text, f"{name} {option.name}"
        assert text[0] == text[0].upper()
        assert text.endswith(".") or option.name == "help"
