"""The command line: every stage, and the commands around them."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from closedloop.cli_experiment import app as experiment_app
from closedloop.cli_monitor import app as monitor_app
from closedloop.cli_observe import app as observe_app
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
app.add_typer(serving_app)
app.add_typer(experiment_app)
app.add_typer(monitor_app)
app.add_typer(observe_app)
app.add_typer(replay_app)
app.add_typer(retrain_app)
app.add_typer(release_app)

ParamsOption = Annotated[Path, typer.Option("--params", help="Values that change the model.")]
RawOption = Annotated[Path, typer.Option(help="Canonical tables: customers, events, dropped rows.")]
RollupOption = Annotated[Path, typer.Option(help="Daily partial aggregates per customer.")]
FeaturesOption = Annotated[Path, typer.Option(help="Feature rows, one file a snapshot.")]
TrainingOption = Annotated[Path, typer.Option(help="Train, validation and test rows.")]
ModelOption = Annotated[Path, typer.Option(help="The contract folder: model.onnx, contract.json, reference.parquet.")]
PipelineOption = Annotated[Path, typer.Option(help="The fitted scikit-learn pipeline (skops).")]
FiguresOption = Annotated[Path, typer.Option(help="Pictures.")]
PlotsOption = Annotated[Path, typer.Option(help="Plot data for DVC.")]
MetricsOption = Annotated[Path, typer.Option(help="Figures of this stage.")]
RunOption = Annotated[Path, typer.Option(help="The MLflow run and the model that it logged.")]
RegistrationOption = Annotated[Path, typer.Option(help="Which version it became.")]
GatesOption = Annotated[Path, typer.Option(help="Every gate's figure and limit, and the verdict.")]

PARAMS = Path("params.yaml")
RAW, ROLLUP, FEATURES, TRAINING = Path("data/raw"), Path("data/rollup"), Path("data/features"), Path("data/training")
MODEL, PIPELINE = Path("models/candidate"), Path("models/pipeline")
METRICS, REPORTS = Path("metrics"), Path("reports")
RUN = Path("models/run.json")
GATES = METRICS / "gates.json"


@app.command()
def ingest(
    params: ParamsOption = PARAMS, raw: RawOption = RAW, metrics: MetricsOption = METRICS / "ingest.json"
) -> None:
    """Read the data set's source into canonical Parquet tables."""
    from closedloop.bootstrap import load_run
    from closedloop.stages.ingest import ingest as run

    context = load_run(params)
    report = run(context.params, context.dataset, raw_dir=raw, metrics_path=metrics)
    kept = f"{report['rows_read']:,} rows read, {report['rows_kept']:,} kept, {report['customers']:,} customers"
    _say("ingest", kept)


@app.command()
def validate(
    params: ParamsOption = PARAMS,
    raw: RawOption = RAW,
    docs: Annotated[Path, typer.Option(help="Data Docs, to open in a browser.")] = REPORTS / "data_docs",
    page: Annotated[Path, typer.Option(help="Findings and dropped rows on one page.")] = REPORTS / "data_quality.html",
    metrics: MetricsOption = METRICS / "data_quality.json",
) -> None:
    """The data gate: Great Expectations on the canonical tables."""
    from closedloop.bootstrap import load_run
    from closedloop.stages.validate import validate as run

    context = load_run(params)
    report = run(context.params, context.dataset, raw_dir=raw, docs_dir=docs, page_path=page, metrics_path=metrics)
    passed = report["expectations"] - report["failed_warning"]
    _say("validate", f"{passed} of {report['expectations']} expectations hold, {report['failed_warning']} warnings")


@app.command()
def features(
    params: ParamsOption = PARAMS,
    raw: RawOption = RAW,
    rollup: RollupOption = ROLLUP,
    features: FeaturesOption = FEATURES,
) -> None:
    """Roll events up by day and compute the features of every snapshot."""
    from closedloop.bootstrap import build_engine, load_run
    from closedloop.stages.feature_rows import compute_features

    context = load_run(params)
    with build_engine(context) as engine:
        report = compute_features(
            context.params, context.dataset, engine, raw_dir=raw, rollup_dir=rollup, features_dir=features
        )
    _say("features", f"{report['rows']:,} rows in {report['snapshots']} snapshots, {report['features']} features")


@app.command("training-set")
def training_set(
    params: ParamsOption = PARAMS,
    raw: RawOption = RAW,
    rollup: RollupOption = ROLLUP,
    features: FeaturesOption = FEATURES,
    training: TrainingOption = TRAINING,
    metrics: MetricsOption = METRICS / "training_set.json",
) -> None:
    """Labels, the point-in-time join and the split; the newest features go to the online store."""
    from closedloop.bootstrap import build_engine, build_features, load_run
    from closedloop.stages.training_set import build_training_set

    context = load_run(params)
    with build_engine(context) as engine:
        report = build_training_set(
            context.params,
            context.dataset,
            build_features(context),
            engine,
            raw_dir=raw,
            rollup_dir=rollup,
            features_dir=features,
            training_dir=training,
            metrics_path=metrics,
        )
    parts = ", ".join(f"{name} {part['rows']:,} ({part['churn_rate']:.3f})" for name, part in report["parts"].items())
    _say("training set", f"rows (churn rate): {parts}; online features of {report['serving']['snapshot']}")


