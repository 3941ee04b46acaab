"""The command line of retraining: one run, and the pipeline for a cluster."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated

import typer

from closedloop.cli_options import PARAMS, ParamsOption, read_now
from closedloop.errors import ClosedloopError, ConfigError, GateFailed, ServiceUnavailable

app = typer.Typer()


@app.command()
def retrain(
    params: ParamsOption = PARAMS,
    trigger_id: Annotated[
        str | None, typer.Option(help="The retraining's id; once it has ended, the same id does nothing.")
    ] = None,
    as_of: Annotated[str | None, typer.Option(help="UTC date: what happened before it is known.")] = None,
    data_start_date: Annotated[
        str | None, typer.Option(help="First snapshot; default: 90 days before the last.")
    ] = None,
    data_end_date: Annotated[str | None, typer.Option(help="Last snapshot; default: the newest closed one.")] = None,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "asked for by hand",
) -> None:
    """Train again on recent data; a model that passes its gates becomes the challenger, never the champion.

    Its version is all that goes to standard output.
    """
    from closedloop.adapters.checks import Retraining
    from closedloop.adapters.git import read_commit
    from closedloop.bootstrap import build_checks, build_retraining, load_newest
    from closedloop.loop.retrain import name_trigger, override_dates

    context = load_newest(params, override_dates(as_of, data_start_date, data_end_date))
    values, checks = context.params, build_checks(context)
    checks.upgrade()
    trigger_id = trigger_id or name_trigger(values, read_commit()[0])
    days = (values.data.start_date, values.data.end_date)
    who = (context.dataset.model_name, getpass.getuser(), reason)
    checks.request_retraining(Retraining(trigger_id, *who, values.as_of_at, read_now(), None, *days))
    found, ran = build_retraining(context, checks)(trigger_id)
    text = f"{'' if ran else 'nothing to do: '}retraining {trigger_id} is {found.state}"
    if not ran and found.state in ("requested", "failed"):
        raise ServiceUnavailable(f"retraining {trigger_id}: another one is running here; try again later")
    if found.state in ("refused", "failed"):
        raise (GateFailed if found.state == "refused" else ClosedloopError)(f"{text}: {found.detail}")
    typer.echo(f"{text}{f', version {found.model_version}' if found.model_version else ''}", err=True)
    if found.model_version:
        typer.echo(found.model_version)


@app.command()
def pipeline(
    params: ParamsOption = PARAMS,
    output: Annotated[Path | None, typer.Option(help="Write the YAML that a cluster takes.")] = None,
    publish: Annotated[bool, typer.Option("--publish", help="Upload it, unless this version is there.")] = False,
    schedule: Annotated[
        str | None, typer.Option(help="Let the cluster retrain by itself: six cron fields, the first one seconds.")
    ] = None,
) -> None:
    """The retraining pipeline for a cluster's Kubeflow Pipelines."""
    from closedloop.adapters.kfp import ClusterRunner, compile_pipeline
    from closedloop.bootstrap import build_runner, load_run
    from closedloop.files import write_text

    context = load_run(params)
    if output is not None:
        place = context.settings.locate("pipelines/retrain.py")
        write_text(output, compile_pipeline(place, context.settings.retraining))
    if not publish and not schedule:
        return
    runner, name = build_runner(context), context.dataset.model_name
    if not isinstance(runner, ClusterRunner):
        raise ConfigError("retraining.runner is 'local': only a cluster keeps pipelines")
    typer.echo(f"on {context.settings.retraining.endpoint}: {runner.publish()}", err=True)
    if schedule:
        typer.echo(f"recurring run: {runner.schedule(name, schedule, {'model_name': name})}", err=True)
