"""The monitor's evidence and its verdict: pure functions of rows, of what earlier checks recorded, and of a policy."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pandas as pd

from closedloop.core.drift import Sketch, compare, find_beyond_limits, find_drifted, sketch
from closedloop.core.performance import Calibration, Expected, calibrate, expect, fall, realise

Verdict = Literal["none", "watch", "alert", "retrain"]
SCORE = "score"


@dataclass(frozen=True)
class AlarmLimits:
    """When a figure is an alarm; the settings section ``monitoring`` says what each means."""

    false_alarm_rate: float = 0.01
    effect_min: float = 0.1
    limits: Literal["calibrated", "fixed", "both"] = "calibrated"
    drifted_share_max: float = 0.3
    missing_share_max: float = 0.05
    mean_sigmas_max: float = 3.0
    estimate_drop_min: float = 0.02
    loss_excess_min: float = 0.01
    churn_gap_min: float = 0.03
    accuracy_threshold: float | None = None
    window_rows_min: int = 500
    outcome_rows_min: int = 500


@dataclass(frozen=True)
class Policy:
    """When breaches retrain; the settings section ``monitoring`` says what each means."""

    breaches: int = 3
    of_checks: int = 3
    outcome_breaches: int = 1
    outcome_of_checks: int = 1
    model_age_days_max: int | None = 365
    cooldown_days: int = 14
    retrainings_per_month: int = 2


class Baseline(NamedTuple):
    """What a window is compared with: the reference rows, sketched and calibrated, and the decision threshold."""

    frame: pd.DataFrame
    sketches: Mapping[str, Sketch]
    calibration: Calibration
    expected: Expected
    threshold: float


class PastCheck(NamedTuple):
    """An earlier check of the same version: its window's start, and its recorded evidence."""

    since: dt.datetime
    evidence: Mapping[str, Any]


class PastRetraining(NamedTuple):
    """An earlier retraining of the model: the clock of its request, and its state."""

    as_of: dt.datetime
    state: str


class Decision(NamedTuple):
    """The verdict and what speaks for it, the weightiest first."""

    verdict: Verdict
    reasons: tuple[str, ...]


def build_baseline(
    reference: pd.DataFrame, categories: Mapping[str, Sequence[str] | None], threshold: float
) -> Baseline:
    """Sketch the reference rows of a model.

    Parameters
    ----------
    reference : DataFrame
        The features, ``score`` and ``churned``.
    categories : mapping
        Every feature, with its categories if it is categorical, else None.
    """
    sketches = {name: sketch(reference[name], known) for name, known in categories.items()}
    sketches[SCORE] = sketch(reference[SCORE])
    calibration = calibrate(reference[SCORE], reference["churned"])
    expected = expect(reference[SCORE], calibration, threshold)
    return Baseline(reference[list(categories)], sketches, calibration, expected, threshold)


def measure_window(baseline: Baseline, window: pd.DataFrame, limits: AlarmLimits) -> dict[str, Any]:
    """What the scored rows of a window say without labels: ``drift`` and ``estimate``, as JSON-able evidence.

    Half of the false-alarm rate is drift's, a quarter the estimate's; `measure_outcomes` has the last quarter.

    Parameters
    ----------
    window : DataFrame
        The features, ``score`` and ``customer_id``; one row a customer.
    """
    from scipy.stats import norm

    if len(window) < limits.window_rows_min:
        return {}
    shifts = {name: compare(found, found.count(window[name])) for name, found in baseline.sketches.items()}
    rate = limits.false_alarm_rate
    drifted = find_drifted(shifts, false_alarm_rate=rate / 2, effect_min=limits.effect_min)
    beyond = find_beyond_limits(
        baseline.frame,
        window,
        [name for name in drifted if name != SCORE],
        drifted_share_max=limits.drifted_share_max,
        missing_share_max=limits.missing_share_max,
        mean_sigmas_max=limits.mean_sigmas_max,
    )
    calibrated, fixed = limits.limits != "fixed", limits.limits != "calibrated"
    expected = expect(window[SCORE], baseline.calibration, baseline.threshold)
    drop, drop_z = fall(baseline.expected, expected)
    falls = drop >= limits.estimate_drop_min and drop_z >= norm.isf(rate / 4)
    return {
        "drift": {
            "breach": bool((calibrated and drifted) or (fixed and beyond)),
            "drifted": drifted,
            "beyond_limits": beyond,
            "features": {name: _round(shift) for name, shift in shifts.items()},
        },
        "estimate": {
            **_round(expected),
            "breach": bool(falls),
            "drop": round(drop, 6),
            "drop_z": round(drop_z, 3),
            "reference": _round(baseline.expected),
        },
    }


