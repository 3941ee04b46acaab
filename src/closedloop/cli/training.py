"""The command line of training: the whole workflow, each of its stages, and new features without training."""

from __future__ import annotations

import datetime as dt
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from closedloop.cli.options import (
    PARAMS,
    WORKFLOW,
    AsOfOption,
    ParamsOption,
    fold,
    locate_given,
    read_dataset,
    tell,
    with_json,
)
from closedloop.config.layout import HELP, Layout, list_paths
from closedloop.errors import ConfigError, GateFailed, count_noun

app = typer.Typer()


class Told(NamedTuple):
    """The sentence of a stage for people, and its report for programs."""

    text: str
    report: dict[str, Any]


EXPERIMENT = "DVC_EXP_NAME"  # what `dvc exp run` tells the commands of stages


@app.command(rich_help_panel=WORKFLOW)
@with_json
def run(
    dataset: Annotated[
        str | None, typer.Option(help="Name of a file in configs/datasets (default: the data set of params.yaml).")
    ] = None,
    source: Annotated[str | None, typer.Option(help="The data: a file, a folder or a pattern.")] = None,
    as_of: Annotated[str | None, typer.Option(help="UTC date: only events before it are used.")] = None,
    until: Annotated[str | None, typer.Option(help="The last stage to run, such as train (default: all).")] = None,
) -> Any:
    """Run the whole training graph with DVC; each other data set has its own workspace."""
    from closedloop.workflow import recall_given, run_workflow

    if dataset is None and (again := read_dataset()):
        dataset, source, as_of = recall_given(again, source, as_of)
    return run_workflow(dataset=dataset, source=source, as_of=as_of, until=until and until.replace("-", "_"))


@app.command(rich_help_panel=WORKFLOW)
@with_json
def describe(
    source: Annotated[str, typer.Argument(help="A file, a folder, a pattern, or a database's table: VARIABLE#TABLE.")],
    name: Annotated[str | None, typer.Option(help="Of the data set (default: as the file is called).")] = None,
    label: Annotated[str | None, typer.Option(help="The column that says who left (default: guessed).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a config that is there.")] = False,
) -> Any:
    """Look at strange data: say what is odd, and write a data set's config to go on from."""
    from closedloop.config.calls import name_call
    from closedloop.config.dataset import CONFIG_FOLDER, choose_name
    from closedloop.tabular.describe.config import describe_source, write_config

    name = choose_name(source) if name is None else name
    path = CONFIG_FOLDER / f"{name}.yaml"
    if not CONFIG_FOLDER.is_dir():
        raise ConfigError(f"{Path.cwd()}: there is no {CONFIG_FOLDER}; run this in the project's folder")
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already: give --force to replace it, or --name NAME for another")
    notes: list[str] = []
    try:
        text = describe_source(locate_given(source), name, notes, label=label)
    finally:
        for note in notes:
            typer.echo(f"- {fold(note, shutil.get_terminal_size().columns, 2) if sys.stdout.isatty() else note}")
    write_config(path, text)
    call = name_call(f"run --dataset {name}")
    typer.echo(f"\n{path} is written.\nRead it, change what is guessed wrong, then:\n  {call}")
    return {"name": name, "config": path, "notes": notes, "next_command": call}


def _stage(run: Callable[..., Told]) -> Callable[..., Told]:
    """Make a stage's command of a function of a run's context and layout, which returns what is to be said.

    Each path that the stage reads or writes is an option, called as the layout calls it.
    """
    paths = list_paths(run.__name__)
    name = run.__name__.replace("_", "-")

    def command(params: Path, **given: Any) -> Any:
        from closedloop.bootstrap import load_run

        layout = Layout(**{name: given.pop(name) for name in paths})
        context = load_run(params)
        try:
            told = run(context, layout, **given)
        except GateFailed as refused:
            _tell_refusal(context, name, str(refused))
            raise
        tell(name.replace("-", " "), told.text)
        return told.report

    keyword_only = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("params", keyword_only, default=PARAMS, annotation=ParamsOption)]
    for path, usual in paths.items():
        described = Annotated[Path, typer.Option(help=HELP[path])]
        parameters.append(inspect.Parameter(path, keyword_only, default=usual, annotation=described))
    others = list(inspect.signature(run, eval_str=True).parameters.values())[2:]
    parameters += [other.replace(kind=keyword_only) for other in others]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, help=run.__doc__, rich_help_panel=WORKFLOW)(with_json(command))
    return run


