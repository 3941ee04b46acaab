"""Targets: what a figure must reach, the table that shows it, and the report file."""

from __future__ import annotations

import json
import os
import platform
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple


class Target(NamedTuple):
    """A figure and its limit."""

    target: str
    value: float
    sign: Literal[">=", "<="]
    limit: float

    @property
    def met(self) -> bool:
        # a numpy bool would not go into JSON
        return bool(self.value >= self.limit if self.sign == ">=" else self.value <= self.limit)


def show_targets(targets: Sequence[Target]) -> None:
    """The table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table("target", "value", "limit", "met")
    for target in targets:
        limit, met = f"{target.sign} {target.limit:g}", "yes" if target.met else "NO"
        table.add_row(target.target, f"{target.value:.3g}", limit, met)
    if targets:
        Console().print(table)


def show(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """A table of figures by name."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console().print(table)


def finish(arguments: Namespace, settings: Iterable[str], figures: dict[str, Any], targets: Sequence[Target]) -> int:
    """Write the report where one is asked for; the exit status: 1 names the first target that was missed."""
    if arguments.json:
        machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
        judged = [{**target._asdict(), "value": float(target.value), "met": target.met} for target in targets]
        chosen = {key: getattr(arguments, key) for key in settings}
        report = {"settings": chosen, "machine": machine, **figures, "targets": judged}
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    missed = [target.target for target in targets if not target.met]
    if missed:
        print(f"missed: {missed[0]}", file=sys.stderr)
    return 1 if missed else 0