def measure_outcomes(baseline: Baseline, closed: pd.DataFrame, limits: AlarmLimits) -> dict[str, Any]:
    """What outcomes say: ``realised``, as JSON-able evidence, with the figures that were expected of the same rows.

    Parameters
    ----------
    closed : DataFrame
        ``score`` and ``outcome`` (0 or 1); one row a customer, snapshot and version.
    """
    from scipy.stats import norm

    if len(closed) < limits.outcome_rows_min:
        return {}
    found = realise(closed["outcome"], closed[SCORE], baseline.calibration, baseline.threshold)
    bound, reasons = norm.isf(limits.false_alarm_rate / 12), []  # three tests share a quarter of the rate
    if found.loss_excess >= limits.loss_excess_min and found.loss_excess_z >= bound:
        reasons.append(f"Brier score {found.brier:.3f} where {found.expected.brier:.3f} was expected")
    two_sided = norm.isf(limits.false_alarm_rate / 24)
    if abs(found.churn_gap) >= limits.churn_gap_min and abs(found.churn_gap_z) >= two_sided:
        reasons.append(f"churn rate {found.churn_rate:.3f} where {found.expected.churn_rate:.3f} was expected")
    floor = limits.accuracy_threshold
    if floor is not None:
        error = (floor * (1 - floor) / found.rows) ** 0.5
        if found.accuracy < floor - bound * error:
            reasons.append(f"accuracy {found.accuracy:.3f} is below accuracy_threshold {floor:g}")
    figures = {**_round(found), "expected": _round(found.expected)}
    return {"realised": {**figures, "breach": bool(reasons), "reasons": reasons}}


def decide(
    evidence: Mapping[str, Any],
    previous: Sequence[PastCheck],
    retrainings: Sequence[PastRetraining],
    policy: Policy,
    *,
    as_of: dt.datetime,
    since: dt.datetime,
    model_as_of: dt.datetime,
) -> Decision:
    """Judge a check by its evidence and that of the checks before.

    While the outcomes of the drifted rows are open, drift retrains after ``breaches`` in the last ``of_checks``
    checks and in the newest, with the estimated performance falling too; a fall alone alerts. Once they are closed,
    realised loss and calibration decide, and drift that did no harm is only watched. A retraining that is due waits,
    as an alert, while another is open, in its cooldown, beyond the month's budget or backing off.

    Parameters
    ----------
    evidence
        ``drift``, ``estimate`` and ``realised``, as far as they could be measured.
    previous
        Checks of the same version, the newest first.
    retrainings
        Of the model, the newest first.
    since
        Start of this check's window.
    model_as_of
        The clock by which the model was trained.
    """
    checks = [PastCheck(since, evidence), *previous]
    due, reasons = _find_due(checks, policy)
    age_days = (as_of - model_as_of).days
    if policy.model_age_days_max is not None and age_days > policy.model_age_days_max:
        due.append(f"the model is {age_days} days old, at most {policy.model_age_days_max} are allowed")
    if due:
        if waits := _find_waits(retrainings, policy, as_of):
            return Decision("alert", (*due, f"a retraining is due, but {waits}"))
        return Decision("retrain", tuple(due))
    if _breaches(evidence, "realised") or _breaches(evidence, "estimate"):
        return Decision("alert", tuple(reasons))
    if _breaches(evidence, "drift"):
        return Decision("watch", tuple(reasons))
    return Decision("none", tuple(reasons))


