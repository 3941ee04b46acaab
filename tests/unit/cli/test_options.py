"""What commands tell people is text, whatever the data put into it."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import numpy as np
import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from closedloop import waiting
from closedloop.cli.main import StepHandler, app, fold_on_terminal
from closedloop.cli.options import (
    Commands,
    enter_workspace,
    fold,
    locate_given,
    locate_path,
    print_json,
    read_dataset,
    shorten,
    tell,
    with_json,
)
from closedloop.config.layout import HELP, READS
from tests.http_service import wait_until
from tests.unit.test_waiting import run_on_terminal

ROOT = Path(__file__).parents[3]


def test_markup_of_the_terminal_in_a_text_is_shown_and_not_obeyed(capfd):
    tell("ingest", "5 rows of [/bold] and [red]plan[/red] \\")
    assert capfd.readouterr().err == "      ingest  5 rows of [/bold] and [red]plan[/red] \\\n"


def test_a_path_is_told_as_it_is_typed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shorten(tmp_path / "reports/report.html") == Path("reports/report.html")
    assert shorten(Path("reports/index.html")) == Path("reports/index.html")
    assert shorten(tmp_path.parent / "report.html") == tmp_path.parent / "report.html"


def test_a_path_is_of_where_its_own_command_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several commands may run in one process: one in a workspace, and the next one elsewhere."""
    workspace = tmp_path / "workspaces/telco"
    workspace.mkdir(parents=True)
    (workspace / "params.yaml").touch()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("CLOSEDLOOP_PROGRAM", "closedloop")
    monkeypatch.chdir(tmp_path)
    enter_workspace("telco")
    assert Path.cwd() == workspace
    assert locate_given("rows.csv") == str(tmp_path / "rows.csv")
    assert locate_given("Kunden #3.csv") == str(tmp_path / "Kunden #3.csv")
    assert locate_given("~/rows.csv") == str(Path.home() / "rows.csv")
    assert locate_given("RETAIL_URL#scores") == "RETAIL_URL#scores"
    enter_workspace(None)
    assert locate_given("rows.csv") == "rows.csv"


def test_a_long_text_goes_on_below_its_first_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    tell("training set", "rows: train 148,692, validation 15,743, a-path/that-is-longer-than-a-line.html")
    assert capfd.readouterr().err.splitlines() == [
        "training set  rows: train 148,692,",
        "              validation 15,743,",
        "              a-path/that-is-longer-than-a-line.html",
    ]


class Found(NamedTuple):
    rows: int
    file: Path


def test_a_command_gets_json_beside_its_own_options() -> None:
    app = typer.Typer()

    @app.command()
    @with_json
    def count(file: Annotated[Path, typer.Option("--input", help="The file.")], rows: int = 3) -> Any:
        """Count rows."""
        typer.echo(f"{rows} rows", err=True)
        return Found(rows, file)

    plain = CliRunner().invoke(app, ["--input", "a.csv"])
    assert (plain.stdout, plain.stderr) == ("", "3 rows\n")
    shown = CliRunner().invoke(app, ["--input", "a.csv", "--rows", "5", "--json"])
    assert (json.loads(shown.stdout), shown.stderr) == ({"rows": 5, "file": "a.csv"}, "5 rows\n")
    assert "--json" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    assert CliRunner().invoke(app, ["--json"]).exit_code == 2  # --input is still required


def test_json_has_numbers_of_numpy_as_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"share": np.float64(0.5), "rows": np.int64(3), "won": np.bool_(True), "file": Path("a.csv")})
    assert json.loads(capsys.readouterr().out) == {"share": 0.5, "rows": 3, "won": True, "file": "a.csv"}


def test_signs_of_two_columns_are_counted_as_two() -> None:
    assert fold("'解約理由' is left out", 22, 2) == "'解約理由' is left\n  out"


