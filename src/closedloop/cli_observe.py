"""The command line of looking at the loop: for Prometheus, and for people."""

from __future__ import annotations

import datetime as dt
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from closedloop.errors import ConfigError, ServiceUnavailable

if TYPE_CHECKING:
    from closedloop.bootstrap import RunContext
    from closedloop.loop.overview import Overview

app = typer.Typer()

ParamsOption = Annotated[Path, typer.Option("--params", help="Names the data set.")]
AsOfOption = Annotated[str | None, typer.Option(help="The data's clock: a UTC date, or 'now' (production's default).")]
PARAMS = Path("params.yaml")


@app.command()
def exporter(params: ParamsOption = PARAMS, as_of: AsOfOption = None) -> None:
    """Serve the loop's figures to Prometheus, until stopped."""
    from prometheus_client import start_http_server

    from closedloop.bootstrap import build_overview, load_run
    from closedloop.loop.exporter import build_registry

    context = load_run(params)
    gather = build_overview(context)

    def read() -> Overview:
        now = dt.datetime.now(dt.UTC)
        return gather(now, _read_clock(as_of, context, now))

    settings, stopped = context.settings.exporter, threading.Event()
    _read_clock(as_of, context, dt.datetime.now(dt.UTC))
    try:
        server, _ = start_http_server(settings.port, settings.host, build_registry(read))
    except OSError as error:
        raise ServiceUnavailable(f"exporter.port {settings.port}: {error.strerror}") from error
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    typer.echo(f"metrics on http://{settings.host}:{server.server_port}/metrics", err=True)
    stopped.wait()


def _read_clock(text: str | None, context: RunContext, now: dt.datetime) -> dt.datetime:
    if text == "now" or (text is None and context.settings.profile == "production"):
        return now
    if text is None:
        return context.params.as_of_at
    try:
        return dt.datetime.combine(dt.date.fromisoformat(text), dt.time(), dt.UTC)
    except ValueError as error:
        raise ConfigError(f"--as-of {text!r}: a date as 2025-01-31, or 'now'") from error
