"""Jinja: HTML pages that open offline; every value is escaped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from closedloop.errors import count_noun

FOLDER = Path(__file__).parent.parent / "pages"
LOOK_ALIKES = str.maketrans("<>&\"'`", "‹›＆″′ˋ")  # noqa: RUF001


def read_page(name: str) -> str:
    """A page that is no template but for the parts that it shares with other pages."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    return re.sub(r'{% include "(.+?)" %}', lambda part: read_page(part[1]), text)


def render_page(name: str, **values: Any) -> str:
    """Fill a template of the ``pages`` folder; an unknown name in it raises an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(count_noun=count_noun, **values)


def disarm(value: Any) -> Any:
    """Replace HTML's special characters by look-alikes, in values and keys, for a page that another tool writes.

    Escaping them would not work: the tools escape some places themselves, which would then show ``&amp;lt;``.

    Examples
    --------
    >>> any(mark in str(disarm({"<b>": ["R&D", 7]})) for mark in "<>&")
    False
    """
    if isinstance(value, str):
        return value.translate(LOOK_ALIKES)
    if isinstance(value, dict):
        return {disarm(name): disarm(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [disarm(one) for one in value]
    return value
