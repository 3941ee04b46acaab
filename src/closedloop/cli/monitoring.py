"""The command line of monitoring: how the loop stands, whether the model still holds, and retraining."""

from __future__ import annotations

import datetime as dt
import getpass
import logging
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from closedloop.cli.options import (
    MONITORING,
    PARAMS,
    WORKFLOW,
    AsOfOption,
    ClockOption,
    JsonOption,
    ParamsOption,
    locate_path,
    print_json,
    read_clock_at,
    read_date,
    read_now,
    shorten,
    with_json,
)
from closedloop.errors import ClosedloopError, ConfigError, GateFailed, ServiceUnavailable, Undecided, count_noun
from closedloop.extras import require_modules
from closedloop.processes import handle_end_signals

if TYPE_CHECKING:
    from closedloop.bootstrap import RunContext
    from closedloop.loop.status.overview import Overview
    from closedloop.serving.slots.slots import Slot
    from closedloop.store.checks import Check, Checks, Retraining
    from closedloop.store.samples import Samples

logger = logging.getLogger(__name__)
SENT_FIELDS = ("model_name", "model_version", "verdict", "predictions", "outcomes")
FAIL_ON = ("watch", "alert", "retrain")
app = typer.Typer()


@app.command(rich_help_panel=MONITORING)
@with_json
def outcomes(
    as_of: AsOfOption,
    params: ParamsOption = PARAMS,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", help="A Parquet or CSV file with outcomes, instead of the label rule.", callback=locate_path
        ),
    ] = None,
) -> Any:
    """Store outcomes of predictions whose horizon has closed, by the label rule or from a file."""
    from closedloop.bootstrap import (
        build_engine,
        build_predictions,
        build_samples,
        hold_working_files,
        load_id_key,
        load_run,
    )
    from closedloop.loop.monitor.outcome_file import store_outcomes
    from closedloop.loop.monitor.outcomes import label_predictions

    context = load_run(params, overrides={"as_of": as_of})
    samples, store = build_samples(context), build_predictions(context)
    if source is not None:
        clock, key = context.params.as_of_at, load_id_key(context)
        read = store_outcomes(source, context.dataset, samples, store, as_of=clock, id_key=key)
        unmatched = f"{count_noun(read.unmatched, 'row')} of it without a prediction that waits for one"
        typer.echo(f"{count_noun(read.stored, 'outcome')} stored from {source}; {unmatched}", err=True)
        return read
    work_dir = context.settings.locate("state/outcomes") / context.dataset.model_name
    with hold_working_files(context), build_engine(context) as engine:
        found = label_predictions(context.params, context.dataset, engine, samples, store, work_dir=work_dir)
    left = f"{found.outside:,} of customers who were not active, {found.irregular:,} not of a midnight"
    stored = f"{count_noun(found.stored, 'outcome')} of {count_noun(len(found.snapshots), 'snapshot')} stored"
    typer.echo(f"{stored}; left out: {left}", err=True)
    return found


