"""One pass of the drain, and what became of its lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from closedloop.serving.log import drain
from closedloop.serving.log.progress import measure_waiting, read_progress


class Drained(NamedTuple):
    """How many lines were stored, refused, corrupt and torn; what waits; and what an operator is told."""

    rows: int
    refused: int
    corrupt: int
    torn: int
    depth_bytes: int
    problems: list[str]


def drain_once(
    root: Path,
    store: Any,
    model_name: str,
    batch_rows: int = 500,
    report: Callable[[Mapping[str, int]], None] = lambda _: None,
    **options: Any,
) -> Drained:
    total: Counter[str] = Counter()

    def add(counts: Mapping[str, int]) -> None:
        total.update(counts)
        report(counts)

    problems = drain.drain_once(root, store, model_name, batch_rows, add, **options)
    counts = [total[name] for name in ("stored", "refused", "corrupt", "torn")]
    return Drained(*counts, measure_waiting(root, read_progress(root)), problems)
