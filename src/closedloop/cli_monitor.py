"""The command line of monitoring: what really happened, and whether the model still holds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from closedloop.cli_options import PARAMS, AsOfOption, ParamsOption, read_now
from closedloop.errors import ConfigError, GateFailed

if TYPE_CHECKING:
    from closedloop.adapters.checks import Check, Checks
    from closedloop.adapters.samples import Samples
    from closedloop.bootstrap import RunContext
    from closedloop.serving.slots import Slot

logger = logging.getLogger(__name__)
VERDICTS = ("none", "watch", "alert", "retrain")
app = typer.Typer()


@app.command()
def outcomes(
    as_of: AsOfOption,
    params: ParamsOption = PARAMS,
) -> None:
    """Store what happened to the customers of predictions whose horizon has closed, by the label rule."""
    from closedloop.bootstrap import build_engine, build_samples, build_store, hold_working_files, load_run
    from closedloop.loop.outcomes import label_predictions

    context = load_run(params, overrides={"as_of": as_of})
    work_dir = context.settings.locate("state/outcomes") / context.dataset.model_name
    samples, store = build_samples(context), build_store(context)
    with hold_working_files(context), build_engine(context) as engine:
        found = label_predictions(context.params, context.dataset, engine, samples, store, work_dir=work_dir)
    left = f"{found.outside:,} of customers who were not active, {found.irregular:,} not of a midnight"
    typer.echo(f"{found.stored:,} outcomes of {len(found.snapshots)} snapshots stored; left out: {left}", err=True)


@app.command()
def monitor(
    as_of: Annotated[str | None, typer.Option(help="UTC date: predictions before it are looked at.")] = None,
    params: ParamsOption = PARAMS,
    every: Annotated[str | None, typer.Option(help="Go on by the clock: 1d, 12h, 30m; without --as-of.")] = None,
    fail_on: Annotated[
        str | None, typer.Option(help="End with status 2 at this verdict or worse: watch, alert or retrain.")
    ] = None,
    report: Annotated[bool, typer.Option(help="Keep a report of the check, in a folder and in MLflow.")] = True,
) -> None:
    """Check the released model once: drift, estimated and real performance; a due retraining is asked for once."""
    if (as_of is None) == (every is None):
        raise ConfigError("monitor: give --as-of DATE for one pass, or --every 1d to go on by the clock")
    if fail_on is not None and fail_on not in VERDICTS[1:]:
        raise ConfigError(f"--fail-on {fail_on}: allowed are {', '.join(VERDICTS[1:])}")
    if every is not None:
        from closedloop.adapters.apscheduler import repeat

        repeat(lambda now: _check_once(params, now.date().isoformat(), report=report), every)
        return
    verdict = _check_once(params, str(as_of), report=report)
    if fail_on is not None and VERDICTS.index(verdict) >= VERDICTS.index(fail_on):
        raise GateFailed(f"monitor: the verdict is {verdict}, --fail-on is {fail_on}")


def _check_once(params: Path, as_of: str, *, report: bool) -> str:
    """One pass; returns its verdict."""
    from closedloop.bootstrap import build_checks, build_monitor_rules, build_samples, load_run, open_slot
    from closedloop.loop.monitor import run_check

    context = load_run(params, overrides={"as_of": as_of})
    checks, samples = build_checks(context), build_samples(context)
    checks.upgrade()
    try:
        with open_slot(context, None) as slot:
            check, retraining = run_check(
                checks,
                samples,
                model_dir=Path(slot.folder),
                version=slot.version,
                as_of=context.params.as_of_at,
                now=read_now(),
                rules=build_monitor_rules(context),
            )
            kept = _keep_report(context, checks, samples, check, slot) if report else None
    finally:
        samples.close()
        checks.close()
    typer.echo(f"{check.verdict}: version {check.model_version} as of {as_of}, {check.predictions:,} predictions")
    for reason in check.evidence["reasons"]:
        typer.echo(f"  {reason}")
    if kept is not None:
        typer.echo(f"  {kept}")
    if retraining is not None:
        typer.echo(f"  retraining {retraining.trigger_id} is {retraining.state}")
    if context.settings.monitoring.retrain:
        _retrain(context)
    return check.verdict


def _keep_report(context: RunContext, checks: Checks, samples: Samples, check: Check, slot: Slot) -> str:
    """Where the report of a recorded check is; whatever goes wrong with it is told and nothing more."""
    from closedloop.bootstrap import build_tracking
    from closedloop.loop.report import keep_report

    if check.model_version != slot.version:
        return f"no report is made now: version {check.model_version} was checked, {slot.version} is released"
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
        return f"no report: {type(error).__name__}: {error}; the same command tries again"
    return f"report: {folder / 'report.html'}, MLflow run {run_id}"


def _retrain(context: RunContext) -> None:
    """Run what is open, as `closedloop retrain --trigger-id` does, an earlier pass that was killed included.

    What another process here is running is left to it.
    """
    from closedloop.adapters.checks import OPEN_STATES
    from closedloop.bootstrap import build_checks, build_retraining

    checks = build_checks(context)
    found = checks.list_retrainings(context.dataset.model_name, until=context.params.as_of_at)
    for one in reversed(found):
        if one.state in OPEN_STATES:
            ended, ran = build_retraining(context, checks)(one.trigger_id)
            typer.echo(f"  retraining {one.trigger_id} is {ended.state}{'' if ran else ', by another process'}")
    checks.close()
