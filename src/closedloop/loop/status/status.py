"""The status screen: one line for each part of the loop."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any, NamedTuple

from closedloop.errors import count_noun
from closedloop.loop.status.next_step import (
    CHECK_AGE_MAX,
    LABELLED_MIN,
    Surroundings,
    describe_foreign,
    is_champion,
    is_foreign,
)
from closedloop.loop.status.overview import Overview

GOOD, LOOK, BAD, PLAIN = "green", "yellow", "bold red", ""
STYLE_OF_VERDICT = {"none": GOOD, "watch": LOOK, "alert": BAD, "retrain": BAD, "cannot tell": LOOK}
STYLE_OF_STATE = {"failed": BAD, "refused": LOOK}


class Line(NamedTuple):
    """One line of the screen: label, text and colour."""

    name: str
    text: str
    style: str = PLAIN


def describe(view: Overview, around: Surroundings) -> list[Line]:
    """The lines of the screen, from top to bottom."""
    return [
        _describe_champion(view),
        _describe_health(view, around),
        _describe_release(view),
        _describe_check(view, around),
        _describe_drift(view),
        _describe_estimate(view),
        _describe_realised(view),
        *_describe_money(view),
        _describe_labels(view),
        _describe_features(view),
        _describe_retrainings(view),
    ]


def _describe_champion(view: Overview) -> Line:
    if view.row is None:
        return Line("serves", "nothing was released yet", BAD)
    since = view.serves_since or view.row.updated_at
    return Line(
        "serves", f"version {view.row.champion_version} for {_age(view, since)} (since {since:%F %H:%M} UTC)", "bold"
    )


def _describe_health(view: Overview, around: Surroundings) -> Line:
    found = around.service
    if found is None and "serve" in around.missing:
        return Line("health", f"no service: closedloop[{around.missing['serve']}] is not installed")
    if found is None:
        return Line("health", f"no answer from {around.address}", BAD)
    if is_foreign(view, found):
        return Line("health", f"{around.address} answers, but it is {describe_foreign(found)}", BAD)
    version = f"with version {found.model_version}" if found.model_version else "and has no model yet"
    text = f"{around.address} answers {version}"
    if view.row is None:
        other = f", but no version of {view.model_name} was released here" if found.model_version else ""
        return Line("health", text + other, BAD)
    if not is_champion(view.row, found):
        same = found.model_version == view.row.champion_version
        return Line("health", text + (" of another store: its digest is not the released one's" if same else ""), BAD)
    return Line("health", text, GOOD)


def _describe_release(view: Overview) -> Line:
    if view.rollout is None or view.row is None:
        return Line("release", f"version {view.waiting} waits for one" if view.waiting else "none in progress")
    share = f"{view.row.weight:.0%} of the answers" if view.row.weight else "no answers, it scores in shadow"
    if view.rollout.step == "champion":
        share = f"version {view.rollout.predecessor} scores in shadow, outcomes go on testing"
    text = f"version {view.rollout.version} in {view.rollout.step} for {_age(view, view.rollout.step_at)}: {share}"
    return Line("release", text, LOOK)


def _describe_check(view: Overview, around: Surroundings) -> Line:
    check = view.check
    if check is None:
        return Line("last check", "none yet", LOOK)
    about = f"version {check.model_version} as of {check.as_of:%F}, {count_noun(check.predictions, 'prediction')}"
    reasons = "".join(f"\n  {reason}" for reason in check.evidence.get("reasons", ()))
    text = f"{check.verdict}, {_date(view, check.recorded_at)}: {about}{reasons}"
    late = around.is_live and view.now - check.recorded_at > CHECK_AGE_MAX
    return Line("last check", text, BAD if late else STYLE_OF_VERDICT[check.verdict])


def _describe_drift(view: Overview) -> Line:
    if not view.drift:
        return Line("drift", "not measured yet")
    features, drifted = view.drift["features"], view.drift["drifted"]
    named = ", ".join(f"{name} {features[name]['effect']:.2f}" for name in drifted[:5])
    text = f"{len(drifted)} of {count_noun(len(features), 'distribution')}{': ' if named else ''}{named}"
    return Line("drift", f"{text} ..." if len(drifted) > 5 else text, LOOK if drifted else GOOD)


def _describe_estimate(view: Overview) -> Line:
    if not view.estimate:
        return Line("estimated", "not measured yet")
    reference = view.estimate["reference"]["accuracy"]
    text = f"accuracy {view.estimate['accuracy']:.1%}, {reference:.1%} on the reference rows"
    return Line("estimated", text, LOOK if view.estimate["breach"] else GOOD)


def _describe_realised(view: Overview) -> Line:
    if view.accuracy.value is None:
        return Line("real", "no outcome is known yet")
    text = f"accuracy {view.accuracy.value:.1%} of the last {count_noun(view.accuracy.whole, 'outcome')}"
    if not view.realised:
        return Line("real", text)
    text += f"; Brier score {view.realised['brier']:.3f}, {view.realised['expected']['brier']:.3f} was expected"
    return Line("real", text, LOOK if view.realised["breach"] else PLAIN)


def _describe_money(view: Overview) -> list[Line]:
    return [Line("money", describe_money(view.money))] if view.money else []


def describe_money(money: Mapping[str, Any]) -> str:
    """The money at stake in the newest window, in a sentence.

    >>> describe_money({"customers": 2000, "at_stake": 60000.0, "offers": 1, "expected_profit": 5.4})
    '60,000 is at stake with 2,000 customers; 1 offer would bring about 5'
    """
    customers, offers = count_noun(money["customers"], "customer"), count_noun(money["offers"], "offer")
    stake = f"{money['at_stake']:,.0f} is at stake with {customers}"
    return f"{stake}; {offers} would bring about {money['expected_profit']:,.0f}"


def _describe_labels(view: Overview) -> Line:
    known = view.labelled.value
    if known is None:
        return Line("outcomes", "no prediction yet" if view.horizon_days is None else "no horizon has closed yet")
    which = "" if view.horizon_days is None else " whose horizon has closed"
    text = f"known of {known:.0%} of the predictions{which}"
    return Line("outcomes", text, GOOD if known >= LABELLED_MIN else LOOK)


def _describe_features(view: Overview) -> Line:
    if view.features_as_of is None:
        newest = "yet" if view.predicted_at is None else "for the newest predictions, which came with theirs"
        return Line("features", f"none were looked up {newest}")
    return Line("features", f"of {view.features_as_of:%F}, the data's clock says {view.as_of:%F}")


def _describe_retrainings(view: Overview) -> Line:
    last = view.retraining
    counts = ", ".join(f"{count} {state}" for state, count in view.retrainings.items() if count)
    if last is None:
        return Line("retrainings", "none yet")
    text = f"{counts}; the last {last.state} {_date(view, last.updated_at)}: {last.reason}"
    detail = f"\n  {last.detail}" if last.detail else ""
    return Line("retrainings", f"{text}{detail}", STYLE_OF_STATE.get(last.state, PLAIN))


def _date(view: Overview, moment: dt.datetime) -> str:
    """How long ago, or the day, if the record is of another clock than ours."""
    return f"on {moment:%F}" if moment - view.now > dt.timedelta(hours=1) else f"{_age(view, moment)} ago"


def _age(view: Overview, moment: dt.datetime) -> str:
    """The time since ``moment``, in the largest unit of which there are at least two."""
    minutes = max(int((view.now - moment).total_seconds() // 60), 0)
    size, unit = next(
        found for found in ((1440, "days"), (60, "hours"), (1, "minutes"), (0, "")) if minutes >= 2 * found[0]
    )
    return f"{minutes // size} {unit}" if size else "a minute"
