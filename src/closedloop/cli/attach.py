"""The command line of the monitor alone, for a model that somebody else serves."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Annotated

import typer

from closedloop.cli.monitoring import check_fail_on, judge_end
from closedloop.cli.options import MONITORING, AsOfOption, JsonOption, locate_path, print_json, read_date, read_now

app = typer.Typer()


@app.command(rich_help_panel=MONITORING)
def attach(
    config: Annotated[
        Path,
        typer.Argument(help="The YAML that says where reference and window are: docs/attach.md.", callback=locate_path),
    ],
    as_of: AsOfOption,
    output: Annotated[
        Path | None, typer.Option(help="Folder of report, checks and figures.", callback=locate_path)
    ] = None,
    fail_on: Annotated[
        str | None, typer.Option(help="End with 2 at this verdict or a worse one, with 3 if it cannot tell.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Watch a model that somebody else serves: give a verdict, a report and figures."""
    from closedloop.config.attached import load_attached
    from closedloop.loop.monitor.attach import check_attached

    check_fail_on(fail_on)
    model = load_attached(config)
    folder = output or Path("attached") / model.name
    midnight = dt.datetime.combine(read_date("--as-of", as_of), dt.time(), dt.UTC)
    check = check_attached(model, folder, as_of=midnight, now=read_now())
    report = str(folder / "report.html")
    if as_json:
        print_json({"check": check, "report": report})
    else:
        typer.echo(f"{check.verdict}: {'; '.join(check.evidence['reasons'])}")
        typer.echo(f"report: {report}")
    judge_end(check.verdict, fail_on)
