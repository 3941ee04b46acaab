"""The command line of what runs after training: the service, its agent, the operations store."""

from __future__ import annotations

import datetime as dt
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from closedloop.errors import ConfigError, ServiceUnavailable

app = typer.Typer()
store_app = typer.Typer(help="The operations store: predictions, outcomes, the deployment row.", no_args_is_help=True)
app.add_typer(store_app, name="store")

ParamsOption = Annotated[Path, typer.Option("--params", help="Names the data set.")]
PARAMS = Path("params.yaml")


@app.command()
def serve(
    params: ParamsOption = PARAMS,
    as_of: Annotated[
        str | None, typer.Option(help="UTC date that features are judged at, or 'now' (default: the profile's).")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A model folder to serve until the operations store names one.")
    ] = None,
) -> None:
    """Serve the deployed model over HTTP, with its agent beside it, until stopped."""
    from closedloop.bootstrap import load_run, write_serving_config

    context = load_run(params)
    config = write_serving_config(context, as_of=_read_as_of(as_of, context), bundled_dir=_check_model(model))
    # another program from here on, so that nothing of this command stays in the server's memory
    os.execv(sys.executable, [sys.executable, "-m", "closedloop.serving", str(config)])  # noqa: S606


@app.command()
def stream(
    params: ParamsOption = PARAMS,
    as_of: Annotated[
        str | None, typer.Option(help="UTC date that features are judged at, or 'now' (default: the profile's).")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A model folder to use until the operations store names one.")
    ] = None,
    agent: Annotated[bool, typer.Option(help="Run an agent too; not beside `serve` on the same state folder.")] = True,
) -> None:
    """Answer the events of a Kafka topic into another, exactly once, until stopped."""
    from closedloop.bootstrap import load_run, write_stream_config

    context = load_run(params)
    config = write_stream_config(
        context, as_of=_read_as_of(as_of, context), bundled_dir=_check_model(model), agent=agent
    )
    os.execv(sys.executable, [sys.executable, "-m", "closedloop.serving.stream", str(config)])  # noqa: S606


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
    from closedloop.serving.logs import LOG_CONFIG

    logging.config.dictConfig(LOG_CONFIG)
    context = load_run(params)
    agent, state_dir = build_agent(context, parent=parent)
    settings = context.settings.serving
    try:
        start_http_server(settings.metrics_port, settings.host, build_registry(state_dir / "metrics"))
    except OSError as error:
        raise ServiceUnavailable(f"serving.metrics_port {settings.metrics_port}: {error.strerror}") from error
    signal.signal(signal.SIGTERM, lambda *_: agent.stop())
    signal.signal(signal.SIGINT, lambda *_: agent.stop())
    agent.run()


@store_app.command()
def upgrade(params: ParamsOption = PARAMS) -> None:
    """Create the tables, or bring them up to date."""
    from closedloop.bootstrap import build_store, load_run

    store = build_store(load_run(params))
    store.upgrade()
    store.close()
    typer.echo("the operations store is up to date", err=True)


@store_app.command()
def purge(
    as_of: Annotated[str, typer.Option(help="UTC date: predictions older than the kept days before it go.")],
    params: ParamsOption = PARAMS,
) -> None:
    """Delete predictions, with their outcomes, that are older than operations.predictions_keep_days."""
    from closedloop.bootstrap import build_store, load_run

    context = load_run(params, overrides={"as_of": as_of})
    store = build_store(context)
    keep_days = context.settings.operations.predictions_keep_days
    removed = store.purge(context.dataset.model_name, keep_days=keep_days, as_of=context.params.as_of_at)
    store.close()
    typer.echo(f"{removed.predictions} predictions and {removed.outcomes} outcomes are gone", err=True)


@store_app.command()
def erase(
    customer_id: Annotated[str, typer.Option(help="Whose predictions and outcomes are deleted, in all data sets.")],
    params: ParamsOption = PARAMS,
) -> None:
    """Delete all that is known of a customer's predictions."""
    from closedloop.bootstrap import build_store, load_run

    store = build_store(load_run(params))
    removed = store.erase(customer_id)
    store.close()
    typer.echo(f"{removed.predictions} predictions and {removed.outcomes} outcomes are gone", err=True)


def _check_model(model: Path | None) -> Path | None:
    if model is not None and not (model / "contract.json").is_file():
        raise ConfigError(f"--model {model}: there is no contract.json; give a folder that 'closedloop train' made")
    return model


def _read_as_of(text: str | None, context: Any) -> dt.date | None:
    """The date that serving takes for today; None is the wall clock, which production goes by."""
    if text is None:
        return None if context.settings.profile == "production" else context.params.as_of
    if text == "now":
        return None
    try:
        return dt.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"--as-of {text!r}: a date as 2025-01-31, or 'now'") from error
