"""Which sections of a data set's config a stage of the training graph reads, as DVC is told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# read by these stages alone; ``params`` is merged into params.yaml, whose keys each stage names
READ_BY = {
    "gates": ("evaluate",),
    "description": ("evaluate",),
    "expectations": ("validate",),
    "value": ("train", "evaluate"),
    "params": (),
}


def depend_on_sections(graph: dict[str, Any], config: str, sections: Iterable[str]) -> None:
    """Let each stage that depends on the file ``config`` depend on those of its sections that the stage reads.

    DVC refuses a key that the file has not, so that a graph for any data set can only name the whole file; this graph
    is one data set's, and made anew before each run.

    >>> graph = {"stages": {"train": {"deps": ["club.yaml", "rows"], "params": ["seed"]}}}
    >>> depend_on_sections(graph, "club.yaml", ["columns", "gates"])
    >>> graph["stages"]["train"]
    {'deps': ['rows'], 'params': ['seed', {'club.yaml': ['columns']}]}
    """
    for stage, body in graph["stages"].items():
        if config in body.get("deps", []):
            read = sorted(one for one in sections if stage in READ_BY.get(one, (stage,)))
            body["deps"] = [one for one in body["deps"] if one != config]
            body["params"] = [*body.get("params", []), {config: read}]
