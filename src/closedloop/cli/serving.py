"""The command line of predictions: the HTTP service and its agent, the stream, batches, and edge devices."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from closedloop.cli.options import (
    PARAMS,
    REASONS_MAX,
    SERVING,
    ClockOption,
    Commands,
    ModelOption,
    ParamsOption,
    check_model,
    locate_given,
    locate_path,
    read_clock,
    read_date,
    read_now,
    with_json,
)
from closedloop.errors import ConfigError, ServiceUnavailable, count_noun

if TYPE_CHECKING:
    from closedloop.bootstrap import RunContext

app = typer.Typer()
edge_app = typer.Typer(
    cls=Commands, help="Export a model to a device, and import the predictions made there.", no_args_is_help=True
)
app.add_typer(edge_app, name="edge", rich_help_panel=SERVING)

PortOption = Annotated[int | None, typer.Option(help="In place of the settings' port.", min=0, max=65535)]


@app.command(rich_help_panel=SERVING)
def serve(
    params: ParamsOption = PARAMS,
    as_of: ClockOption = None,
    model: Annotated[
        Path | None,
        typer.Option(help="A model folder to serve until the operations store names one.", callback=locate_path),
    ] = None,
    bento: Annotated[
        Path | None, typer.Option(help="The same, from a Bento of 'closedloop package'.", callback=locate_path)
    ] = None,
    clock: Annotated[
        Path | None, typer.Option(help="A file that holds the service's clock, for a replay.", callback=locate_path)
    ] = None,
    port: PortOption = None,
    metrics_port: PortOption = None,
) -> None:
    """Serve the deployed model over HTTP until stopped."""
    from closedloop.bootstrap import load_run, write_serving_config
    from closedloop.serving.process.server import serve as serve_until_stopped

    for name, number in (("PORT", port), ("METRICS_PORT", metrics_port)):
        if number is not None:  # the agent reads the settings by itself
            os.environ[f"CLOSEDLOOP_SERVING__{name}"] = str(number)
    context = load_run(params)
    if model is not None and bento is not None:
        raise ConfigError("--model and --bento: give one of them")
    bundled = check_model(model)
    if bento is not None:
        from closedloop.adapters.bentoml import open_bento

        bundled = open_bento(bento)
    date = None if clock is not None else read_clock(as_of, context)
    try:
        config = write_serving_config(context, as_of=date, bundled_dir=bundled, clock=clock)
    except OSError as error:
        raise ServiceUnavailable(f"serving.state {context.settings.serving.state}: {error.strerror}") from error
    serve_until_stopped(config)  # in this process: another would import for a second time what is here already


@app.command(rich_help_panel=SERVING)
def stream(
    params: ParamsOption = PARAMS,
    as_of: ClockOption = None,
    model: Annotated[
        Path | None,
        typer.Option(help="A model folder to use until the operations store names one.", callback=locate_path),
    ] = None,
    agent: Annotated[bool, typer.Option(help="Run an agent too; not beside `serve` on the same state folder.")] = True,
) -> None:
    """Score the events of a Kafka topic, each once, until stopped."""
    from closedloop.bootstrap import load_run, write_stream_config

    context = load_run(params)
    config = write_stream_config(context, as_of=read_clock(as_of, context), bundled_dir=check_model(model), agent=agent)
    os.execv(sys.executable, [sys.executable, "-m", "closedloop.scoring.stream", str(config)])  # noqa: S606


@app.command(rich_help_panel=SERVING)
@with_json
def score(
    target: Annotated[str, typer.Option("--output", help="Parquet or CSV file, here or s3://, or a table.")],
    source: Annotated[
        str | None,
        typer.Option("--input", help="Parquet or CSV file, or a table: ADDRESS#TABLE; default: all active at --as-of."),
    ] = None,
    params: ParamsOption = PARAMS,
    model: ModelOption = None,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run.")] = False,
    log: Annotated[bool, typer.Option(help="Log every prediction in the operations store.")] = True,
    as_of: Annotated[
        str | None, typer.Option(help="UTC date that the predictions are logged under, instead of now.")
    ] = None,
    reasons: Annotated[
        int, typer.Option(min=0, max=REASONS_MAX, help="Give each score this many reasons, the strongest first.")
    ] = 0,
) -> Any:
    """Score a file, a database table, or all who are active at a date, with the released model."""
    from closedloop.bootstrap import build_batch_options, load_run, locate_serving_state, open_slot, spread_batch
    from closedloop.scoring.batch import score_batch

    if source is None and as_of is None:
        raise ConfigError("--input: name a file or a table; without one --as-of DATE scores all who are active then")
    day = None if as_of is None else read_date("--as-of", as_of)
    context = load_run(params, overrides={"as_of": as_of} if source is None else None)
    if log:
        context.database.upgrade()
    clock = read_now if day is None else partial(dt.datetime.combine, day, dt.time(), dt.UTC)
    chosen: dict[str, Any] = {"resume": resume, "show_progress": True, "clock": clock, "reasons": reasons}
    columns = context.dataset.columns
    own = {"id_column": columns.entity_id, "source": context.dataset.source, "rename": columns.rename}
    chosen |= {"as_of": day} if source is None else own
    options, state_dir = build_batch_options(context, log=log, **chosen), locate_serving_state(context)
    slots, cluster = open_slot(context, check_model(model)), spread_batch(context, options)
    with slots as slot, _find_rows(context, source) as rows, cluster as spread:
        found = score_batch(rows, locate_given(target), slot, spread, state_dir=state_dir)
    rejected = f", {found.rejected:,} rejected: {found.rejects}" if found.rejects else ""
    typer.echo(f"{found.scored:,} of {count_noun(found.rows, 'row')} scored{rejected}", err=True)
    return found


@contextlib.contextmanager
def _find_rows(context: RunContext, source: str | None) -> Iterator[str]:
    """The given source; without one, the feature rows of all who are active at ``as_of``, held while they are read."""
    if source is not None:
        yield locate_given(source)
        return
    from closedloop.bootstrap import build_engine, build_features, hold_working_files, locate_active
    from closedloop.stages.refresh import compute_newest

    with hold_working_files(context):
        with build_engine(context) as engine:
            folder, newest = compute_newest(
                context.params, context.dataset, build_features(context), engine, work_dir=locate_active(context)
            )
        yield str(folder / f"{newest:%Y-%m-%d}.parquet")


@edge_app.command("export")
@with_json
def edge_export(
    output: Annotated[Path, typer.Option(help="A new folder.", callback=locate_path)],
    params: ParamsOption = PARAMS,
    model: ModelOption = None,
) -> Any:
    """Write a folder with the model and one script that needs numpy and ONNX Runtime alone."""
    from closedloop.bootstrap import load_run, open_slot
    from closedloop.contract import MODEL_FILE
    from closedloop.scoring.edge import export_edge

    context = load_run(params)
    with open_slot(context, check_model(model)) as slot:
        export = export_edge(slot, output, range_margin=context.settings.serving.range_margin)
    size = export["files"][MODEL_FILE]["bytes"]
    typer.echo(f"{output}: {MODEL_FILE} has {size:,} bytes; score.py takes JSON lines", err=True)
    return export


@edge_app.command("import")
@with_json
def edge_import(
    records: Annotated[Path, typer.Option(help="The record file that score.py wrote.", callback=locate_path)],
    params: ParamsOption = PARAMS,
) -> Any:
    """Store a device's predictions in the operations store; each is stored once."""
    from closedloop.bootstrap import build_predictions, build_released, load_id_key, load_run
    from closedloop.scoring.edge import import_records

    context = load_run(params)
    store = build_predictions(context)
    context.database.upgrade()
    released, key = build_released(context), load_id_key(context)
    found = import_records(records, store, released, model_name=context.dataset.model_name, id_key=key)
    for number, reason in found.refused[:20]:
        typer.echo(f"{records}, line {number}: {reason}", err=True)
    typer.echo(f"{found.stored} stored, {found.duplicates} there already, {len(found.refused)} refused", err=True)
    return found


@app.command("serve-agent", hidden=True)
def serve_agent(
    params: ParamsOption = PARAMS,
    parent: Annotated[int | None, typer.Option(help="End when this process has.")] = None,
) -> None:
    """Run the agent; `serve` starts it beside its workers."""
    import logging.config

    from closedloop.bootstrap import build_agent, load_run
    from closedloop.processes import END_SIGNALS, handle_end_signals
    from closedloop.serving.exposition import build_registry, name_registry, serve_metrics
    from closedloop.serving.logs import LOG_CONFIG

    logging.config.dictConfig(LOG_CONFIG)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the agent asks again anyway: minutes sooner
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    context = load_run(params)
    agent, state_dir = build_agent(context, parent=parent)
    settings, aliases = context.settings.serving, context.settings.metrics.aliases
    registry = name_registry(build_registry(state_dir / "metrics"), context.dataset.model_name, aliases=aliases)
    serve_metrics(registry, settings.host, settings.metrics_port, "serving.metrics_port")
    handle_end_signals(lambda _: agent.stop())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)  # the server held them back until here
    agent.run()
