"""What commands tell people is text, whatever the data put into it."""

from __future__ import annotations

from closedloop.cli.options import tell


def test_markup_of_the_terminal_in_a_text_is_shown_and_not_obeyed(capfd):
    tell("ingest", "5 rows of [/bold] and [red]plan[/red] \\")
    assert capfd.readouterr().err == "      ingest  5 rows of [/bold] and [red]plan[/red] \\\n"
