"""Jinja: HTML pages that open offline; every value is escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "pages"


def render_page(name: str, **values: Any) -> str:
    """Fill a template of the ``pages`` folder; an unknown name in it is an error, not an empty place."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(**values)