def _tell_refusal(context: Any, stage: str, message: str) -> None:
    from closedloop.bootstrap import build_webhook

    params, now = context.params, dt.datetime.now(dt.UTC)
    told = {"model_name": context.dataset.model_name, "stage": stage, "as_of": f"{params.as_of}", "message": message}
    build_webhook(context).tell("gate.failed", " ".join([*told.values(), params.digest_md5()]), told, now=now)


@contextmanager
def _show_days() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's standard error, for sources that are divided by day."""
    from closedloop.stages.ingest import tell_nothing

    if not sys.stderr.isatty():
        yield tell_nothing
        return
    from rich.console import Console

    from closedloop.waiting import build_bar

    with build_bar(Console(stderr=True)) as progress:
        bar = progress.add_task("days", visible=False)
        yield lambda done, days: progress.update(bar, completed=done, total=days, visible=True)


@_stage
def ingest(context: Any, layout: Layout) -> Told:
    """Read the data set's source into tables of one form (Parquet)."""
    from closedloop.stages.ingest import ingest as run

    with _show_days() as tell_progress:
        report = run(context.params, context.dataset, layout, tell_progress)
    read, customers = count_noun(report["rows_read"], "row"), count_noun(report["customers"], "customer")
    return Told(f"{read} read, {report['rows_kept']:,} kept, {customers}", report)


@_stage
def validate(context: Any, layout: Layout) -> Told:
    """Check the tables with Great Expectations: the data gate."""
    from closedloop.stages.validate import validate as run

    report = run(context.params, context.dataset, layout)
    passed, warnings = (
        report["expectations"] - report["failed_warning"],
        count_noun(report["failed_warning"], "warning"),
    )
    return Told(f"{passed} of {count_noun(report['expectations'], 'expectation')} hold, {warnings}", report)


@_stage
def features(context: Any, layout: Layout) -> Told:
    """Aggregate events by day and compute the features of every snapshot."""
    from closedloop.bootstrap import build_engine
    from closedloop.stages.features import compute_features

    with build_engine(context) as engine:
        report = compute_features(context.params, context.dataset, engine, layout)
    rows, snapshots = count_noun(report["rows"], "row"), count_noun(report["snapshots"], "snapshot")
    computed = f", {report['snapshots_written']} computed" if "snapshots_written" in report else ""
    return Told(f"{rows} in {snapshots}{computed}, {count_noun(report['features'], 'feature')}", report)


@_stage
def training_set(context: Any, layout: Layout) -> Told:
    """Join labels with features, split the rows, and bring the newest features online."""
    from closedloop.bootstrap import build_engine, build_features, read_actions
    from closedloop.core.actions.untreated import describe_untreated
    from closedloop.stages.training_set import build_training_set

    features, actions = build_features(context), read_actions(context)
    with build_engine(context) as engine:
        report = build_training_set(context.params, context.dataset, features, engine, layout, actions)
    parts = ", ".join(f"{name} {part['rows']:,} ({part['churn_rate']:.3f})" for name, part in report["parts"].items())
    serving = report["serving"]
    refused = f"not online: {serving.get('reason')}"
    online = f"online features of {serving['snapshot']}" if serving["materialized"] else refused
    text = "; ".join([f"rows (churn rate): {parts}", *describe_untreated(report.get("actions", {})), online])
    return Told(text, report)


