"""The command line of what runs after training: the service, its agent, the operations store."""

from __future__ import annotations

import datetime as dt
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from closedloop.cli_options import (
    PARAMS,
    AsOfOption,
    ClockOption,
    ModelOption,
    ParamsOption,
    check_model,
    read_clock,
    read_date,
)
from closedloop.errors import ConfigError, ServiceUnavailable

if TYPE_CHECKING:
    from closedloop.adapters.store import Removed

app = typer.Typer()
store_app = typer.Typer(help="The operations store: predictions, outcomes, the deployment row.", no_args_is_help=True)
app.add_typer(store_app, name="store")
edge_app = typer.Typer(help="A model that scores with numpy and ONNX Runtime alone.", no_args_is_help=True)
app.add_typer(edge_app, name="edge")


@app.command()
def serve(
    params: ParamsOption = PARAMS,
    as_of: ClockOption = None,
    model: Annotated[
        Path | None, typer.Option(help="A model folder to serve until the operations store names one.")
    ] = None,
    bento: Annotated[Path | None, typer.Option(help="The same, as the Bento that 'closedloop package' built.")] = None,
    clock: Annotated[Path | None, typer.Option(help="A file by which a replay moves the service's clock.")] = None,
) -> None:
    """Serve the deployed model over HTTP, with its agent beside it, until stopped."""
    from closedloop.bootstrap import load_run, write_serving_config
    from closedloop.serving.server import serve as serve_until_stopped

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


@app.command()
def stream(
    params: ParamsOption = PARAMS,
    as_of: ClockOption = None,
    model: Annotated[
        Path | None, typer.Option(help="A model folder to use until the operations store names one.")
    ] = None,
    agent: Annotated[bool, typer.Option(help="Run an agent too; not beside `serve` on the same state folder.")] = True,
) -> None:
    """Answer the events of a Kafka topic into another, exactly once, until stopped."""
    from closedloop.bootstrap import load_run, write_stream_config

    context = load_run(params)
    config = write_stream_config(context, as_of=read_clock(as_of, context), bundled_dir=check_model(model), agent=agent)
    os.execv(sys.executable, [sys.executable, "-m", "closedloop.serving.stream", str(config)])  # noqa: S606


@app.command()
def score(
    source: Annotated[str, typer.Option("--input", help="Parquet or CSV file, or a table: ADDRESS#TABLE.")],
    target: Annotated[str, typer.Option("--output", help="Parquet or CSV file, or a table.")],
    params: ParamsOption = PARAMS,
    model: ModelOption = None,
    resume: Annotated[bool, typer.Option(help="Go on with a run that was interrupted.")] = False,
    log: Annotated[bool, typer.Option(help="Log every prediction in the operations store.")] = True,
) -> None:
    """Score a file or table with the released model, in chunks."""
    from closedloop.bootstrap import build_store, load_run, locate_serving_state, open_slot
    from closedloop.serving.batch import BatchOptions, score_batch
    from closedloop.serving.worker import read_id_key

    context = load_run(params)
    state_dir, store = locate_serving_state(context), build_store(context)
    if log:
        store.upgrade()
    options = BatchOptions(
        range_margin=context.settings.serving.range_margin,
        id_key=read_id_key(state_dir, context.settings.serving.id_key),
        store=store if log else None,
        threads=context.settings.engine.threads,
        resume=resume,
        show_progress=True,
    )
    with open_slot(context, check_model(model)) as slot:
        found = score_batch(source, target, slot, options, state_dir=state_dir)
    rejected = f", {found.rejected:,} rejected: {found.rejects}" if found.rejects else ""
    typer.echo(f"{found.scored:,} of {found.rows:,} rows scored{rejected}", err=True)


@edge_app.command("export")
def edge_export(
    output: Annotated[Path, typer.Option(help="A new folder.")],
    params: ParamsOption = PARAMS,
    model: ModelOption = None,
) -> None:
    """Write a folder with the model and one script that scores with it."""
    from closedloop.bootstrap import load_run, open_slot
    from closedloop.serving.edge import describe_export, export_edge

    context = load_run(params)
    with open_slot(context, check_model(model)) as slot:
        export = export_edge(slot, output, range_margin=context.settings.serving.range_margin)
    typer.echo(f"{output}: {describe_export(export)}; score.py takes JSON lines", err=True)


