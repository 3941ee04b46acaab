"""The command line of the status screen."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from closedloop.cli.options import (
    MONITORING,
    PARAMS,
    ClockOption,
    JsonOption,
    ParamsOption,
    print_json,
    read_clock_at,
    read_now,
)

if TYPE_CHECKING:
    from closedloop.bootstrap import RunContext
    from closedloop.loop.status.next_step import NextStep, Surroundings
    from closedloop.loop.status.overview import Overview
    from closedloop.loop.status.status import Line

app = typer.Typer()


@app.command(rich_help_panel=MONITORING)
def status(
    params: ParamsOption = PARAMS,
    as_of: ClockOption = None,
    service: Annotated[str | None, typer.Option(help="Address of the service (default: where it was started).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show on one screen which model serves, how well, and what to do next."""
    from closedloop.bootstrap import load_run

    show_status(load_run(params), as_of=as_of, service=service, as_json=as_json)


def show_status(context: RunContext, *, as_of: str | None, service: str | None, as_json: bool) -> None:
    """Print the screen of a run's data set."""
    import msgspec

    from closedloop.config.calls import name_call
    from closedloop.loop.status.next_step import find_next_step
    from closedloop.loop.status.status import describe

    view, around = look(context, as_of=as_of, service=service)
    step = find_next_step(view, around)
    if as_json:
        told = {"next_step": step.text, "next_command": name_call(step.command) if step.command else None}
        answering = None if around.service is None else around.service._asdict()
        shown = msgspec.to_builtins(view) | {"service": answering} | told
        print_json(shown)
        return
    _print_screen(f"{view.model_name}  {view.now:%F %H:%M} UTC", describe(view, around), step)


def look(context: RunContext, *, as_of: str | None, service: str | None) -> tuple[Overview, Surroundings]:
    """The state of the loop, and what stands beside the store; a replay's folder goes by the clock of its replay."""
    from closedloop.adapters.service import read_health
    from closedloop.bootstrap import locate_service, read_overview
    from closedloop.extras import find_missing
    from closedloop.loop.status.last_run import list_with_results, read_last_run
    from closedloop.loop.status.next_step import Surroundings
    from closedloop.serving.clock import Clock

    simulated = context.settings.locate("state/clock")
    now: dt.datetime = Clock(simulated)() if simulated.is_file() else read_now()
    clock = read_clock_at(as_of, context, now)
    address = service or locate_service(context).address
    ran = read_last_run(context.dataset.model_name)
    around = Surroundings(
        address,
        read_health(address),
        is_live=clock == now,
        registered=ran.registered,
        stopped_by=ran.stopped_by,
        is_replayed=simulated.is_file(),
        others=tuple(list_with_results(Path("workspaces"))),
        missing=find_missing(),
    )
    return read_overview(context, now, clock), around


def _print_screen(title: str, lines: list[Line], step: NextStep) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from closedloop.config.calls import name_call

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row(line.name, Text(line.text, style=line.style))
    console = Console(highlight=False)
    console.print(Panel(table, title=Text(title, style="bold"), title_align="left", padding=(1, 2)))
    console.print(Text(f"Next: {step.text}{':' if step.command else ''}", style="bold"))
    if step.command:  # unwrapped, so that it can be copied
        console.print(Text(f"  {name_call(step.command)}"), soft_wrap=True)
