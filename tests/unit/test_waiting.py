"""The clock on a real terminal: it moves, gives way to what is written, and leaves no trace."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from closedloop.processes import start_process
from closedloop.waiting import ClockLine, note_usual, read_usual

SCRIPT = """
import logging, sys, time
from closedloop import waiting
from closedloop.cli.main import configure_logging
waiting.TICK_SECONDS = waiting.SHOWN_AFTER_SECONDS = 0.05
configure_logging()
with waiting.show_clock("train", 42):
    time.sleep(0.5)
    print("a result")
    logging.getLogger("closedloop.x").info("a step")
    time.sleep(0.5)
    print("a bar ", end="", flush=True)
    time.sleep(0.5)
    print("ends")
print("after")
"""


def run_on_terminal(*command: str, cwd: Path | None = None) -> str:
    """All that a command writes to a terminal of its own."""
    leader, follower = pty.openpty()
    with start_process(command, stdin=follower, stdout=follower, stderr=follower, cwd=cwd) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                more = os.read(leader, 65_536)
            except OSError:  # the other end is closed
                break
            if not more:
                break
            shown += more
    os.close(leader)
    assert process.returncode == 0, shown
    return shown.decode()


def test_it_moves_and_gives_way_to_what_is_written():
    shown = run_on_terminal(sys.executable, "-c", SCRIPT)
    assert shown.count("       train  0:00 of about 0:42") > 1
    kept = [re.sub(r"^.*\r\x1b\[K", "", line) for line in shown.replace("\r\n", "\n").split("\n")]
    assert kept == ["a result", f"{'':>12}  a step", "a bar ends", "after", ""]
    assert "\r" not in shown.split("a bar ")[1].split("ends")[0]  # an open line is another display's


def test_nothing_is_shown_where_there_is_no_terminal():
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert ran.stdout == "a result\na bar ends\nafter\n"
    assert ran.stderr == f"{'':>12}  a step\n"


def test_durations_are_noted_and_a_broken_note_breaks_nothing(tmp_path):
    path = tmp_path / "seconds.json"
    assert read_usual(path, "train", 60) == 60
    note_usual(path, "train", 7.26)
    note_usual(path, "ingest", 3)
    assert (read_usual(path, "train", 60), read_usual(path, "ingest", None)) == (7.3, 3.0)
    path.write_text("[", encoding="utf-8")
    note_usual(path, "train", 1)
    assert read_usual(path, "train", None) is None


def test_the_clock_of_make_ends_with_the_command_and_keeps_its_status(tmp_path):
    page = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    clock = page[page.index("define start_clock") : page.index("export PATH")]
    recipe = "all:\n\t@$(start_clock); ( sleep 2.5; printf 'done of more than the clock\\n'; {status} ); $(end_clock)\n"
    for status in ("true", "exit 3"):
        (tmp_path / "Makefile").write_text(clock + recipe.replace("{status}", status), encoding="utf-8")
        script = "make --silent; echo status $?"
        shown = run_on_terminal("sh", "-c", script, cwd=tmp_path)
        assert "0:01 of about" in shown
        assert re.split(r"[\r\n]", shown.partition("done of more")[0])[-1] == ""  # what is said begins its line
        assert ("status 0" in shown) == (status == "true")


@pytest.mark.timeout(60)
def test_the_clock_of_make_ends_where_its_shell_is_killed(tmp_path):
    page = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    clock = page[page.index("define start_clock") : page.index("export PATH")]
    recipe = "all:\n\t@$(start_clock); ( sleep 1.5; kill -9 $$$$ ); $(end_clock)\n"
    (tmp_path / "Makefile").write_text(clock + recipe, encoding="utf-8")
    assert "0:01 of about" in run_on_terminal(
        "sh", "-c", "make --silent; :", cwd=tmp_path
    )  # until nothing has the terminal open


def test_a_line_that_ends_in_the_open_is_not_overwritten():
    terminal = io.StringIO()
    clock = ClockLine(terminal)
    clock.write(terminal, "50% ")
    clock.show("0:05")
    assert terminal.getvalue() == "50% "
    clock.write(terminal, "100%\n")
    clock.show("0:06")
    assert terminal.getvalue().endswith("0:06")