@edge_app.command("import")
def edge_import(
    records: Annotated[Path, typer.Option(help="The record file that score.py wrote.")], params: ParamsOption = PARAMS
) -> None:
    """Bring an edge device's predictions into the operations store; what is there already is not doubled."""
    from closedloop.bootstrap import build_store, build_tracking, load_run, locate_serving_state
    from closedloop.serving.edge import import_records
    from closedloop.serving.worker import read_id_key

    context = load_run(params)
    store = build_store(context)
    store.upgrade()
    key = read_id_key(locate_serving_state(context), context.settings.serving.id_key)
    found = import_records(records, store, build_tracking(context), model_name=context.dataset.model_name, id_key=key)
    for number, reason in found.refused[:20]:
        typer.echo(f"{records}, line {number}: {reason}", err=True)
    typer.echo(f"{found.stored} stored, {found.duplicates} there already, {len(found.refused)} refused", err=True)


@app.command()
def skew(
    since: Annotated[str | None, typer.Option(help="UTC date: requests before it are left out.")] = None,
    params: ParamsOption = PARAMS,
) -> None:
    """Compare the features that were served, request by request, with Feast's point-in-time join."""
    from closedloop.bootstrap import build_features, build_store, build_tracking, load_run
    from closedloop.loop.skew import check_skew

    context = load_run(params)
    day = None if since is None else dt.datetime.combine(read_date("--since", since), dt.time(), dt.UTC)
    found = check_skew(build_store(context), build_tracking(context), build_features(context), since=day)
    left_out = f"; {found.bundled} of a bundled model are not compared" if found.bundled else ""
    typer.echo(f"{found.requests} requests were served {found.rows} rows, all as in training{left_out}", err=True)


@app.command("serve-agent", hidden=True)
def serve_agent(
    params: ParamsOption = PARAMS,
    parent: Annotated[int | None, typer.Option(help="End when this process has.")] = None,
) -> None:
    """What `serve` runs beside its workers."""
    import logging.config

    from prometheus_client import start_http_server

    from closedloop.bootstrap import build_agent, load_run
    from closedloop.serving.exposition import build_registry
    from closedloop.serving.keeper import END_SIGNALS
    from closedloop.serving.logs import LOG_CONFIG

    logging.config.dictConfig(LOG_CONFIG)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the agent asks again anyway: minutes sooner
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    context = load_run(params)
    agent, state_dir = build_agent(context, parent=parent)
    settings = context.settings.serving
    try:
        start_http_server(settings.metrics_port, settings.host, build_registry(state_dir / "metrics"))
    except OSError as error:
        raise ServiceUnavailable(f"serving.metrics_port {settings.metrics_port}: {error.strerror}") from error
    for number in END_SIGNALS:
        signal.signal(number, lambda *_: agent.stop())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)  # the keeper held them back until here
    agent.run()


@store_app.command()
def upgrade(params: ParamsOption = PARAMS) -> None:
    """Create the tables, or bring them up to date."""
    from closedloop.bootstrap import build_store, load_run

    build_store(load_run(params)).upgrade()
    typer.echo("the operations store is up to date", err=True)


@store_app.command()
def purge(
    as_of: AsOfOption,
    params: ParamsOption = PARAMS,
) -> None:
    """Delete predictions, with their outcomes, that are older than operations.predictions_keep_days."""
    from closedloop.bootstrap import build_store, load_run

    context = load_run(params, overrides={"as_of": as_of})
    name, keep_days = context.dataset.model_name, context.settings.operations.predictions_keep_days
    _tell_removed(build_store(context).purge(name, keep_days=keep_days, as_of=context.params.as_of_at))


@store_app.command()
def erase(
    customer_id: Annotated[str, typer.Option(help="Of whom all rows are deleted, in all data sets.")],
    params: ParamsOption = PARAMS,
) -> None:
    """Delete a customer's features, online and published, working files, then predictions and outcomes."""
    from closedloop.adapters.erasure import erase_online, erase_published, erase_working_files, is_anybody_online
    from closedloop.adapters.feast import read_store_config
    from closedloop.bootstrap import build_store, hold_working_files, load_run

    context = load_run(params)
    settings = context.settings
    store_config = read_store_config(settings, context.dataset.model_name)["online_store"]
    offline_dir = settings.locate(settings.features.offline)
    with hold_working_files(context):  # a refresh that read before the source forgot must not publish after this
        erase_working_files(settings.root)
        # features first: whom the service does not know, it logs no predictions of
        online = erase_online(store_config, customer_id)
        published = erase_published(offline_dir, customer_id)
    if published is None:
        typer.echo(f"{online} online rows of features are gone; nothing is published in {offline_dir}", err=True)
    else:
        typer.echo(f"{online} online and {published} published rows of features are gone, in {offline_dir}", err=True)
    _tell_removed(build_store(context).erase(customer_id))
    if published is None and is_anybody_online(store_config):
        raise ServiceUnavailable(
            f"features are online, so they were published, but not in {offline_dir}: run it where those files lie"
        )


def _tell_removed(removed: Removed) -> None:
    typer.echo(f"{removed.predictions} predictions and {removed.outcomes} outcomes are gone", err=True)
