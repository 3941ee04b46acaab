"""The command line of releases: start, watch, undo, and prove what was done."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

import typer

from closedloop.cli_options import PARAMS, ParamsOption, read_now
from closedloop.errors import ConfigError, GateFailed

app = typer.Typer()
release_app = typer.Typer(
    help="Releases: from registered over shadow and canary to champion, on evidence.", no_args_is_help=True
)
app.add_typer(release_app, name="release")

ActorOption = Annotated[str | None, typer.Option(help="Who asks, for the journal (default: the user).")]
ReasonOption = Annotated[str, typer.Option(help="Why, for the journal.")]
UNDECIDED = 3


@app.command()
def why(
    prediction_id: Annotated[str, typer.Argument(help="As the service answered it.")], params: ParamsOption = PARAMS
) -> None:
    """All that led to a prediction: model, data, features, gates, and the release; as JSON."""
    import json

    from closedloop.bootstrap import build_releases, build_store, load_run
    from closedloop.loop.lineage import explain

    context = load_run(params)
    releases = build_releases(context)
    tracking = releases.tracking
    found = explain(build_store(context), releases.journal, tracking, tracking, prediction_id)
    typer.echo(json.dumps(found, indent=2, default=str))


@app.command()
def reproduce(
    prediction_id: Annotated[str, typer.Argument(help="As the service answered it.")], params: ParamsOption = PARAMS
) -> None:
    """Compute a prediction's score again from what was recorded, or say what is missing."""
    from closedloop.bootstrap import build_store, build_tracking, load_run
    from closedloop.loop.lineage import reproduce as run

    context = load_run(params)
    again = run(build_store(context), build_tracking(context), context.dataset.model_name, prediction_id)
    recorded = again.prediction
    typer.echo(f"version {recorded.model_version}: {again.score:.9f} again, {recorded.score:.9f} was recorded")
    typer.echo(f"decision {again.decision} at threshold {again.threshold:g}, as recorded")


@release_app.command()
def start(
    version: Annotated[str, typer.Argument(help="A registered version, or 'challenger' for the one of that alias.")],
    params: ParamsOption = PARAMS,
    actor: ActorOption = None,
) -> None:
    """Put a registered version into shadow beside the champion."""
    from closedloop.bootstrap import build_release_evidence, build_releases, load_run
    from closedloop.loop.release import start_release

    context = load_run(params)
    releases = build_releases(context)
    if version == "challenger":
        found = releases.tracking.read_alias("challenger")
        if found is None:
            raise ConfigError(f"no version of {releases.model_name} is challenger")
        version = str(found.version)
    _show(start_release(releases, build_release_evidence(context), version, actor=_name(actor), now=read_now()))


@release_app.command()
def step(
    params: ParamsOption = PARAMS,
    every: Annotated[str | None, typer.Option(help="Go on by the clock: 1d, 12h, 5m.")] = None,
) -> None:
    """One pass of the controller: complete, gather, decide, apply."""
    from closedloop.bootstrap import build_release_evidence, build_release_policy, build_releases, load_run
    from closedloop.loop.release import run_pass

    context = load_run(params)
    releases, evidence = build_releases(context), build_release_evidence(context)
    policy = build_release_policy(context)

    def once(now: dt.datetime) -> None:
        found = run_pass(releases, evidence, policy, now=now, as_of=now)
        _say(found.decision)
        _show(found.state)

    if every is None:
        once(read_now())
        return
    from closedloop.adapters.apscheduler import repeat

    repeat(once, every)


@release_app.command()
def check(params: ParamsOption = PARAMS) -> None:
    """Judge the step that is under way, and decide nothing: exit status 0 advance, 2 roll back, 3 undecided."""
    from closedloop.bootstrap import build_release_evidence, build_release_policy, build_releases, load_run
    from closedloop.loop.release import judge, resume

    context = load_run(params)
    releases, evidence, now = build_releases(context), build_release_evidence(context), read_now()
    rollout = resume(releases, evidence, now=now).rollout
    if rollout is None:
        raise ConfigError(f"no version of {releases.model_name} is being released")
    policy = build_release_policy(context)
    _, decision = judge(releases, evidence, policy, rollout, now=now, as_of=now)
    _say(decision)
    if decision.verdict == "roll_back":  # the status 2 of a wrong command line becomes 1
        raise GateFailed(f"version {rollout.version} would be taken back")
    raise SystemExit(UNDECIDED if decision.verdict == "hold" else 0)


@release_app.command()
def promote(
    version: Annotated[str, typer.Argument(help="A registered version that passed its gates.")],
    params: ParamsOption = PARAMS,
    reason: ReasonOption = "by hand",
    actor: ActorOption = None,
) -> None:
    """Make a version champion at once, without shadow and canary."""
    from closedloop.bootstrap import build_features, build_releases, load_run
    from closedloop.loop.rollback import promote as run

    context = load_run(params)
    releases, features = build_releases(context), build_features(context)
    _show(run(releases, features, version, actor=_name(actor), reason=reason, now=read_now()))


@release_app.command()
def rollback(
    to: Annotated[str | None, typer.Option(help="The version to serve (default: the one before).")] = None,
    only_open: Annotated[
        bool, typer.Option("--only-open", help="End a shadow or canary; where none is under way, change nothing.")
    ] = False,
    params: ParamsOption = PARAMS,
    reason: ReasonOption = "by hand",
    actor: ActorOption = None,
) -> None:
    """End a shadow or canary, or give the champion's place back: model, features and thresholds together."""
    from closedloop.bootstrap import build_features, build_releases, load_run
    from closedloop.loop.rollback import roll_back

    context = load_run(params)
    releases, features = build_releases(context), build_features(context)
    who = _name(actor)
    _show(roll_back(releases, features, to=to, only_open=only_open, actor=who, reason=reason, now=read_now()))


@release_app.command()
def history(params: ParamsOption = PARAMS) -> None:
    """Every move, the oldest first: when, what, who, and why."""
    from closedloop.bootstrap import build_releases, load_run

    for number, entry in enumerate(build_releases(load_run(params)).read_entries(), start=1):
        row = entry.row
        beside = f", {row.challenger_version} in {row.challenger_mode} {row.weight:g}" if row.challenger_version else ""
        moment = entry.recorded_at.strftime("%Y-%m-%d %H:%M:%S")
        typer.echo(f"{number:>4} {moment} {entry.action}: champion {row.champion_version}{beside}")
        typer.echo(f"     {entry.actor}: {entry.reason}")


@release_app.command()
def verify(params: ParamsOption = PARAMS) -> None:
    """Prove the journal; a broken one ends with 2 and names the place."""
    from closedloop.bootstrap import build_releases, load_run
    from closedloop.loop.rollback import verify as run

    typer.echo(f"the journal holds: {run(build_releases(load_run(params)))} entries", err=True)


def _name(actor: str | None) -> str:
    import getpass

    return actor or getpass.getuser()


def _say(decision: Any) -> None:
    if decision is None:
        typer.echo("no version is being released", err=True)
        return
    typer.echo(decision.verdict.replace("_", " "))
    for reason in decision.reasons:
        typer.echo(f"  {reason}")


def _show(state: Any) -> None:
    row, rollout = state.row, state.rollout
    text = f"champion {row.champion_version}" if row else "nothing serves"
    if rollout is not None:
        text += f"; version {rollout.version} in {rollout.step}"
    typer.echo(text, err=True)