def test_a_step_is_folded_on_a_terminal_and_whole_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    digest = "e2bef2ad64b0a8057501773d7ae905d413085f41"
    step = logging.LogRecord("closedloop", logging.INFO, "", 1, "journal entry %d: promote, hash %s", (1, digest), None)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert StepHandler().format(step).splitlines() == [
        "              journal entry 1: promote,",
        "              hash",
        f"              {digest}",
    ]
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    assert StepHandler().format(step) == f"{'':14}journal entry 1: promote, hash {digest}"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("words", "title"),
    [
        ("count", "count"),
        ("group add", "group add"),
        ("score", None),
        ("count --every 1d", None),
    ],
)
def test_every_command_shows_a_clock_that_does_not_run_until_it_is_stopped(
    words: str, title: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next time it says how long the command took; of one that failed nothing is noted."""
    app, group = typer.Typer(cls=Commands), typer.Typer(cls=Commands)
    app.add_typer(group, name="group")
    shown = Terminal()

    def work(every: str | None = None, fail: bool = False) -> None:
        """Work until the clock has been seen twice, where there is one."""
        if fail:
            raise typer.Exit(1)
        if title is not None:
            wait_until(lambda: shown.getvalue().count("0:0") > 1, "the clock")

    for name in ("count", "score"):
        app.command(name)(work)
    group.command("add")(work)
    group.command("other")(work)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(waiting, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(waiting, "SHOWN_AFTER_SECONDS", 0.0)
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    monkeypatch.setattr("sys.stderr", shown)
    program = typer.main.get_command(app)
    with pytest.raises(SystemExit):
        program([*words.split(), "--fail"])
    assert not (tmp_path / ".dvc/tmp/seconds.json").exists()
    shown.seek(shown.truncate(0))
    with pytest.raises(SystemExit) as ended:
        program(words.split(), prog_name="python -m closedloop.cli.main")  # as workflow.py calls stages without DVC
    assert ended.value.code == 0
    if title is None:
        assert shown.getvalue() == ""
        return
    assert f"{title:>12}  0:00" in shown.getvalue()
    assert title in json.loads((tmp_path / ".dvc/tmp/seconds.json").read_text(encoding="utf-8"))
    shown.seek(shown.truncate(0))
    with pytest.raises(SystemExit):
        program(words.split())
    assert f"{title:>12}  0:00 of about 0:00" in shown.getvalue()


def list_commands(group: TyperGroup, before: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from list_commands(command, (*before, name))
        elif not command.hidden:
            yield " ".join((*before, name)), command


COMMANDS = dict(list_commands(cast(TyperGroup, typer.main.get_command(app))))


def test_each_path_that_a_person_gives_is_of_where_it_was_typed(tmp_path: Path) -> None:
    """A command before which --dataset stands works in the workspace; that is nothing to a path that was typed."""
    found = []
    for name, command in COMMANDS.items():
        for option in command.params:
            own = option.name == "params" or (name.replace("-", "_") in READS and option.name in HELP)
            if "path" in str(option.type_descriptor).lower() and not own:
                found.append(f"{name} {option.name}")
                assert option.callback is not None, f"{found[-1]}: callback=locate_path"
    assert {"outcomes source", "edge export output", "attach config", "serve bento"} <= set(found)
    assert locate_path(None) is None


def test_the_reference_says_which_commands_have_no_json_and_why() -> None:
    page = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    table = page.partition("<!-- without JSON -->")[2].partition("<!-- end -->")[0]
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall("`(.*?)`", row)]
    without = [name for name, one in COMMANDS.items() if all("--json" not in option.opts for option in one.params)]
    assert sorted(named) == sorted(without)


def test_beside_json_nothing_goes_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    @with_json
    def work() -> Any:
        """Say something here and in a child."""
        typer.echo("said here")
        subprocess.run(["echo", "said by a child"], check=True)
        return {"rows": 3}

    with pytest.raises(SystemExit):
        app(["--json"])
    told = capfd.readouterr()
    assert json.loads(told.out) == {"rows": 3}
    assert told.err == "said here\nsaid by a child\n"
    with pytest.raises(SystemExit):
        app([])
    assert capfd.readouterr().out == "said here\nsaid by a child\n"


def test_durations_are_read_and_noted_in_the_workspace_of_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where --dataset stands before the command; a command that makes workspaces stays in the project's folder."""
    app, seen, shown = typer.Typer(cls=Commands), [], Terminal()

    @app.callback()
    def begin(dataset: str | None = None) -> None:
        """Begin."""

    @app.command()
    def check() -> None:
        """Work until the clock has been seen."""
        wait_until(lambda: shown.getvalue().count("0:0") > 1, "the clock")

    @app.command()
    def make(dataset: str | None = None) -> None:
        """Make a workspace."""
        seen.append((dataset or read_dataset(), Path.cwd()))

    workspace = tmp_path / "workspaces/telco"
    for folder in (tmp_path, workspace):
        (folder / ".dvc/tmp").mkdir(parents=True)
    (workspace / "params.yaml").touch()
    (workspace / ".dvc/tmp/seconds.json").write_text('{"check": 5}', encoding="utf-8")
    (tmp_path / ".dvc/tmp/seconds.json").write_text('{"check": 9}', encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("CLOSEDLOOP_PROGRAM", "closedloop")
    monkeypatch.setattr(waiting, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(waiting, "SHOWN_AFTER_SECONDS", 0.0)
    program = typer.main.get_command(app)
    for words in ("--dataset telco make", "make --dataset telco"):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit):
            program(words.split())
    assert seen == [("telco", tmp_path)] * 2
    monkeypatch.setattr("sys.stderr", shown)
    with pytest.raises(SystemExit):
        program(["--dataset", "telco", "check"])
    assert "check  0:00 of about 0:05" in shown.getvalue()
    assert json.loads((workspace / ".dvc/tmp/seconds.json").read_text(encoding="utf-8"))["check"] < 5
    assert json.loads((tmp_path / ".dvc/tmp/seconds.json").read_text(encoding="utf-8"))["check"] == 9
    enter_workspace(None)


def test_an_error_is_folded_between_words_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    text = "GateFailed: 1 of 17 gates failed:\n  - raise gates.rate_difference_max"
    assert fold_on_terminal(text) == text
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert fold_on_terminal(text) == ("GateFailed: 1 of 17 gates\nfailed:\n  - raise\n  gates.rate_difference_max")


UNDER_A_BAR = """
from rich.console import Console
from closedloop.cli.options import tell
from closedloop.waiting import build_bar
with build_bar(Console(stderr=True)) as progress:
    progress.add_task("the service starts", total=10)
    progress.refresh()
    tell("demo", "version 1 answers")
"""


def test_what_is_told_under_a_bar_takes_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = run_on_terminal(sys.executable, "-c", UNDER_A_BAR)
    line = next(one for one in shown.split("\r\n") if "version 1 answers" in one)
    assert "the service starts" not in line.split("\x1b[2K")[-1]
