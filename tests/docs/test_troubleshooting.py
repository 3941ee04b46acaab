"""Each message on the page of troubles still stands in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = [row.split("`")[1] for row in PAGE.splitlines() if row.startswith("| `")]


def list_texts() -> str:
    """Every text of the package, those in parts joined."""
    found = []
    for path in (ROOT / "src/closedloop").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
    return "\n".join(found)


TEXTS = list_texts()


def test_there_are_messages():
    assert len(MESSAGES) >= 15
    assert all(re.search("[a-z]", message) for message in MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_stands_in_the_code(message):
    assert message in TEXTS