@app.command()
def train(
    params: ParamsOption = PARAMS,
    training: TrainingOption = TRAINING,
    data_quality: Annotated[Path, typer.Option(help="The data gate's result, for the run.")] = METRICS
    / "data_quality.json",
    model: ModelOption = MODEL,
    pipeline: PipelineOption = PIPELINE,
    figures: FiguresOption = REPORTS / "train",
    plots: PlotsOption = METRICS / "plots/train",
    run_file: RunOption = RUN,
    metrics: MetricsOption = METRICS / "train_metrics.json",
) -> None:
    """Search, fit, calibrate and export a model; log the run and write its contract."""
    from closedloop.bootstrap import build_tracking, load_run
    from closedloop.featureset import list_features
    from closedloop.stages.train import train as run

    context = load_run(params)
    report = run(
        context.params,
        context.dataset,
        list_features(context.params, context.dataset),
        build_tracking(context),
        training_dir=training,
        data_quality_path=data_quality,
        model_dir=model,
        pipeline_dir=pipeline,
        figures_dir=figures,
        plots_dir=plots,
        run_path=run_file,
        metrics_path=metrics,
        use_wandb=context.settings.tracking.wandb,
    )
    figures_ = report["validation"]
    _say("train", f"validation ROC AUC {figures_['roc_auc']:.3f}, log loss {figures_['log_loss']:.4f}")


@app.command()
def evaluate(
    params: ParamsOption = PARAMS,
    raw: RawOption = RAW,
    training: TrainingOption = TRAINING,
    model: ModelOption = MODEL,
    pipeline: PipelineOption = PIPELINE,
    figures: FiguresOption = REPORTS / "test",
    plots: PlotsOption = METRICS / "plots/test",
    card: Annotated[Path, typer.Option(help="The model card.")] = REPORTS / "model_card.html",
    gates: GatesOption = GATES,
    metrics: MetricsOption = METRICS / "eval_metrics.json",
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least accuracy, in place of the data set's own limit.")
    ] = None,
) -> None:
    """Judge the model on test rows by every gate, and against the champion."""
    from closedloop.bootstrap import build_features, build_tracking, load_run, with_accuracy_min
    from closedloop.stages.evaluate import evaluate as run

    context = load_run(params)
    report = run(
        context.params,
        context.dataset if threshold is None else with_accuracy_min(context.dataset, threshold),
        build_tracking(context),
        build_features(context),
        raw_dir=raw,
        training_dir=training,
        model_dir=model,
        pipeline_dir=pipeline,
        figures_dir=figures,
        plots_dir=plots,
        card_path=card,
        gates_path=gates,
        metrics_path=metrics,
    )
    found = report["figures"]
    _say(
        "evaluate",
        f"test ROC AUC {found['roc_auc']:.3f}, accuracy {found['accuracy']:.3f}; {len(report['gates'])} gates passed",
    )


@app.command()
def register(
    params: ParamsOption = PARAMS,
    model: ModelOption = MODEL,
    gates: GatesOption = GATES,
    run_file: RunOption = RUN,
    registration: RegistrationOption = METRICS / "registration.json",
    model_name: Annotated[str | None, typer.Option(help="Must be the data set's registered model.")] = None,
    stage: Annotated[str | None, typer.Option(help="Staging or Production: the alias of that meaning.")] = None,
    trigger_id: Annotated[str | None, typer.Option(help="The retraining that this is: a tag of the version.")] = None,
    check_id: Annotated[str | None, typer.Option(help="The check that caused it: a tag of the version.")] = None,
) -> None:
    """Register the evaluated model as a version; running it again registers nothing twice."""
    import datetime as dt

    from closedloop.bootstrap import build_releases, build_tracking, load_run
    from closedloop.stages.register import register as run

    context = load_run(params)
    report = run(
        build_tracking(context),
        build_releases(context),
        now=dt.datetime.now(dt.UTC),
        model_dir=model,
        gates_path=gates,
        run_path=run_file,
        registration_path=registration,
        auto_promote=context.settings.release.auto_promote,
        model_name=model_name,
        stage=stage,
        cause={name: value for name, value in (("trigger_id", trigger_id), ("check_id", check_id)) if value},
    )
    _say("register", f"{report['model_name']} version {report['version']}, alias {report['alias']}")


@app.command()
def package(
    params: ParamsOption = PARAMS,
    registration: RegistrationOption = METRICS / "registration.json",
    bento: Annotated[Path, typer.Option(help="The Bento's folder.")] = Path("models/bento"),
    metrics: Annotated[Path, typer.Option(help="The Bento's name and digests.")] = METRICS / "package.json",
) -> None:
    """Build the Bento of the registered version; its digest becomes a tag of that version."""
    from closedloop.bootstrap import build_tracking, load_run
    from closedloop.stages.package import package as run

    report = run(
        build_tracking(load_run(params)), registration_path=registration, bento_dir=bento, metrics_path=metrics
    )
    _say("package", f"{report['bento']} of version {report['version']}")


@app.command()
def refresh(
    as_of: Annotated[str, typer.Option(help="UTC date: what happened before it is known.")],
    params: ParamsOption = PARAMS,
) -> None:
    """Ingest, validate and compute features as of a date and bring them online, without training."""
    from closedloop.bootstrap import build_engine, build_features, load_run
    from closedloop.stages.refresh import refresh as run

    context = load_run(params, overrides={"as_of": as_of})
    work_dir = context.settings.locate("state/refresh") / context.dataset.model_name
    with build_engine(context) as engine:
        report = run(context.params, context.dataset, build_features(context), engine, work_dir=work_dir)
    if not report["materialized"]:
        _say("refresh", f"nothing changed online: the store holds newer features than those of {report['snapshot']}")
        return
    _say("refresh", f"{report['customers']:,} customers, features of {report['snapshot']} online")


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
    level = os.environ.get("CLOSEDLOOP_LOG_LEVEL", "INFO")
    logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s")
    steps = logging.StreamHandler(sys.stderr)
    steps.setFormatter(logging.Formatter(f"{'':>12}  %(message)s"))
    ours = logging.getLogger("closedloop")
    ours.handlers, ours.propagate = [steps], False
    ours.setLevel(level)


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
