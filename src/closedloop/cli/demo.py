"""The command line of the demo: the champion at work for a day of the data's clock."""

from __future__ import annotations

import datetime as dt

import typer

from closedloop.cli.options import PARAMS, WORKFLOW, ParamsOption, tell
from closedloop.errors import ConfigError, count_noun
from closedloop.extras import require_modules

app = typer.Typer()


@app.command(rich_help_panel=WORKFLOW)
def demo(params: ParamsOption = PARAMS) -> None:
    """Serve the champion, send a day of requests by the data's clock, check it, end the service."""
    from rich.console import Console

    from closedloop.bootstrap import load_run
    from closedloop.cli.monitoring import check_once
    from closedloop.cli.status import look, show_status
    from closedloop.config.calls import name_call
    from closedloop.config.layout import Layout
    from closedloop.processes import exit_on_signals
    from closedloop.replay.demo import plan_day, send, serve_by
    from closedloop.waiting import build_bar

    require_modules("demo")
    context = load_run(params)
    if context.settings.profile == "production":
        raise ConfigError("demo: not with the production profile, whose store keeps real requests alone")
    view, _ = look(context, as_of=None, service=None)
    if view.row is None:
        raise ConfigError(f"demo: no version of {view.model_name} was released yet; first: {name_call('run')}")
    exit_on_signals()  # so that the service is ended too
    day = plan_day(context, view.as_of.date(), Layout())
    with build_bar(Console(stderr=True)) as progress:
        bar = progress.add_task("the service starts (about 10 s)", total=day.requests)
        with serve_by(context, day, view.row) as traffic:
            tell("demo", f"version {view.row.champion_version} answers on port {traffic.port}; its clock says {day.at}")
            progress.update(bar, description="requests")
            send(context, day, traffic, lambda sent: progress.update(bar, completed=sent))
    failed = f", {traffic.failed} refused, the first: {traffic.failures[0]}" if traffic.failed else ""
    answered = count_noun(traffic.answered, "request")
    tell("demo", f"{answered} of a day answered{failed}; now the monitor:")
    check_once(params, f"{day.at + dt.timedelta(days=1)}", report=True)
    show_status(load_run(params), as_of=None, service=None, as_json=False)
