"""The command line of looking at the loop: for Prometheus, and for people."""

from __future__ import annotations

import datetime as dt
import os
import signal
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from closedloop.cli_options import PARAMS, ClockOption, ParamsOption, read_clock, read_now
from closedloop.errors import ServiceUnavailable

if TYPE_CHECKING:
    from closedloop.bootstrap import RunContext
    from closedloop.loop.overview import Overview
    from closedloop.loop.status import Line

app = typer.Typer()


@app.command()
def exporter(params: ParamsOption = PARAMS, as_of: ClockOption = None) -> None:
    """Serve the loop's figures to Prometheus, until stopped."""
    from prometheus_client import start_http_server

    from closedloop.bootstrap import build_overview, load_run
    from closedloop.loop.exporter import build_registry

    context = load_run(params)
    gather = build_overview(context)

    def read() -> Overview:
        now = read_now()
        return gather(now, _read_clock(as_of, context, now))

    settings, stopped = context.settings.exporter, threading.Event()
    _read_clock(as_of, context, read_now())  # a wrong one is said before the first scrape
    try:
        server, _ = start_http_server(settings.port, settings.host, build_registry(read))
    except OSError as error:
        raise ServiceUnavailable(f"exporter.port {settings.port}: {error.strerror}") from error
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    typer.echo(f"metrics on http://{settings.host}:{server.server_port}/metrics", err=True)
    stopped.wait()


@app.command()
def status(
    params: ParamsOption = PARAMS,
    as_of: ClockOption = None,
    service: Annotated[str | None, typer.Option(help="The service's address (default: the settings').")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it, for machines.")] = False,
) -> None:
    """What serves, how it does, what happened last, and what comes next: one screen."""
    import msgspec

    from closedloop.adapters.service import read_health
    from closedloop.bootstrap import build_overview, load_run
    from closedloop.loop.status import describe, find_next_step

    context, now = load_run(params), read_now()
    view = build_overview(context)(now, _read_clock(as_of, context, now))
    address = service or f"http://{context.settings.serving.host}:{context.settings.serving.port}"
    answering = read_health(address)
    if as_json:
        shown = {**msgspec.to_builtins(view), "answering": answering, "next_step": find_next_step(view, answering)}
        typer.echo(msgspec.json.format(msgspec.json.encode(shown)).decode())
        return
    _print_screen(f"{view.model_name}  {now:%F %H:%M} UTC", describe(view, address, answering))


@app.command()
def doctor(params: ParamsOption = PARAMS) -> None:
    """Ask every service of the profile whether it is there, lets us in and fits this release; 1 if one is not well."""
    from closedloop.bootstrap import build_probes, load_run
    from closedloop.loop.doctor import examine

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # who asks wants to know now
    broken = 0
    for found in examine(build_probes(load_run(params))):
        broken += bool(found.remedy)
        typer.echo(f"{'broken' if found.remedy else 'well':>6}  {found.name}: {found.text}")
        if found.remedy:
            typer.echo(f"        do: {found.remedy}")
    if broken:
        raise SystemExit(1)


def _print_screen(title: str, lines: list[Line]) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row(line.name, Text(line.text, style=line.style))
    Console(highlight=False).print(Panel(table, title=Text(title, style="bold"), title_align="left", padding=(1, 2)))


def _read_clock(text: str | None, context: RunContext, now: dt.datetime) -> dt.datetime:
    day = read_clock(text, context)
    return now if day is None else dt.datetime.combine(day, dt.time(), dt.UTC)
