"""Options that several commands have."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from closedloop.errors import ConfigError

if TYPE_CHECKING:
    from closedloop.bootstrap import RunContext

PARAMS = Path("params.yaml")
ParamsOption = Annotated[Path, typer.Option("--params", help="Values that change the model; they name the data set.")]
AsOfOption = Annotated[str, typer.Option(help="UTC date: what happened before it is known.")]
ClockOption = Annotated[
    str | None, typer.Option("--as-of", help="The data's clock: a UTC date, or 'now' (production's default).")
]
ModelOption = Annotated[Path | None, typer.Option(help="A model folder, instead of the released version.")]


def read_now() -> dt.datetime:
    """The wall clock, UTC."""
    return dt.datetime.now(dt.UTC)


def read_clock(text: str | None, context: RunContext) -> dt.date | None:
    """The date that ``--as-of`` takes for today; None is the wall clock, which production goes by."""
    if text is None:
        return None if context.settings.profile == "production" else context.params.as_of
    return None if text == "now" else read_date("--as-of", text, ", or 'now'")


def read_date(option: str, text: str, others: str = "") -> dt.date:
    """The date that an option gives.

    Raises
    ------
    ConfigError
        If it is none.
    """
    try:
        return dt.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: a date as 2025-01-31{others}") from error


def check_model(model: Path | None) -> Path | None:
    """A model folder, if one is given.

    Raises
    ------
    ConfigError
        If the folder is none.
    """
    if model is not None and not (model / "contract.json").is_file():
        raise ConfigError(f"--model {model}: there is no contract.json; give a folder that 'closedloop train' made")
    return model
