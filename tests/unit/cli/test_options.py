"""What commands tell people is text, whatever the data put into it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from closedloop.cli.main import StepHandler
from closedloop.cli.options import enter_workspace, locate_given, shorten, tell, with_json

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
