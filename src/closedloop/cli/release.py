"""The command line of releases: start, watch, undo, and prove what was done."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Annotated, Any

import typer

from closedloop.cli.options import (
    PARAMS,
    REASONS_MAX,
    RELEASE,
    Commands,
    JsonOption,
    ParamsOption,
    print_json,
    read_now,
)
from closedloop.errors import ConfigError, GateFailed, Undecided, count_noun

if TYPE_CHECKING:
    from closedloop.core.reasons.explainer import Explained
    from closedloop.records import Prediction

app = typer.Typer()
release_app = typer.Typer(
    cls=Commands, help="Release a version: from shadow over canary to champion, on evidence.", no_args_is_help=True
)
app.add_typer(release_app, name="release", rich_help_panel=RELEASE)

ActorOption = Annotated[str | None, typer.Option(help="Who does this, for the journal (default: the user).")]
ReasonOption = Annotated[str, typer.Option(help="Reason, for the journal.")]


@app.command(rich_help_panel=RELEASE)
def why(
    prediction_id: Annotated[str, typer.Argument(help="The id that the service answered with.")],
    params: ParamsOption = PARAMS,
    as_json: Annotated[
        bool, typer.Option("--json", help="Show all that led to it: model, data, features, gates, release.")
    ] = False,
    reasons: Annotated[int, typer.Option(min=1, max=REASONS_MAX, help="Show this many reasons.")] = 5,
) -> None:
    """Show the reasons for a score, the strongest first."""
    import tempfile
    from pathlib import Path

    from closedloop.bootstrap import (
        build_predictions,
        build_released,
        build_releases,
        load_run,
        locate_serving_state,
    )
    from closedloop.loop.lineage import explain, find_model, find_prediction, give_reasons

    context = load_run(params)
    store = build_predictions(context)
    if as_json:
        releases = build_releases(context)
        versions = build_released(context)
        found = explain(store, releases.journal, releases.tracking, versions, prediction_id, top=reasons)
        print_json(found)
        return
    prediction = find_prediction(store, context.dataset.model_name, prediction_id)
    with tempfile.TemporaryDirectory(prefix="closedloop-why-") as folder:
        state_dir, versions = locate_serving_state(context), build_released(context)
        model = find_model(state_dir, versions, prediction.model_version, Path(folder))
        _show_reasons(prediction, model.contract.threshold, give_reasons(model, prediction, reasons))


def _show_reasons(prediction: Prediction, threshold: float, found: Explained) -> None:
    """A table of the reasons, and the sum that they are part of."""
    customer = f"customer {prediction.customer_id}, " if prediction.customer_id else ""
    typer.echo(
        f"{customer}{prediction.predicted_at:%Y-%m-%d %H:%M:%S}, version {prediction.model_version}: probability "
        f"{prediction.score:.4f}, decision {prediction.decision} at threshold {threshold:g}"
    )
    rows = [("reason", "feature", "value", "contribution")]
    for one in found.reasons:
        value = "missing" if one.value is None else f"{one.value:.6g}" if isinstance(one.value, float) else one.value
        rows.append((one.reason, one.feature, value, f"{one.contribution:+.4f}"))
    others = found.raw_score - found.base - sum(one.contribution for one in found.reasons)
    rows += [("all others", "", "", f"{others:+.4f}"), ("base", "", "", f"{found.base:+.4f}")]
    rows.append(("raw score", "", "", f"{found.raw_score:+.4f}"))
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    for reason, feature, value, contribution in rows:
        left = f"{reason:<{widths[0]}}  {feature:<{widths[1]}}  {value:>{widths[2]}}"
        typer.echo(f"{left}  {contribution:>12}")


@app.command(rich_help_panel=RELEASE)
def reproduce(
    prediction_id: Annotated[str, typer.Argument(help="The id that the service answered with.")],
    params: ParamsOption = PARAMS,
    as_json: JsonOption = False,
) -> None:
    """Compute a recorded prediction's score again, or say what is missing."""
    from closedloop.bootstrap import build_predictions, build_released, load_run
    from closedloop.loop.lineage import reproduce as run

    context = load_run(params)
    found = run(build_predictions(context), build_released(context), context.dataset.model_name, prediction_id)
    recorded = found.prediction
    if as_json:
        told = {name: value for name, value in found._asdict().items() if name != "prediction"}
        print_json({"model_version": recorded.model_version, "recorded_score": recorded.score, **told})
        return
    typer.echo(f"version {recorded.model_version}: {found.score:.9f} again, {recorded.score:.9f} was recorded")
    typer.echo(f"decision {found.decision} at threshold {found.threshold:g}, as recorded")