def _find_due(checks: Sequence[PastCheck], policy: Policy) -> tuple[list[str], list[str]]:
    """Reasons to retrain, and what else there is to say."""
    due: list[str] = []
    reasons: list[str] = []
    newest = checks[0].evidence
    closed = [check for check in checks if "realised" in check.evidence]
    judged = [check for check in checks if "drift" in check.evidence]
    if _breaches(newest, "realised"):
        said = "; ".join(newest["realised"]["reasons"])
        late = sum(_breaches(check.evidence, "realised") for check in closed[: policy.outcome_of_checks])
        (due if late >= policy.outcome_breaches else reasons).append(f"outcomes: {said}")
    if _breaches(newest, "drift"):
        harmless = closed and _covers(closed[0], judged) and not _breaches(closed[0].evidence, "realised")
        drifting = [_breaches(check.evidence, "drift") for check in judged[: policy.of_checks]]
        said = f"drift in {sum(drifting)} of the last {len(drifting)} checks: {_describe_drift(newest['drift'])}"
        if harmless:
            reasons.append(f"{said}; outcomes show no harm")
        elif sum(drifting) >= policy.breaches and _breaches(newest, "estimate"):
            due.append(f"{said}; {_describe_fall(newest['estimate'])}")
        else:
            reasons.append(said)
    if _breaches(newest, "estimate"):
        reasons.append(_describe_fall(newest["estimate"]))
    return due, reasons


def _covers(closed: PastCheck, judged: Sequence[PastCheck]) -> bool:
    """Whether the outcomes of this check are of rows from within the unbroken run of drift that goes on now."""
    first = judged[0].since
    for check in judged:
        if not _breaches(check.evidence, "drift"):
            break
        first = check.since
    return bool(dt.datetime.fromisoformat(closed.evidence["outcomes_until"]) > first)


def _find_waits(retrainings: Sequence[PastRetraining], policy: Policy, as_of: dt.datetime) -> str | None:
    """Why a retraining must not start now."""
    if any(past.state in ("requested", "running") for past in retrainings):
        return "one is open"
    month = [past for past in retrainings if as_of - past.as_of < dt.timedelta(days=30)]
    if len(month) >= policy.retrainings_per_month:
        return f"{len(month)} were asked for in the last 30 days (retrainings_per_month)"
    if not retrainings:
        return None
    refused = next((place for place, past in enumerate(retrainings) if past.state != "refused"), len(retrainings))
    wait_days = policy.cooldown_days * 2 ** min(refused, 10)
    passed_days = (as_of - retrainings[0].as_of).days
    if passed_days < wait_days:
        why = f"{refused} challengers in a row were refused" if refused else "cooldown_days"
        return f"the last was {passed_days} days ago, {wait_days} must pass ({why})"
    return None


def _breaches(evidence: Mapping[str, Any], part: str) -> bool:
    return bool(evidence.get(part, {}).get("breach", False))


def _describe_drift(drift: Mapping[str, Any]) -> str:
    named = [f"{name} ({drift['features'][name]['effect']:.2f})" for name in drift["drifted"][:3]]
    more = [f"{len(drift['drifted']) - 3} more"] if len(drift["drifted"]) > 3 else []
    return ", ".join([*named, *more] or drift["beyond_limits"])


def _describe_fall(estimate: Mapping[str, Any]) -> str:
    return f"estimated accuracy {estimate['accuracy']:.3f}, {estimate['drop']:.3f} below the reference's"


def _round(figures: Any) -> dict[str, Any]:
    """The fields, numbers to what may be read of them."""
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in figures._asdict().items()}
