"""The monitor's evidence: what a window of scored rows, and what outcomes say of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd

from closedloop.core.monitoring.drift import Sketch, compare, find_beyond_limits, find_drifted, sketch
from closedloop.core.monitoring.gain import estimate_gain, score_calibration
from closedloop.core.monitoring.performance import Calibration, Expected, calibrate, expect, fall, realise
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.records import LABEL_RULE

SCORE = "score"


class Baseline(NamedTuple):
    """The baseline of a window: the reference rows, sketched and calibrated, and the decision threshold."""

    frame: pd.DataFrame
    sketches: Mapping[str, Sketch]
    calibration: Calibration
    expected: Expected
    threshold: float


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


def measure_window(baseline: Baseline, window: pd.DataFrame, policy: MonitoringPolicy) -> dict[str, Any]:
    """The evidence of a window's scored rows without labels: ``drift`` and ``estimate``, as JSON-able evidence.

    Half of the false-alarm rate is drift's, a quarter the estimate's; `measure_outcomes` has the last quarter. No
    client that has less than half of the rows makes a breach, or hides one: its rows are left out (``without``).

    Parameters
    ----------
    window : DataFrame
        The features, ``score``, ``customer_id`` and ``client``; one row a customer.
    """
    if len(window) < policy.window_rows_min:
        return {}
    measures = {"drift": _measure_drift, "estimate": _measure_fall}
    return {
        name: _measure_for_all(partial(measure, baseline, policy), window, "client")
        for name, measure in measures.items()
    }


def _measure_for_all(
    measure: Callable[[pd.DataFrame], dict[str, Any]], rows: pd.DataFrame, column: str
) -> dict[str, Any]:
    """The figures; ``without`` the client, a minority, whose rows alone would make a breach or hide one.

    A breach must be one whoever is left out.
    """
    found = measure(rows)
    parts = [{**measure(rest), "without": client} for client, rest in _leave_out(rows, column)]
    decisive = next((part for part in parts if not part["breach"]), parts[0] if parts else found)
    return found if decisive["breach"] == found["breach"] else decisive


def _measure_drift(baseline: Baseline, policy: MonitoringPolicy, window: pd.DataFrame) -> dict[str, Any]:
    shifts = {name: compare(found, found.count(window[name])) for name, found in baseline.sketches.items()}
    drifted = find_drifted(shifts, false_alarm_rate=policy.false_alarm_rate / 2, effect_min=policy.effect_min)
    beyond = find_beyond_limits(
        baseline.frame,
        window,
        [name for name in drifted if name != SCORE],
        drifted_share_max=policy.drifted_share_max,
        missing_share_max=policy.missing_share_max,
        mean_sigmas_max=policy.mean_sigmas_max,
    )
    calibrated, fixed = policy.limits != "fixed", policy.limits != "calibrated"
    return {
        "breach": bool((calibrated and drifted) or (fixed and beyond)),
        "drifted": drifted,
        "beyond_limits": beyond,
        "features": {name: _round(shift) for name, shift in shifts.items()},
    }


def _measure_fall(baseline: Baseline, policy: MonitoringPolicy, window: pd.DataFrame) -> dict[str, Any]:
    from scipy.stats import norm

    expected = expect(window[SCORE], baseline.calibration, baseline.threshold)
    drop, drop_z = fall(baseline.expected, expected)
    falls = drop >= policy.estimate_drop_min and drop_z >= norm.isf(policy.false_alarm_rate / 4)
    return {
        **_round(expected),
        "breach": bool(falls),
        "drop": round(drop, 6),
        "drop_z": round(drop_z, 3),
        "reference": _round(baseline.expected),
    }


def measure_outcomes(baseline: Baseline, closed: pd.DataFrame, policy: MonitoringPolicy) -> dict[str, Any]:
    """The evidence of outcomes: ``realised``, JSON-able, with the figures that the same rows' scores promised.

    It is a breach if a recalibration would win back log loss, by more than chance and by ``gain_min`` at least.

    No client that reported less than half of them makes a breach, or hides one: a small share of false outcomes
    retrains nothing (``without``).

    Parameters
    ----------
    closed : DataFrame
        ``customer_id``, ``score``, ``outcome`` (0 or 1) and ``reported_by``; one row a customer, snapshot and version,
        but for rows that stand for others (``repeats`` and ``is_repeat``, see `closedloop.core.actions.untreated`).
    """
    if len(closed) < policy.outcome_rows_min:
        return {}
    return {"realised": _measure_for_all(partial(_measure_outcomes, baseline, policy), closed, "reported_by")}


def _measure_outcomes(baseline: Baseline, policy: MonitoringPolicy, closed: pd.DataFrame) -> dict[str, Any]:
    from scipy.stats import norm

    found = realise(closed["outcome"], closed[SCORE], baseline.threshold)
    views = _list_views(closed)
    gains = [estimate_gain(some["outcome"], some[SCORE], some["customer_id"]) for some in views]
    # two tests share a quarter of the false-alarm rate; what is asked beside campaigns shares the half of the first
    bound = float(norm.isf(policy.false_alarm_rate / (8 if len(views) == 1 else 32)))
    low, gain = max((one.mean - bound * one.error, one) for one in gains)
    if len(views) > 1 and score_calibration(closed["outcome"], closed[SCORE], closed["customer_id"]) >= bound:
        low, gain = max((low, gain), (gains[0].mean - gains[0].error, gains[0]))
    reasons = []
    if low >= policy.gain_min:
        reasons.append(
            f"a recalibration would win back {gain.mean:.4f} of log loss, at least {low:.4f}: Brier score "
            f"{found.brier:.3f} where {found.expected.brier:.3f} was expected, churn rate {found.churn_rate:.3f} where "
            f"{found.expected.churn_rate:.3f} was"
        )
    floor = policy.accuracy_threshold
    # Kish (1965): so many rows that each count once are as certain
    rows = found.rows**2 / closed["repeats"].sum() if "repeats" in closed else found.rows
    if floor is not None and found.accuracy < floor - bound * (floor * (1 - floor) / rows) ** 0.5:
        reasons.append(f"accuracy {found.accuracy:.3f} is below accuracy_threshold {floor:g}")
    return {
        **_round(found),
        "expected": _round(found.expected),
        "gain": {**_round(gain), "low": round(low, 6)},
        "breach": bool(reasons),
        "reasons": reasons,
    }


def _list_views(closed: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows as they stand for all customers and, where some stand for others, each once.

    A model that is right about each customer is right in both views. In the first a change weighs as in the whole, but
    the gain of few rows that count often is uncertain: there a significant miscalibration needs a gain that is beyond
    one standard error. In the second a change among the other customers stands out.
    """
    if "is_repeat" not in closed or not closed["is_repeat"].any():
        return [closed]
    return [closed, closed[~closed["is_repeat"]]]


def _leave_out(rows: pd.DataFrame, column: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows without each client that has less than half of them; without tokens clients cannot be told apart."""
    if column not in rows:
        return
    for client, count in rows[column].value_counts().items():
        if client != LABEL_RULE and count < len(rows) / 2:
            yield str(client), rows[rows[column] != client]


def _round(figures: Any) -> dict[str, Any]:
    """The fields, numbers to what may be read of them."""
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in figures._asdict().items()}