@release_app.command()
def start(
    version: Annotated[str, typer.Argument(help="A registered version, or 'challenger' for the one of that alias.")],
    params: ParamsOption = PARAMS,
    actor: ActorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a registered version into shadow beside the champion."""
    from closedloop.bootstrap import build_release_evidence, build_releases, load_run
    from closedloop.release.controller import fit_policy, start_release

    context = load_run(params)
    releases = build_releases(context)
    if version == "challenger":
        found = releases.tracking.read_alias("challenger")
        if found is None:
            raise ConfigError(f"no version of {releases.model_name} is challenger")
        version = str(found.version)
    state = start_release(releases, build_release_evidence(context), version, actor=_name(actor), now=read_now())
    policy = None if state.rollout is None else fit_policy(context.settings.release, state.rollout)
    if as_json:
        print_json(_describe_state(state) | {"steps": [] if policy is None else policy.describe_steps()})
        return
    _show(state)
    if policy is not None:
        if (traffic := policy.requests_a_day) is not None:
            typer.echo(f"steps for {count_noun(round(traffic), 'request')} a day, one a customer:", err=True)
        for line in policy.describe_steps():
            typer.echo(f"  {line}", err=True)


@release_app.command()
def step(
    params: ParamsOption = PARAMS,
    every: Annotated[str | None, typer.Option(help="Repeat at this interval: 1d, 12h, 5m.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run one pass of the controller: gather the evidence, decide, and apply the decision."""
    from closedloop.bootstrap import build_release_evidence, build_releases, load_run
    from closedloop.release.controller import run_pass

    context = load_run(params)
    releases, evidence = build_releases(context), build_release_evidence(context)
    policy = context.settings.release

    def once(now: dt.datetime) -> None:
        found = run_pass(releases, evidence, policy, now=now, as_of=now)
        if as_json:
            print_json(_describe_state(found.state) | {"decision": found.decision})
            return
        _say(found.decision)
        _show(found.state)

    if every is None:
        once(read_now())
        return
    from closedloop.adapters.apscheduler import repeat

    repeat(once, every)


@release_app.command()
def check(params: ParamsOption = PARAMS, as_json: JsonOption = False) -> None:
    """Judge the current step without acting: exit status 0 is advance, 2 roll back, 3 hold."""
    from closedloop.bootstrap import build_release_evidence, build_releases, load_run
    from closedloop.release.controller import judge, resume

    context = load_run(params)
    releases, evidence, now = build_releases(context), build_release_evidence(context), read_now()
    state = resume(releases, evidence, now=now)
    judged = judge(releases, evidence, context.settings.release, state, now=now, as_of=now)
    decision = None if judged is None else judged[1]
    if as_json:
        print_json({"rollout": state.rollout, "decision": decision})
    if decision is None or state.rollout is None:
        typer.echo(f"no version of {releases.model_name} is being released: there is nothing to judge", err=True)
        raise SystemExit(Undecided.exit_status)
    if not as_json:
        _say(decision)
    if decision.verdict == "roll_back":  # the status 2 of a wrong command line becomes 1
        raise GateFailed(f"version {state.rollout.version} would be taken back")
    raise SystemExit(Undecided.exit_status if decision.verdict == "hold" else 0)


@release_app.command()
def promote(
    version: Annotated[str, typer.Argument(help="A registered version that passed its gates.")],
    params: ParamsOption = PARAMS,
    reason: ReasonOption = "by hand",
    actor: ActorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version the champion at once, without shadow and canary."""
    from closedloop.bootstrap import build_features, build_releases, load_run
    from closedloop.release.by_hand import promote as run

    context = load_run(params)
    releases, features = build_releases(context), build_features(context)
    _show(run(releases, features, version, actor=_name(actor), reason=reason, now=read_now()), as_json=as_json)


@release_app.command()
def rollback(
    to: Annotated[str | None, typer.Option(help="The version to serve (default: the one before).")] = None,
    only_open: Annotated[
        bool, typer.Option("--only-open", help="End a shadow or canary; where none is under way, change nothing.")
    ] = False,
    params: ParamsOption = PARAMS,
    reason: ReasonOption = "by hand",
    actor: ActorOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a shadow or canary, or make the former champion serve again.

    Its features and its threshold come back with it.
    """
    from closedloop.bootstrap import build_features, build_releases, load_run
    from closedloop.release.by_hand import roll_back

    context = load_run(params)
    releases, features = build_releases(context), build_features(context)
    who = _name(actor)
    state = roll_back(releases, features, to=to, only_open=only_open, actor=who, reason=reason, now=read_now())
    _show(state, as_json=as_json)


@release_app.command()
def history(params: ParamsOption = PARAMS, as_json: JsonOption = False) -> None:
    """List every move, the oldest first: when, what, who, and why."""
    from closedloop.bootstrap import build_releases, load_run

    if as_json:
        print_json(build_releases(load_run(params)).read_entries())
        return
    for number, entry in enumerate(build_releases(load_run(params)).read_entries(), start=1):
        row = entry.row
        beside = f", {row.challenger_version} in {row.challenger_mode} {row.weight:g}" if row.challenger_version else ""
        moment = entry.recorded_at.strftime("%Y-%m-%d %H:%M:%S")
        typer.echo(f"{number:>4} {moment} {entry.action}: champion {row.champion_version}{beside}")
        typer.echo(f"     {entry.actor}: {entry.reason}")


@release_app.command()
def verify(params: ParamsOption = PARAMS, as_json: JsonOption = False) -> None:
    """Check the journal's chain; if it is broken, name the place and end with status 2."""
    from closedloop.bootstrap import build_releases, load_run
    from closedloop.release.by_hand import describe_proof
    from closedloop.release.by_hand import verify as run

    proof = run(build_releases(load_run(params)))
    if as_json:
        print_json(proof)
        return
    for line in describe_proof(proof):
        typer.echo(line, err=True)


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


def _describe_state(state: Any) -> dict[str, Any]:
    return {"champion": state.row and state.row.champion_version, "rollout": state.rollout}


def _show(state: Any, *, as_json: bool = False) -> None:
    if as_json:
        print_json(_describe_state(state))
        return
    row, rollout = state.row, state.rollout
    text = f"champion {row.champion_version}" if row else "nothing serves"
    if rollout is not None:
        text += f"; version {rollout.version} in {rollout.step}"
    typer.echo(text, err=True)
