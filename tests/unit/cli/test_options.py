"""What commands tell people is text, whatever the data put into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from closedloop.cli.options import shorten, tell


def test_markup_of_the_terminal_in_a_text_is_shown_and_not_obeyed(capfd):
    tell("ingest", "5 rows of [/bold] and [red]plan[/red] \\")
    assert capfd.readouterr().err == "      ingest  5 rows of [/bold] and [red]plan[/red] \\\n"


def test_a_path_is_told_as_it_is_typed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shorten(tmp_path / "reports/report.html") == Path("reports/report.html")
    assert shorten(Path("reports/index.html")) == Path("reports/index.html")
    assert shorten(tmp_path.parent / "report.html") == tmp_path.parent / "report.html"


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
