"""The command line: every stage, and the commands around them."""

from __future__ import annotations

import datetime as dt
import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from closedloop.cli_experiment import app as experiment_app
from closedloop.cli_monitor import app as monitor_app
from closedloop.cli_observe import app as observe_app
from closedloop.cli_options import PARAMS, AsOfOption, ParamsOption
from closedloop.cli_release import app as release_app
from closedloop.cli_replay import app as replay_app
from closedloop.cli_retrain import app as retrain_app
from closedloop.cli_serving import app as serving_app
from closedloop.environment import set_environment
from closedloop.errors import ClosedloopError, ConfigError

app = typer.Typer(
    help="closedloop: train, gate and register a churn model; every stage of dvc.yaml is a command.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for part in (serving_app, experiment_app, monitor_app, observe_app, replay_app, retrain_app, release_app):
    app.add_typer(part)

# By the keyword of the stages' functions: the option, its default, and what it is.
PLACES = {
    "raw_dir": ("raw", "data/raw", "Canonical tables: customers, events, dropped rows."),
    "docs_dir": ("docs", "reports/data_docs", "Data Docs, to open in a browser."),
    "page_path": ("page", "reports/data_quality.html", "Findings and dropped rows on one page."),
    "data_quality_path": ("data_quality", "metrics/data_quality.json", "The data gate's result, for the run."),
    "rollup_dir": ("rollup", "data/rollup", "Daily partial aggregates per customer."),
    "features_dir": ("features", "data/features", "Feature rows, one file a snapshot."),
    "training_dir": ("training", "data/training", "Train, validation and test rows."),
    "model_dir": ("model", "models/candidate", "The contract folder: model.onnx, contract.json, reference.parquet."),
    "pipeline_dir": ("pipeline", "models/pipeline", "The fitted scikit-learn pipeline (skops)."),
    "figures_dir": ("figures", "", "Pictures."),
    "plots_dir": ("plots", "", "Plot data for DVC."),
    "run_path": ("run_file", "models/run.json", "The MLflow run and the model that it logged."),
    "card_path": ("card", "reports/model_card.html", "The model card."),
    "gates_path": ("gates", "metrics/gates.json", "Every gate's figure and limit, and the verdict."),
    "registration_path": ("registration", "metrics/registration.json", "Which version it became."),
    "bento_dir": ("bento", "models/bento", "The Bento's folder."),
    "metrics_path": ("metrics", "", "Figures of this stage."),
}
Paths = dict[str, Path]


def _stage(*places: str, **own_places: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Make a stage's command of a function of a run's context and paths, which returns what is to be said.

    Each of ``PLACES`` that is named is an option; some have a default of their own here.
    """

    def decorate(run: Callable[..., str]) -> Callable[..., str]:
        name = run.__name__.replace("_", "-")
        defaults = {place: PLACES[place][1] for place in places} | own_places

        def command(params: Path, **given: Any) -> None:
            from closedloop.bootstrap import load_run

            paths = {place: given.pop(PLACES[place][0]) for place in defaults}
            _say(name.replace("-", " "), run(load_run(params), paths, **given))

        keyword_only = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter("params", keyword_only, default=PARAMS, annotation=ParamsOption)]
        for place, default in defaults.items():
            option, _, text = PLACES[place]
            described = Annotated[Path, typer.Option(help=text)]
            parameters.append(inspect.Parameter(option, keyword_only, default=Path(default), annotation=described))
        others = list(inspect.signature(run, eval_str=True).parameters.values())[2:]
        parameters += [other.replace(kind=keyword_only) for other in others]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, help=run.__doc__)(command)
        return run

    return decorate


@_stage("raw_dir", metrics_path="metrics/ingest.json")
def ingest(context: Any, paths: Paths) -> str:
    """Read the data set's source into canonical Parquet tables."""
    from closedloop.stages.ingest import ingest as run

    report = run(context.params, context.dataset, **paths)
    return f"{report['rows_read']:,} rows read, {report['rows_kept']:,} kept, {report['customers']:,} customers"


@_stage("raw_dir", "docs_dir", "page_path", metrics_path="metrics/data_quality.json")
def validate(context: Any, paths: Paths) -> str:
    """The data gate: Great Expectations on the canonical tables."""
    from closedloop.stages.validate import validate as run

    report = run(context.params, context.dataset, **paths)
    passed = report["expectations"] - report["failed_warning"]
    return f"{passed} of {report['expectations']} expectations hold, {report['failed_warning']} warnings"


@_stage("raw_dir", "rollup_dir", "features_dir")
def features(context: Any, paths: Paths) -> str:
    """Roll events up by day and compute the features of every snapshot."""
    from closedloop.bootstrap import build_engine
    from closedloop.stages.feature_rows import compute_features

    with build_engine(context) as engine:
        report = compute_features(context.params, context.dataset, engine, snapshots=None, **paths)
    return f"{report['rows']:,} rows in {report['snapshots']} snapshots, {report['features']} features"


@_stage("raw_dir", "rollup_dir", "features_dir", "training_dir", metrics_path="metrics/training_set.json")
def training_set(context: Any, paths: Paths) -> str:
    """Labels, the point-in-time join and the split; the newest features go to the online store."""
    from closedloop.bootstrap import build_engine, build_features
    from closedloop.stages.training_set import build_training_set

    with build_engine(context) as engine:
        report = build_training_set(context.params, context.dataset, build_features(context), engine, **paths)
    parts = ", ".join(f"{name} {part['rows']:,} ({part['churn_rate']:.3f})" for name, part in report["parts"].items())
    return f"rows (churn rate): {parts}; online features of {report['serving']['snapshot']}"


@_stage(
    "training_dir",
    "data_quality_path",
    "model_dir",
    "pipeline_dir",
    "run_path",
    figures_dir="reports/train",
    plots_dir="metrics/plots/train",
    metrics_path="metrics/train_metrics.json",
)
def train(context: Any, paths: Paths) -> str:
    """Search, fit, calibrate and export a model; log the run and write its contract."""
    from closedloop.bootstrap import build_tracking
    from closedloop.featureset import list_features
    from closedloop.stages.train import train as run

    features, use_wandb = list_features(context.params, context.dataset), context.settings.tracking.wandb
    report = run(context.params, context.dataset, features, build_tracking(context), use_wandb=use_wandb, **paths)
    return "validation ROC AUC {roc_auc:.3f}, log loss {log_loss:.4f}".format_map(report["validation"])


@_stage(
    "raw_dir",
    "training_dir",
    "model_dir",
    "pipeline_dir",
    "card_path",
    "gates_path",
    figures_dir="reports/test",
    plots_dir="metrics/plots/test",
    metrics_path="metrics/eval_metrics.json",
)
def evaluate(
    context: Any,
    paths: Paths,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least accuracy, in place of the data set's own limit.")
    ] = None,
) -> str:
    """Judge the model on test rows by every gate, and against the champion."""
    from closedloop.bootstrap import build_features, build_tracking, with_accuracy_min
    from closedloop.stages.evaluate import evaluate as run

    dataset = context.dataset if threshold is None else with_accuracy_min(context.dataset, threshold)
    report = run(context.params, dataset, build_tracking(context), build_features(context), **paths)
    found = report["figures"]
    figures = f"test ROC AUC {found['roc_auc']:.3f}, accuracy {found['accuracy']:.3f}"
    return f"{figures}; {len(report['gates'])} gates passed"


@_stage("model_dir", "gates_path", "run_path", "registration_path")
def register(
    context: Any,
    paths: Paths,
    model_name: Annotated[str | None, typer.Option(help="Must be the data set's registered model.")] = None,
    stage: Annotated[str | None, typer.Option(help="Staging or Production: the alias of that meaning.")] = None,
    trigger_id: Annotated[str | None, typer.Option(help="The retraining that this is: a tag of the version.")] = None,
    check_id: Annotated[str | None, typer.Option(help="The check that caused it: a tag of the version.")] = None,
) -> str:
    """Register the evaluated model as a version; running it again registers nothing twice."""
    from closedloop.bootstrap import build_releases
    from closedloop.stages.register import register as run

    report = run(
        build_releases(context),
        **paths,
        now=dt.datetime.now(dt.UTC),
        auto_promote=context.settings.release.auto_promote,
        model_name=model_name,
        stage=stage,
        cause={name: value for name, value in (("trigger_id", trigger_id), ("check_id", check_id)) if value},
    )
    return f"{report['model_name']} version {report['version']}, alias {report['alias']}"


@_stage("registration_path", "bento_dir", metrics_path="metrics/package.json")
def package(context: Any, paths: Paths) -> str:
    """Build the Bento of the registered version; its digest becomes a tag of that version."""
    from closedloop.bootstrap import build_tracking
    from closedloop.stages.package import package as run

    report = run(build_tracking(context), **paths)
    return f"{report['bento']} of version {report['version']}"


@app.command()
def refresh(
    as_of: AsOfOption,
    params: ParamsOption = PARAMS,
) -> None:
    """Ingest, validate and compute features as of a date and bring them online, without training."""
    from closedloop.bootstrap import build_engine, build_features, hold_working_files, load_run
    from closedloop.stages.refresh import refresh as run

    context = load_run(params, overrides={"as_of": as_of})
    work_dir = context.settings.locate("state/refresh") / context.dataset.model_name
    with hold_working_files(context), build_engine(context) as engine:
        report = run(context.params, context.dataset, build_features(context), engine, work_dir=work_dir)
    newer = f"nothing changed online: the store holds newer features than those of {report['snapshot']}"
    done = f"{report.get('customers', 0):,} customers, features of {report['snapshot']} online"
    _say("refresh", done if report["materialized"] else newer)


@app.command()
def run(
    dataset: Annotated[
        str | None, typer.Option(help="A file in configs/datasets; default: that of params.yaml.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="File, folder or glob of the data.")] = None,
    as_of: Annotated[str | None, typer.Option(help="UTC date: what happened before it is known.")] = None,
) -> None:
    """Run the whole training graph with DVC and sum up; other data sets get a workspace of their own."""
    from closedloop.workflow import run_workflow

    run_workflow(dataset=dataset, source=source, as_of=as_of)


@app.command("plots-template")
def plots_template() -> None:
    """Write the page that `dvc plots show` fills with Vega inside, so that plots open without a network."""
    from closedloop.adapters.dvc import set_plot_template
    from closedloop.adapters.plots import TEMPLATE_FILE, write_template

    if not TEMPLATE_FILE.parent.is_dir():
        raise ConfigError(f"{Path.cwd()}: there is no .dvc folder; run this in the project's folder")
    write_template(TEMPLATE_FILE)
    set_plot_template(Path(), TEMPLATE_FILE)


def list_defaults(command: str) -> dict[str, Any]:
    """What a command's options are if nobody says otherwise."""
    group: Any = typer.main.get_command(app)
    return {option.name: option.default for option in group.commands[command].params}


def _say(stage: str, text: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False).print(f"[bold]{stage:>12}[/bold]  {text}")


def configure_logging() -> None:
    """Our own steps from INFO on, so that people see where a long stage is; other libraries' from WARNING on."""
    logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s")
    steps = logging.StreamHandler(sys.stderr)
    steps.setFormatter(logging.Formatter(f"{'':>12}  %(message)s"))
    ours = logging.getLogger("closedloop")
    ours.handlers, ours.propagate = [steps], False
    ours.setLevel(os.environ.get("CLOSEDLOOP_LOG_LEVEL", "INFO"))


def main() -> None:
    """Run the command line; our own errors become one message and their exit status."""
    set_environment()
    configure_logging()
    try:
        app()
    except SystemExit as ended:
        # a wrong command line ends with 2 in most programs; here 2 is a gate that said no
        sys.exit(1 if ended.code == 2 else ended.code)
    except ClosedloopError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
