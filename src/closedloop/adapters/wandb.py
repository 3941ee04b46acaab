"""Weights & Biases: a mirror of the search's trials, offline unless the user says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Mirror = Callable[[int, Mapping[str, Any], Mapping[str, float]], None]


@contextmanager
def open_mirror(project: str, *, enabled: bool) -> Iterator[Mirror]:
    """Yield a function that records one trial (number, parameters, figures); it does nothing unless ``enabled``."""
    if not enabled:
        yield lambda *_: None
        return
    import wandb

    def record(number: int, parameters: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        with wandb.init(
            project=project,
            name=f"trial {number}",
            config=dict(parameters),
            reinit="finish_previous",
            settings=wandb.Settings(silent=True),
        ) as run:
            run.log(dict(figures))

    yield record