@_stage
def train(context: Any, layout: Layout) -> Told:
    """Search, fit, calibrate and export a model; log the run to MLflow."""
    from closedloop.bootstrap import build_tracking
    from closedloop.config.featureset import list_features
    from closedloop.stages.train import train as run

    features, use_wandb = list_features(context.params, context.dataset), context.settings.tracking.wandb
    report = run(context.params, context.dataset, features, build_tracking(context), layout, use_wandb=use_wandb)
    return Told("validation ROC AUC {roc_auc:.3f}, log loss {log_loss:.4f}".format_map(report["validation"]), report)


@_stage
def evaluate(
    context: Any,
    layout: Layout,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Smallest accuracy, in place of the data set's limit.")
    ] = None,
) -> Told:
    """Judge the model by every gate, and compare it with the champion."""
    from closedloop.bootstrap import build_features, build_tracking
    from closedloop.stages.evaluate import evaluate as run

    dataset = context.dataset if threshold is None else context.dataset.with_accuracy_min(threshold)
    tools = build_tracking(context), build_features(context)
    settings = context.settings
    told = {"auto_promote": settings.release.auto_promote, "policy": settings.monitoring.policy}
    report = run(context.params, dataset, *tools, layout, **told)
    found = report["figures"]
    figures = f"test ROC AUC {found['roc_auc']:.3f}, accuracy {found['accuracy']:.3f}"
    return Told(f"{figures}; {count_noun(len(report['gates']), 'gate')} passed", report)


@_stage
def register(
    context: Any,
    layout: Layout,
    model_name: Annotated[
        str | None, typer.Option(help="Name of the registered model; it must be the data set's.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Staging or Production: sets the alias of that meaning.")] = None,
    trigger_id: Annotated[str | None, typer.Option(help="Id of the retraining, for a tag of the version.")] = None,
    check_id: Annotated[
        str | None, typer.Option(help="Id of the check that caused it, for a tag of the version.")
    ] = None,
) -> Told:
    """Register the model as a version in MLflow; a model is registered once."""
    from closedloop.bootstrap import build_releases
    from closedloop.config.calls import name_call
    from closedloop.stages.register import check_experiment
    from closedloop.stages.register import register as run

    if EXPERIMENT in os.environ:
        check_experiment(layout, model_name=model_name, stage=stage)
        text = f"an experiment of DVC: no version is registered; to register it: {name_call('run')}"
        return Told(text, {"version": None})
    report = run(
        build_releases(context),
        layout,
        now=dt.datetime.now(dt.UTC),
        auto_promote=context.settings.release.auto_promote,
        model_name=model_name,
        stage=stage,
        cause={name: value for name, value in (("trigger_id", trigger_id), ("check_id", check_id)) if value},
    )
    return Told(f"{report['model_name']} version {report['version']}, alias {report['alias']}", report)


@_stage
def package(context: Any, layout: Layout) -> Told:
    """Build the registered version's Bento, and tag the version with its digest."""
    from closedloop.bootstrap import build_tracking
    from closedloop.stages.package import package as run

    report = run(build_tracking(context), layout)
    if report["version"] is None:
        return Told("an experiment of DVC: no Bento is built", report)
    return Told(f"{report['bento']} of version {report['version']}", report)


@app.command(rich_help_panel=WORKFLOW)
@with_json
def refresh(
    as_of: AsOfOption,
    params: ParamsOption = PARAMS,
) -> Any:
    """Compute the features of a date and bring them online, without training."""
    from closedloop.bootstrap import build_engine, build_features, hold_working_files, load_run
    from closedloop.stages.refresh import refresh as run

    context = load_run(params, overrides={"as_of": as_of})
    work_dir = context.settings.locate("state/refresh") / context.dataset.model_name
    with hold_working_files(context), build_engine(context) as engine:
        report = run(context.params, context.dataset, build_features(context), engine, work_dir=work_dir)
    newer = f"nothing changed online, features of {report['snapshot']}: {report.get('reason')}"
    done = f"{count_noun(report.get('customers', 0), 'customer')}, features of {report['snapshot']} online"
    tell("refresh", done if report["materialized"] else newer)
    return report
