"""The command line of tools around the workflow."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from closedloop.cli.options import PARAMS, TOOLS, JsonOption, ParamsOption, locate_path, print_json
from closedloop.errors import ConfigError

app = typer.Typer()


@app.command(rich_help_panel=TOOLS)
def doctor(params: ParamsOption = PARAMS, as_json: JsonOption = False) -> None:
    """Ask every service of the profile whether it answers; status 1 if one does not."""
    from closedloop.bootstrap import build_probes, load_run
    from closedloop.loop.status.doctor import examine

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # who asks wants to know now
    broken, told = 0, []
    for found in examine(build_probes(load_run(params))):
        broken += bool(found.remedy)
        told.append({"name": found.name, "well": not found.remedy, "text": found.text, "remedy": found.remedy})
        if as_json:
            continue
        typer.echo(f"{'broken' if found.remedy else 'well':>6}  {found.name}: {found.text}")
        if found.remedy:
            typer.echo(f"        do: {found.remedy}")
    if as_json:
        print_json(told)
    if broken:
        raise SystemExit(1)


@app.command(rich_help_panel=TOOLS)
def ui(
    params: ParamsOption = PARAMS,
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port of 127.0.0.1.")] = 5000,
) -> None:
    """Start MLflow's UI, and say where in it the data set's experiment is."""
    from closedloop.bootstrap import build_tracking, load_run
    from closedloop.processes import end_process, exit_on_signals, start_process

    tracking = build_tracking(load_run(params))
    address, command = tracking.list_ui_command(port)
    typer.echo(f"Open {address}{tracking.find_experiment_page() or ' (it holds no run yet)'}")
    if command is not None:
        # the parts of MLflow that schedule jobs and ask its makers for news
        os.environ |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        exit_on_signals()
        server = start_process(command)  # as a child, which ends even when this process is killed
        try:
            status = server.wait()
        finally:
            end_process(server)
        raise SystemExit(status)


@app.command(rich_help_panel=TOOLS)
def init(folder: Annotated[Path, typer.Argument(help="A new folder.", callback=locate_path)]) -> None:
    """Lay a project out: its graph, parameters, configs, feature repository and pipeline."""
    from closedloop.config.project import init_project

    files = init_project(folder)
    place = shlex.quote(str(folder))  # so that it can be copied
    typer.echo(f"{folder}: project files written: {len(files)}.\nNext: cd {place}, git init, closedloop describe FILE")


@app.command("plots-template", rich_help_panel=TOOLS)
def plots_template() -> None:
    """Write the page template with which `dvc plots show` works without a network."""
    from closedloop.adapters.dvc import set_plot_template
    from closedloop.adapters.vl_convert import TEMPLATE_FILE, write_template

    if not TEMPLATE_FILE.parent.is_dir():
        raise ConfigError(f"{Path.cwd()}: there is no .dvc folder; run this in the project's folder")
    write_template(TEMPLATE_FILE)
    set_plot_template(Path(), TEMPLATE_FILE)


@app.command(rich_help_panel=TOOLS)
def pipeline(
    params: ParamsOption = PARAMS,
    output: Annotated[Path | None, typer.Option(help="Write the pipeline as YAML.", callback=locate_path)] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Upload the pipeline, unless this version was uploaded.")
    ] = False,
    schedule: Annotated[
        str | None, typer.Option(help="Schedule it on the cluster: six cron fields, of which the first is seconds.")
    ] = None,
) -> None:
    """Write, publish or schedule the retraining pipeline for Kubeflow Pipelines."""
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