@app.command(rich_help_panel=MONITORING)
def monitor(
    as_of: Annotated[str | None, typer.Option(help="UTC date: only predictions before it are checked.")] = None,
    params: ParamsOption = PARAMS,
    every: Annotated[str | None, typer.Option(help="Repeat at this interval: 1d, 12h, 30m. Not with --as-of.")] = None,
    fail_on: Annotated[
        str | None,
        typer.Option(help="End with 2 at this verdict or worse (watch, alert, retrain), with 3 if it cannot tell."),
    ] = None,
    report: Annotated[bool, typer.Option(help="Keep a report of the check, in a folder and in MLflow.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Check the released model for drift and performance; request a due retraining."""
    if (as_of is None) == (every is None):
        raise ConfigError("monitor: give --as-of DATE for one pass, or --every 1d to go on by the clock")
    check_fail_on(fail_on)
    if every is not None:
        from closedloop.adapters.apscheduler import repeat

        repeat(lambda now: check_once(params, now.date().isoformat(), report=report, as_json=as_json), every)
        return
    verdict = check_once(params, str(as_of), report=report, as_json=as_json)
    judge_end(verdict, fail_on)


def check_fail_on(fail_on: str | None) -> None:
    """Raise a ConfigError where ``--fail-on`` names none of `FAIL_ON`."""
    if fail_on is not None and fail_on not in FAIL_ON:
        raise ConfigError(f"--fail-on {fail_on}: allowed are {', '.join(FAIL_ON)}")


def judge_end(verdict: str, fail_on: str | None) -> None:
    """End with an error where a pipeline asked to stop: 2 at the verdict or a worse one, 3 where there is none."""
    if fail_on is None or verdict == "none":
        return
    said = f"the verdict is {verdict}, --fail-on is {fail_on}"
    if verdict == "cannot tell":
        raise Undecided(said)
    if FAIL_ON.index(verdict) >= FAIL_ON.index(fail_on):
        raise GateFailed(said)


def check_once(params: Path, as_of: str, *, report: bool, as_json: bool = False) -> str:
    """One pass; returns its verdict."""
    from closedloop.bootstrap import build_checks, build_samples, build_webhook, load_run, open_slot, read_worth
    from closedloop.loop.monitor.monitor import run_check

    context = load_run(params, overrides={"as_of": as_of})
    checks, samples = build_checks(context), build_samples(context)
    context.database.upgrade()
    with closing(context.database), open_slot(context, None) as slot:
        check, retraining = run_check(
            checks,
            samples,
            slot=slot,
            as_of=context.params.as_of_at,
            now=read_now(),
            policy=context.settings.monitoring,
            worth=read_worth(context),
        )
        kept = _keep_report(context, checks, samples, check, slot) if report else None
    sent = {name: getattr(check, name) for name in SENT_FIELDS} | {"as_of": f"{check.as_of:%Y-%m-%d}"}
    sent |= {"reasons": list(check.evidence["reasons"]), "retraining": retraining is not None}
    build_webhook(context).tell("monitor.verdict", check.check_id, sent, now=check.recorded_at)
    if as_json:
        print_json({"check": check, "report": kept and ", ".join(kept), "retraining": retraining})
    else:
        _show_check(check, kept, retraining)
    _refresh_start_page(context)
    if context.settings.monitoring.retrain:
        _retrain(context, err=as_json)
    return check.verdict


def _show_check(check: Check, kept: list[str] | None, retraining: Retraining | None) -> None:
    predictions = count_noun(check.predictions, "prediction")
    typer.echo(f"{check.verdict}: version {check.model_version} as of {check.as_of:%Y-%m-%d}, {predictions}")
    for reason in check.evidence["reasons"]:
        typer.echo(f"  {reason}")
    for line in kept or ():
        typer.echo(f"  {line}")
    if retraining is not None:
        typer.echo(f"  retraining {retraining.trigger_id} is {retraining.state}")


def _refresh_start_page(context: RunContext) -> None:
    """Where a project's pages are; a pod has none, and may not write."""
    from closedloop.bootstrap import write_start_page
    from closedloop.config.layout import Layout

    if not Layout().card.is_file():
        return
    try:
        typer.echo(f"  start page: {shorten(write_start_page(context, read_now()))}", err=True)
    except OSError as error:
        logger.warning("the start page was not written: %s", error)


def _keep_report(context: RunContext, checks: Checks, samples: Samples, check: Check, slot: Slot) -> list[str]:
    """Lines that say where the report of a recorded check is; whatever goes wrong with it is told and nothing more."""
    from closedloop.bootstrap import build_tracking
    from closedloop.loop.monitor.report import keep_report

    if check.model_version != slot.version:
        return [f"no report is made now: version {check.model_version} was checked, {slot.version} is released"]
    settings = context.settings.monitoring
    folder = context.settings.locate(settings.reports) / check.model_name / f"{check.as_of:%Y-%m-%d}"
    earlier = [one for one in checks.list_checks(check.model_name, until=check.as_of) if one != check]
    try:
        run_id = keep_report(
            build_tracking(context),
            samples,
            check,
            earlier,
            model_dir=Path(slot.folder),
            folder=folder,
            rows_max=settings.sample_rows_max,
        )
    except Exception as error:
        logger.warning("the report of check %s failed", check.check_id, exc_info=error)
        return [f"no report: {type(error).__name__}: {error}; the same command tries again"]
    return [f"report: {shorten(folder / 'report.html')}", f"MLflow run {run_id}"]


def _retrain(context: RunContext, *, err: bool) -> None:
    """Run what is open, as `closedloop retrain --trigger-id` does, an earlier pass that was killed included.

    What another process here is running is left to it.
    """
    from closedloop.bootstrap import build_checks, build_retraining
    from closedloop.store.checks import OPEN_STATES

    checks = build_checks(context)
    found = checks.list_retrainings(context.dataset.model_name, until=context.params.as_of_at)
    for one in reversed(found):
        if one.state in OPEN_STATES:
            ended, ran = build_retraining(context, checks)(one.trigger_id)
            told = f"  retraining {one.trigger_id} is {ended.state}{'' if ran else ', by another process'}"
            typer.echo(told, err=err)


@app.command(rich_help_panel=MONITORING)
def exporter(params: ParamsOption = PARAMS, as_of: ClockOption = None) -> None:
    """Serve the loop's metrics to Prometheus, and a release's verdict at /release, until stopped."""
    from closedloop.bootstrap import build_journal, build_overview, load_run
    from closedloop.loop.status.exporter import build_registry
    from closedloop.loop.status.release_verdict import read_verdict
    from closedloop.serving.exposition import name_registry, serve_metrics

    context = load_run(params)
    gather = build_overview(context)

    def read() -> Overview:
        now = read_now()
        return gather(now, read_clock_at(as_of, context, now))

    settings, stopped = context.settings.exporter, threading.Event()
    read_clock_at(as_of, context, read_now())  # a wrong one is said before the first scrape
    aliases = context.settings.metrics.aliases
    registry = name_registry(build_registry(read), context.dataset.model_name, aliases=aliases)
    documents = {"/release": partial(read_verdict, build_journal(context), context.dataset.model_name)}
    port = serve_metrics(registry, settings.host, settings.port, "exporter.port", documents)
    handle_end_signals(lambda _: stopped.set())
    typer.echo(f"metrics on http://{settings.host}:{port}/metrics", err=True)
    stopped.wait()


@app.command(rich_help_panel=MONITORING)
@with_json
def skew(
    since: Annotated[str | None, typer.Option(help="UTC date: only requests from it on are compared.")] = None,
    params: ParamsOption = PARAMS,
) -> Any:
    """Compare served features, request by request, with Feast's point-in-time join."""
    from closedloop.bootstrap import build_features, build_predictions, build_tracking, load_run
    from closedloop.loop.skew import check_skew

    context = load_run(params)
    day = None if since is None else dt.datetime.combine(read_date("--since", since), dt.time(), dt.UTC)
    found = check_skew(build_predictions(context), build_tracking(context), build_features(context), since=day)
    left_out = f"; {found.bundled} of a bundled model are not compared" if found.bundled else ""
    served = count_noun(found.requests, "request was served", "requests were served")
    typer.echo(f"{served} {count_noun(found.rows, 'row')}, all as in training{left_out}", err=True)
    return found


@app.command(rich_help_panel=WORKFLOW)
@with_json
def retrain(
    params: ParamsOption = PARAMS,
    trigger_id: Annotated[
        str | None, typer.Option(help="Id of the retraining; one that has ended does not run again.")
    ] = None,
    as_of: Annotated[str | None, typer.Option(help="UTC date: only events before it are used.")] = None,
    data_start_date: Annotated[
        str | None, typer.Option(help="First snapshot, or day of a table; default: as closedloop run.")
    ] = None,
    data_end_date: Annotated[
        str | None, typer.Option(help="Last snapshot, or day of a table; default: the newest with a known label.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Reason, for the record.")] = "asked for by hand",
) -> Any:
    """Train on recent data; a model that passes its gates becomes the challenger.

    The command never makes a champion. It prints the version alone to standard output.
    """
    from closedloop.adapters.git import read_commit
    from closedloop.bootstrap import build_checks, build_retraining, load_newest
    from closedloop.loop.retrain import name_trigger, override_dates
    from closedloop.store.checks import Retraining

    require_modules("retrain")
    context = load_newest(params, override_dates(as_of, data_start_date, data_end_date))
    values, checks = context.params, build_checks(context)
    context.database.upgrade()
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
    return vars(found) | {"ran": ran}
