"""What commands tell people is text, whatever the data put into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from closedloop.cli.options import enter_workspace, locate_given, shorten, tell

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
