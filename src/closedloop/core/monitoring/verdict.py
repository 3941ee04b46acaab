"""The monitor's verdict: a pure function of evidence, of what earlier checks recorded, and of a policy."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.errors import count_noun

Verdict = Literal["none", "watch", "alert", "retrain", "cannot tell"]
PARTS = ("realised", "drift", "estimate")
FOLLOW_UPS_LOST_MAX = 2
HORIZON_DAYS = 30  # where outcomes have none
BLIND_HORIZONS = 2


class PastCheck(NamedTuple):
    """An earlier check of the same version: its window's start, and its recorded evidence."""

    since: dt.datetime
    evidence: Mapping[str, Any]


class PastRetraining(NamedTuple):
    """An earlier retraining of the model: the clock of its request, and its state.

    ``won``: its version is champion, was, or is on its way; ``gain`` is the log loss that a recalibration would have
    won back when it was asked for, where outcomes said it. ``recalibrated``: it is the champion of then, recalibrated.
    ``monitored``: the monitor asked for it, not a person.
    """

    as_of: dt.datetime
    state: str
    won: bool = True
    gain: float | None = None
    recalibrated: bool = False
    monitored: bool = True


class Decision(NamedTuple):
    """The verdict and what speaks for it, the weightiest first."""

    verdict: Verdict
    reasons: tuple[str, ...]


def decide(
    evidence: Mapping[str, Any],
    previous: Sequence[PastCheck],
    retrainings: Sequence[PastRetraining],
    policy: MonitoringPolicy,
    *,
    as_of: dt.datetime,
    since: dt.datetime,
    model_as_of: dt.datetime,
    horizon_days: int | None = None,
) -> Decision:
    """Judge a check by its evidence and that of the checks before.

    So does the policy ``own``; another one (`MonitoringPolicy`) heeds less of the evidence, and the rest still alerts.
    Drift retrains after ``breaches`` in the last ``of_checks`` checks and in the newest, with the estimated performance
    falling too, but not while all outcomes of the drifted rows are open: such a training would learn nothing of the
    drift, and delay the one that does. A fall alone alerts. Once outcomes of these rows are judged, realised loss and
    calibration decide, and drift that did no harm is only watched. After a challenger that won, the next one is tried,
    until two in a row do not win. A retraining that is due waits, as an alert, while another is open, in its cooldown,
    beyond the month's budget or backing off, never longer than a horizon. Without any of this a check `cannot tell`
    once the checks had too little to judge for two horizons, or where all that is known are outcomes of a campaign
    without a hold-out (``actions``).

    Parameters
    ----------
    evidence
        ``drift``, ``estimate`` and ``realised``, as far as they could be measured: what `evidence.measure_window` and
        `evidence.measure_outcomes` return. ``outcomes_until`` (ISO 8601) is the newest snapshot whose outcomes are
        part of ``realised``; without it no outcomes say that drift did no harm. ``judged_at`` is what `find_judged_at`
        returns; without it the verdict is never `cannot tell`.
    previous
        Checks of the same version, the newest first.
    retrainings
        Of the model, the newest first.
    since
        Start of this check's window.
    model_as_of
        The clock by which the model was trained.
    horizon_days
        Of the outcomes; None: they have none.

    Examples
    --------
    Drift that is known to one check only is watched:

    >>> drift = {"breach": True, "drifted": ["fee"], "features": {"fee": {"effect": 0.4}}, "beyond_limits": []}
    >>> noon = dt.datetime(2024, 6, 1, tzinfo=dt.UTC)
    >>> decide({"drift": drift}, [], [], MonitoringPolicy(), as_of=noon, since=noon, model_as_of=noon)
    Decision(verdict='watch', reasons=('drift in the newest check: fee (0.40)',))
    """
    checks = [PastCheck(since, evidence), *previous]
    due, reasons = _find_due(checks, policy, None if horizon_days is None else as_of - dt.timedelta(days=horizon_days))
    age_days = (as_of - model_as_of).days
    if policy.policy == "own" and policy.model_age_days_max is not None and age_days > policy.model_age_days_max:
        due.append(f"the model is {count_noun(age_days, 'day')} old, at most {policy.model_age_days_max} are allowed")
    passed_days = (as_of - max([model_as_of, *(past.as_of for past in retrainings)])).days
    if policy.calendar_days is not None and passed_days >= policy.calendar_days:
        due.append(f"{count_noun(passed_days, 'day')} have passed since the last training (policy {policy.policy})")
    if due:
        if waits := _find_waits(evidence, retrainings, policy, as_of, horizon_days):
            return Decision("alert", (*due, f"a retraining is due, but {waits}"))
        return Decision("retrain", tuple(due))
    said = _find_follow_up(retrainings) if policy.policy == "own" else None
    if said and not _find_waits(evidence, retrainings, policy, as_of, horizon_days):
        return Decision("retrain", (said, *reasons))
    if _breaches(evidence, "realised") or _breaches(evidence, "estimate"):
        return Decision("alert", tuple(reasons))
    if _breaches(evidence, "drift"):
        return Decision("watch", tuple(reasons))
    if said := _find_campaign(evidence) or _find_blindness(evidence, policy, as_of, horizon_days):
        return Decision("cannot tell", (said, *reasons))
    return Decision("none", tuple(reasons))


