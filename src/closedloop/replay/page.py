"""The HTML page of a replay: one picture, and a table of the events with their reasons."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from closedloop.adapters.jinja import render_page
from closedloop.adapters.matplotlib import draw_loop
from closedloop.files import write_text


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write a page that opens offline, and its picture beside it (``.png``)."""
    picture = draw_loop(path.with_suffix(".png"), report)
    encoded = base64.b64encode(picture.read_bytes()).decode()
    write_text(path, render_page("loop.html", report=report, image=encoded))
