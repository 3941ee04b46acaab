"""The command line of the whole loop."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

import typer

from closedloop.cli.options import WORKFLOW, is_verbose, read_dataset
from closedloop.errors import ConfigError

app = typer.Typer()
# The stretch of the shop with its harmless and its harmful change.
FIRST, LAST = "2024-03-03", "2024-12-28"


@app.command(rich_help_panel=WORKFLOW)
def replay(
    first: Annotated[str, typer.Option("--from", help="UTC date of the first tick, whose model is the first.")] = FIRST,
    last: Annotated[str, typer.Option("--to", help="No tick after this date.")] = LAST,
    every: Annotated[int, typer.Option(help="Days from tick to tick.", min=1)] = 30,
    dataset: Annotated[str | None, typer.Option(help="Name of a data set (default: that of params.yaml).")] = None,
    source: Annotated[str | None, typer.Option(help="The data: a file, a folder or a pattern.")] = None,
    share: Annotated[
        float, typer.Option(help="Share of the customers, chosen by a stable hash.", min=0.01, max=1)
    ] = 0.5,
    horizon_days: Annotated[
        int | None, typer.Option(help="Horizon in days, in place of the label rule's.", min=1)
    ] = None,
    requests_min: Annotated[int, typer.Option(help="Smallest sample of each step of a release.", min=1)] = 200,
) -> None:
    """Replay a data set's history through the whole loop, beside a frozen model."""
    from closedloop.processes import exit_on_signals
    from closedloop.replay.replay import Plan, list_days
    from closedloop.replay.replay import replay as run

    try:
        days = list_days(dt.date.fromisoformat(first), dt.date.fromisoformat(last), every)
    except ValueError as error:
        raise ConfigError(f"replay: --from and --to are dates like {FIRST}: {error}") from error
    exit_on_signals()  # so that the service is ended in good order
    run(
        Plan(days, share, requests_min, horizon_days, verbose=is_verbose()),
        dataset=dataset or read_dataset(),
        source=source,
    )