def find_judged_at(
    evidence: Mapping[str, Any], before: Sequence[Mapping[str, Any]], *, as_of: dt.datetime, horizon_days: int | None
) -> dt.datetime:
    """The moment of the last check that had enough to judge a version by; its first check counts as one.

    A model with a horizon is judged by its outcomes, since without them no method sees that a score means something
    else than before; a model whose outcomes nothing promises is judged by its predictions as well.

    Parameters
    ----------
    before
        The evidence of earlier checks, the newest first, with their ``judged_at``.
    """
    enough = "realised" in evidence or (horizon_days is None and "drift" in evidence)
    if enough or not before or "judged_at" not in before[0]:
        return as_of
    return dt.datetime.fromisoformat(before[0]["judged_at"])


def _find_campaign(evidence: Mapping[str, Any]) -> str | None:
    """Why a campaign without a hold-out leaves nothing to judge the outcomes by."""
    if "realised" in evidence or not evidence.get("actions", {}).get("blinded"):
        return None
    return "nobody was held out of a campaign: outcomes cannot be told apart from what it did"


def _find_blindness(
    evidence: Mapping[str, Any], policy: MonitoringPolicy, as_of: dt.datetime, horizon_days: int | None
) -> str | None:
    """Why the model cannot be judged, and for how long; a horizon may be shorter than a window, which is gathered."""
    judged_at = evidence.get("judged_at")
    blind_days = (as_of - dt.datetime.fromisoformat(judged_at)).days if judged_at else 0
    if blind_days < max(BLIND_HORIZONS * (horizon_days or HORIZON_DAYS), policy.window_days_max):
        return None
    few = "; ".join(describe_few(evidence, policy))
    return f"for {count_noun(blind_days, 'day')} there was too little to judge the model by: {few}"


def describe_few(evidence: Mapping[str, Any], policy: MonitoringPolicy) -> list[str]:
    """How many customers and outcomes there are where they are too few to judge, and how many are needed."""
    few = []
    if "drift" not in evidence:
        asked = count_noun(evidence.get("window_rows", 0), "customer")
        few.append(f"{asked} since the last window, {policy.window_rows_min} are needed")
    if "realised" not in evidence:
        known = count_noun(evidence.get("outcome_rows", 0), "outcome")
        few.append(f"{known}, {policy.outcome_rows_min} are needed")
    return few


def _find_follow_up(retrainings: Sequence[PastRetraining]) -> str | None:
    """Why the next retraining is due after a trained challenger that won; None once `FOLLOW_UPS_LOST_MAX` did not.

    The first challenger after a change has seen little of it, since outcomes close a horizon late. What it does not
    know shows neither in its calibration nor in the drift of its scores: the next challenger does.
    """
    ended = [past for past in retrainings if past.state != "failed"]
    lost = _count_lost(retrainings)
    if lost >= min(FOLLOW_UPS_LOST_MAX, len(ended)) or ended[lost].recalibrated or not ended[lost].monitored:
        return None
    return f"the challenger of {ended[lost].as_of:%Y-%m-%d} won: what changed may not be learnt to its end"


def _find_due(
    checks: Sequence[PastCheck], policy: MonitoringPolicy, closed_until: dt.datetime | None
) -> tuple[list[str], list[str]]:
    """Reasons to retrain, and what else there is to say; ``closed_until`` is the newest snapshot with outcomes."""
    due: list[str] = []
    reasons: list[str] = []
    newest = checks[0].evidence
    closed = [check for check in checks if "realised" in check.evidence]
    judged = [check for check in checks if "drift" in check.evidence]
    if _breaches(newest, "realised"):
        said = "; ".join(newest["realised"]["reasons"])
        late = sum(_breaches(check.evidence, "realised") for check in closed[: policy.outcome_of_checks])
        is_due = policy.heeds("outcomes") and late >= policy.outcome_breaches
        (due if is_due else reasons).append(f"outcomes: {said}")
    if _breaches(newest, "drift"):
        is_due = policy.heeds("drift") and (policy.policy == "drift" or _breaches(newest, "estimate"))
        harmless = closed and _covers(closed[0], judged) and not _shows_harm(closed[0].evidence["realised"], policy)
        drifting = [_breaches(check.evidence, "drift") for check in judged[: policy.of_checks]]
        count = count_noun(len(drifting), "check")
        share = f"{sum(drifting)} of the last {count}" if len(drifting) > 1 else "the newest check"
        said = f"drift in {share}: {_describe_drift(newest['drift'])}"
        # where outcomes never come, a check in between that shows no drift must not make it wait for ever
        start = _find_drift_start(judged, gap_max=0 if closed else policy.of_checks - policy.breaches)
        is_open = closed_until is not None and closed_until < start and policy.policy != "drift"
        if harmless and policy.policy != "drift":
            reasons.append(f"{said}; {_describe_harmless(closed[0].evidence['realised'], newest, policy)}")
        elif is_due and is_open:
            reasons.append(f"{said}; no outcome of the drifted rows is known yet: no training would learn of it")
        elif is_due and sum(drifting) >= policy.breaches:
            fall = f"; {_describe_fall(newest['estimate'])}" if _breaches(newest, "estimate") else ""
            due.append(f"{said}{fall}")
        else:
            reasons.append(said)
    if _breaches(newest, "estimate"):
        reasons.append(_describe_fall(newest["estimate"]))
    left_out = {name: newest[name]["without"] for name in PARTS if "without" in newest.get(name, {})}
    reasons += [f"{name}: without client {client}, which has less than half" for name, client in left_out.items()]
    return due, reasons


