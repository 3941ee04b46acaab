"""How the loop stands, in words: one line for each thing that a person asks, and what is to be done next."""

from __future__ import annotations

import datetime as dt
from typing import NamedTuple

from closedloop.loop.overview import Overview

CHECK_AGE_MAX = dt.timedelta(hours=26)
LABELLED_MIN = 0.5
GOOD, LOOK, BAD, PLAIN = "green", "yellow", "bold red", ""
STYLE_OF_VERDICT = {"none": GOOD, "watch": LOOK, "alert": BAD, "retrain": BAD}
STYLE_OF_STATE = {"failed": BAD, "refused": LOOK}


class Line(NamedTuple):
    """What is asked, the answer, and how it is coloured."""

    name: str
    text: str
    style: str = PLAIN


def describe(view: Overview, address: str, answering: str | None) -> list[Line]:
    """The screen, from top to bottom.

    Parameters
    ----------
    address
        Of the service.
    answering
        The version that it answers with, "" for none; None: it does not answer.
    """
    return [
        _describe_champion(view),
        _describe_health(view, address, answering),
        _describe_release(view),
        _describe_check(view),
        _describe_drift(view),
        _describe_estimate(view),
        _describe_reality(view),
        _describe_labels(view),
        _describe_features(view),
        _describe_retrainings(view),
        Line("next", find_next_step(view, answering), "bold"),
    ]


def find_next_step(view: Overview, answering: str | None) -> str:
    """What a person, or a schedule, does next; the most urgent thing alone."""
    day, last, check = view.as_of.date(), view.retraining, view.check
    if view.row is None:
        return "closedloop run, then closedloop release promote VERSION"
    if answering is None:
        return "closedloop serve"
    if last and last.state in ("failed", "requested"):
        return f"closedloop retrain --trigger-id {last.trigger_id}"
    if view.rollout:
        return "closedloop release check says what the release waits for; release step moves it"
    if view.waiting:
        return f"closedloop release start {view.waiting}"
    if last and last.state == "running":
        return f"wait for the retraining {last.trigger_id}"
    if check is None or view.now - check.recorded_at > CHECK_AGE_MAX:
        return f"closedloop monitor --as-of {day}"
    if check.verdict in ("alert", "retrain"):
        return "judge the monitor's reasons: docs/runbook.md#modelsuspect"
    if view.labelled.whole and view.labelled.part < LABELLED_MIN * view.labelled.whole:
        return f"closedloop outcomes --as-of {day}"
    return "nothing is due"


def _describe_champion(view: Overview) -> Line:
    if view.row is None:
        return Line("serves", "nothing was released yet", BAD)
    since = view.serves_since or view.row.updated_at
    return Line(
        "serves", f"version {view.row.champion_version} for {_last(view, since)} (since {since:%F %H:%M} UTC)", "bold"
    )


def _describe_health(view: Overview, address: str, answering: str | None) -> Line:
    if answering is None:
        return Line("health", f"no answer from {address}", BAD)
    good = view.row is not None and answering == view.row.champion_version
    return Line("health", f"{address} answers with version {answering or 'none'}", GOOD if good else BAD)


def _describe_release(view: Overview) -> Line:
    if view.rollout is None or view.row is None:
        return Line("release", f"version {view.waiting} waits for one" if view.waiting else "none in progress")
    share = f"{view.row.weight:.0%} of the answers" if view.row.weight else "no answers, it scores in shadow"
    if view.rollout.step == "champion":
        share = f"version {view.rollout.predecessor} scores in shadow, outcomes go on testing"
    text = f"version {view.rollout.version} in {view.rollout.step} for {_last(view, view.rollout.step_at)}: {share}"
    return Line("release", text, LOOK)


def _describe_check(view: Overview) -> Line:
    check = view.check
    if check is None:
        return Line("last check", "none yet", LOOK)
    about = f"version {check.model_version} as of {check.as_of:%F}, {check.predictions:,} predictions"
    reasons = "".join(f"\n  {reason}" for reason in check.evidence.get("reasons", ()))
    text = f"{check.verdict}, {_last(view, check.recorded_at)} ago: {about}{reasons}"
    late = view.now - check.recorded_at > CHECK_AGE_MAX
    return Line("last check", text, BAD if late else STYLE_OF_VERDICT[check.verdict])


def _describe_drift(view: Overview) -> Line:
    if not view.drift:
        return Line("drift", "not measured yet")
    features, drifted = view.drift["features"], view.drift["drifted"]
    named = ", ".join(f"{name} {features[name]['effect']:.2f}" for name in drifted[:5])
    text = f"{len(drifted)} of {len(features)} distributions{': ' if named else ''}{named}"
    return Line("drift", f"{text} ..." if len(drifted) > 5 else text, LOOK if drifted else GOOD)


def _describe_estimate(view: Overview) -> Line:
    if not view.estimate:
        return Line("estimated", "not measured yet")
    reference = view.estimate["reference"]["accuracy"]
    text = f"accuracy {view.estimate['accuracy']:.1%}, {reference:.1%} on the reference rows"
    return Line("estimated", text, LOOK if view.estimate["breach"] else GOOD)


def _describe_reality(view: Overview) -> Line:
    if view.accuracy.value is None:
        return Line("real", "no outcome is known yet")
    text = f"accuracy {view.accuracy.value:.1%} of the last {view.accuracy.whole:,} outcomes"
    if not view.realised:
        return Line("real", text)
    text += f"; Brier score {view.realised['brier']:.3f}, {view.realised['expected']['brier']:.3f} was expected"
    return Line("real", text, LOOK if view.realised["breach"] else PLAIN)


def _describe_labels(view: Overview) -> Line:
    known = view.labelled.value
    if known is None:
        return Line("outcomes", "no horizon has closed yet")
    text = f"known of {known:.0%} of the predictions whose horizon has closed"
    return Line("outcomes", text, GOOD if known >= LABELLED_MIN else LOOK)


def _describe_features(view: Overview) -> Line:
    if view.features_as_of is None:
        return Line("features", "none were looked up yet")
    return Line("features", f"of {view.features_as_of:%F}, the data's clock says {view.as_of:%F}")


def _describe_retrainings(view: Overview) -> Line:
    last = view.retraining
    counts = ", ".join(f"{count} {state}" for state, count in view.retrainings.items() if count)
    if last is None:
        return Line("retrainings", "none yet")
    text = f"{counts}; the last {last.state} {_last(view, last.updated_at)} ago: {last.reason}"
    detail = f"\n  {last.detail}" if last.detail else ""
    return Line("retrainings", f"{text}{detail}", STYLE_OF_STATE.get(last.state, PLAIN))


def _last(view: Overview, moment: dt.datetime) -> str:
    """How long ago, in the largest unit of which there are at least two."""
    minutes = max(int((view.now - moment).total_seconds() // 60), 0)
    size, unit = next(
        found for found in ((1440, "days"), (60, "hours"), (1, "minutes"), (0, "")) if minutes >= 2 * found[0]
    )
    return f"{minutes // size} {unit}" if size else "a minute"
