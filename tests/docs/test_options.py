"""The page of options is what the code gives."""

from __future__ import annotations

from docs.options import PAGE, write_page


def test_the_page_is_written_from_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == write_page(), "run: make options"
