"""What commands tell people is text, whatever the data put into it."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from closedloop import waiting
from closedloop.cli.main import StepHandler
from closedloop.cli.options import Commands, enter_workspace, fold, locate_given, print_json, shorten, tell, with_json
from tests.http_service import wait_until

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