def _covers(closed: PastCheck, judged: Sequence[PastCheck]) -> bool:
    """Whether the outcomes of this check are of rows from within the unbroken run of drift that goes on now."""
    until = closed.evidence.get("outcomes_until")
    return until is not None and dt.datetime.fromisoformat(until) > _find_drift_start(judged)


def _find_drift_start(judged: Sequence[PastCheck], *, gap_max: int = 0) -> dt.datetime:
    """Since when drift has gone on, with at most so many checks in a row that show none."""
    first, gap = judged[0].since, 0
    for check in judged:
        if _breaches(check.evidence, "drift"):
            first, gap = check.since, 0
        else:
            gap += 1
        if gap > gap_max:
            break
    return first


def _find_waits(
    evidence: Mapping[str, Any],
    retrainings: Sequence[PastRetraining],
    policy: MonitoringPolicy,
    as_of: dt.datetime,
    horizon_days: int | None,
) -> str | None:
    """Why a retraining must not start now."""
    if any(past.state in ("requested", "running") for past in retrainings):
        return "one is open"
    month = [past for past in retrainings if as_of - past.as_of < dt.timedelta(days=30)]
    if len(month) >= policy.retrainings_per_month:
        return f"{len(month)} were asked for in the last 30 days (retrainings_per_month)"
    if not retrainings:
        return None
    lost = _count_lost(retrainings)
    most = max(policy.cooldown_days, horizon_days or HORIZON_DAYS)
    wait_days = policy.cooldown_days
    if lost and not _find_follow_up(retrainings) and not _gains_more(evidence, retrainings[0], policy):
        wait_days = min(policy.cooldown_days * 2 ** min(lost, 10), most)
    passed_days = (as_of - retrainings[0].as_of).days
    if passed_days < wait_days:
        why = (
            count_noun(lost, "challenger in a row did not win", "challengers in a row did not win")
            if wait_days > policy.cooldown_days
            else "cooldown_days"
        )
        return f"the last was {count_noun(passed_days, 'day')} ago, {wait_days} must pass ({why})"
    return None


def _count_lost(retrainings: Sequence[PastRetraining]) -> int:
    """Challengers in a row that did not become champion; one that failed made none."""
    ended = [past for past in retrainings if past.state != "failed"]
    return next((place for place, past in enumerate(ended) if past.state != "refused" and past.won), len(ended))


def _gains_more(evidence: Mapping[str, Any], last: PastRetraining, policy: MonitoringPolicy) -> bool:
    """Whether more is lost by now than when the last retraining was asked for."""
    gain = evidence.get("realised", {}).get("gain")
    return (
        gain is not None and last.gain is not None and gain["mean"] >= last.gain + max(policy.gain_min, gain["error"])
    )


def _shows_harm(realised: Mapping[str, Any], policy: MonitoringPolicy) -> bool:
    """Whether outcomes breach, or are worse than the scores promised by what the estimate would call a fall."""
    expected = realised.get("expected")
    fell = expected is not None and expected["accuracy"] - realised["accuracy"] >= policy.estimate_drop_min
    return bool(realised["breach"]) or fell


def _describe_harmless(realised: Mapping[str, Any], newest: Mapping[str, Any], policy: MonitoringPolicy) -> str:
    """Describe outcomes that keep the promise of the scores; their accuracy may be below the reference's."""
    reference, real = newest.get("estimate", {}).get("reference", {}).get("accuracy"), realised.get("accuracy")
    if reference is None or real is None or reference - real < policy.estimate_drop_min:
        return "outcomes show no harm"
    return f"outcomes are as the scores say: accuracy {real:.3f}, {reference - real:.3f} below the reference's"


def _breaches(evidence: Mapping[str, Any], part: str) -> bool:
    return bool(evidence.get(part, {}).get("breach", False))


def _describe_drift(drift: Mapping[str, Any]) -> str:
    named = [f"{name} ({drift['features'][name]['effect']:.2f})" for name in drift["drifted"][:3]]
    more = [f"{len(drift['drifted']) - 3} more"] if len(drift["drifted"]) > 3 else []
    return ", ".join([*named, *more] or drift["beyond_limits"])


def _describe_fall(estimate: Mapping[str, Any]) -> str:
    return f"estimated accuracy {estimate['accuracy']:.3f}, {estimate['drop']:.3f} below the reference's"
