"""The command line of the whole loop."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

import typer

from closedloop.errors import ConfigError

app = typer.Typer()
# The stretch of the shop with its harmless and its harmful change.
FIRST, LAST = "2024-03-03", "2024-12-28"


@app.command()
def replay(
    first: Annotated[str, typer.Option("--from", help="UTC date of the first tick, whose model is the first.")] = FIRST,
    last: Annotated[str, typer.Option("--to", help="No tick after this date.")] = LAST,
    every: Annotated[int, typer.Option(help="Days from tick to tick.", min=1)] = 30,
    dataset: Annotated[str | None, typer.Option(help="Default: that of params.yaml.")] = None,
    source: Annotated[str | None, typer.Option(help="File, folder or glob of the data.")] = None,
    share: Annotated[float, typer.Option(help="Of the customers, by a stable hash.", min=0.01, max=1)] = 0.5,
    horizon_days: Annotated[int | None, typer.Option(help="Another horizon than the label rule's.", min=1)] = None,
    requests_min: Annotated[int, typer.Option(help="Least sample of each step of a release.", min=1)] = 200,
) -> None:
    """Replay a data set's history through the whole loop, beside a model that is left alone."""
    from closedloop.replay import Plan, list_days
    from closedloop.replay import replay as run

    try:
        days = list_days(dt.date.fromisoformat(first), dt.date.fromisoformat(last), every)
    except ValueError as error:
        raise ConfigError(f"replay: --from and --to are dates like {FIRST}: {error}") from error
    run(Plan(days, share, requests_min, horizon_days), dataset=dataset, source=source)
