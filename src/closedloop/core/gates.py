"""The model-quality gate: one function a rule, each a figure against a limit. A figure that is nan never passes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from closedloop.errors import GateFailed

if TYPE_CHECKING:
    import pandas as pd

    from closedloop.core.comparison import Comparison

Rule = Literal[">=", ">", "<=", "<"]
_RULES: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
_VERDICTS = {"lose": -1.0, "inconclusive": 0.0, "win": 1.0}


@dataclass(frozen=True)
class GateResult:
    """One figure against one limit; a result that is not ``blocking`` is reported but stops nothing."""

    name: str
    passed: bool
    figure: float
    limit: float
    rule: Rule
    detail: str
    blocking: bool = True

    def sentence(self) -> str:
        """What the operator reads.

        Examples
        --------
        >>> gate_accuracy(0.812, 0.85, where="column churned, test rows").sentence()
        'accuracy .812 must be >= .850 (column churned, test rows)'
        """
        figure, limit = _format_pair(self.figure, self.limit)
        return f"{self.name} {figure} must be {self.rule} {limit} ({self.detail})"


@dataclass(frozen=True)
class RecencyRule:
    """The simplest model one could ship: churn depends on the days since the last purchase alone."""

    threshold_days: float
    churns_above: bool

    def predict(self, recency_days: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Decisions, shape (n,): above the threshold, or at and below it, customers churn."""
        above: npt.NDArray[np.bool_] = np.asarray(recency_days, dtype=np.float64) > self.threshold_days
        return above if self.churns_above else ~above


def gate_accuracy(accuracy: float, minimum: float, *, where: str = "test rows") -> GateResult:
    """Accuracy is at least ``minimum``."""
    return _judge("accuracy", accuracy, ">=", minimum, where)


def gate_f1_weighted(f1_weighted: float, minimum: float, *, where: str = "test rows") -> GateResult:
    """Weighted F1 is at least ``minimum``."""
    return _judge("f1_weighted", f1_weighted, ">=", minimum, where)


def gate_roc_auc(interval_low: float, minimum: float, *, where: str = "test rows") -> GateResult:
    """The lower end of the AUC's interval is at least ``minimum``: luck on few rows does not pass."""
    return _judge("roc_auc", interval_low, ">=", minimum, f"lower end of the 95% interval, {where}")


def gate_too_good(
    measure: Literal["accuracy", "roc_auc"], figure: float, maximum: float, *, where: str = "test rows"
) -> GateResult:
    """``measure`` stays below ``maximum``; named ``too_good_accuracy`` or ``too_good_roc_auc``."""
    return _judge(f"too_good_{measure}", figure, "<", maximum, f"too good to be true: look for a leak, {where}")


def gate_group_fairness(groups: pd.DataFrame, minimum: float, *, where: str = "groups") -> GateResult:
    """Accuracy of the worst group with enough rows is at least ``minimum``.

    Parameters
    ----------
    groups : DataFrame
        From `closedloop.core.metrics.measure_groups`.
    where : str
        The column that makes the groups.

    Notes
    -----
    If no group has enough rows there is nothing to judge: the gate passes with the limit as its figure and says so.
    """
    judged = groups[groups["enough_rows"]]
    if judged.empty:
        largest = int(groups["rows"].max()) if len(groups) else 0
        detail = f"column {where}: not judged, no group has enough rows, the largest has {largest}"
        return _judge("group_fairness", minimum, ">=", minimum, detail)
    # A group without an accuracy sorts first and fails.
    worst = judged.sort_values(["accuracy", "group"], na_position="first").iloc[0]
    detail = f"accuracy of the worst group, {where} = {worst['group']}, {int(worst['rows'])} rows"
    return _judge("group_fairness", float(worst["accuracy"]), ">=", minimum, detail)


def gate_noise_robustness(agreement: float, minimum: float, *, where: str = "test rows") -> GateResult:
    """The share of decisions that survive noise (`measure_noise_agreement`) is at least ``minimum``."""
    return _judge("noise_robustness", agreement, ">=", minimum, f"share of equal decisions under noise, {where}")


def gate_class_balance(predicted_rate: float, churn_rate: float, maximum: float) -> GateResult:
    """The model sends out about as many churners as there are."""
    detail = f"predicted rate {predicted_rate:.3f}, actual rate {churn_rate:.3f}"
    # Rounded, since .7 - .5 is not .2 in binary and limits are written in decimals.
    return _judge("class_balance", round(abs(predicted_rate - churn_rate), 12), "<=", maximum, detail)


def gate_calibration(expected_calibration_error: float, maximum: float, *, where: str = "test rows") -> GateResult:
    """Scores can be read as probabilities."""
    return _judge("calibration", expected_calibration_error, "<=", maximum, f"expected calibration error, {where}")


def gate_latency(ratio: float, maximum: float) -> GateResult:
    """Scoring one row with ONNX takes at most ``maximum`` times what plain scikit-learn takes."""
    return _judge("latency", ratio, "<=", maximum, "one row, ONNX over scikit-learn")


def gate_onnx_parity(
    largest_difference: float, maximum: float, *, rows_name: Literal["train", "test"], rows_over: int | None = None
) -> GateResult:
    """The exported model scores like the trained one.

    Train and test rows are judged apart, since a flipped tree threshold shows most on the rows trained on.
    """
    detail = f"largest score difference, {rows_name} rows" + ("" if rows_over is None else f", {rows_over} far off")
    return _judge(f"onnx_parity_{rows_name}", largest_difference, "<=", maximum, detail)


def gate_feature_cutoff(mismatches: int, first: str, maximum: int, *, rows_checked: int) -> GateResult:
    """Training features use nothing at or after their snapshot (`closedloop.core.cutoff`); no rows checked fails."""
    detail = f"rows that differ, {rows_checked} checked" + (f"; first: {first}" if first else "")
    return _judge("feature_cutoff", mismatches if rows_checked else math.nan, "<=", maximum, detail)


def gate_better_than_trivial(
    accuracy: float, majority_accuracy: float, recency_accuracy: float | None, margin: float
) -> GateResult:
    """Accuracy exceeds that of the majority class, and of a `RecencyRule` if there is one, by more than ``margin``."""
    trivial = {"the majority class": majority_accuracy}
    if recency_accuracy is not None:
        trivial["the recency rule"] = recency_accuracy
    detail = f"accuracy {accuracy:.3f} over " + ", ".join(f"{name} {value:.3f}" for name, value in trivial.items())
    lead = round(accuracy - float(np.max(list(trivial.values()))), 12)
    return _judge("better_than_trivial", lead, ">", margin, detail)


def gate_champion_challenger(comparison: Comparison | None, reason: str) -> GateResult:
    """Report of the comparison: -1 lose, 0 inconclusive, 1 win. It blocks nothing; without a win the champion stays.

    Without a comparison it says the ``reason``.
    """
    if comparison is None:
        return _judge("champion_challenger", 1.0, ">=", 1.0, reason, blocking=False)
    detail = f"{comparison.verdict}: {comparison.reason}"
    return _judge("champion_challenger", _VERDICTS[comparison.verdict], ">=", 1.0, detail, blocking=False)


def failed_gates(results: Iterable[GateResult]) -> list[GateResult]:
    """The blocking results that did not pass, in the given order."""
    return [result for result in results if result.blocking and not result.passed]


def require_gates(results: Iterable[GateResult]) -> None:
    """Stop the line if a blocking gate failed.

    Raises
    ------
    GateFailed
        With one line a failed gate, or if there is no blocking result at all: nothing measured is nothing proved.
    """
    results = list(results)
    failed = failed_gates(results)
    blocking = sum(result.blocking for result in results)
    if not blocking:
        raise GateFailed("gates: found no result, at least one must be measured")
    if failed:
        lines = "\n".join(f"- {result.sentence()}" for result in failed)
        raise GateFailed(f"{len(failed)} of {blocking} gates failed:\n{lines}")


def measure_noise_agreement(
    score_function: Callable[[npt.NDArray[np.floating]], npt.ArrayLike],
    matrix: npt.NDArray[np.floating],
    *,
    scale: float,
    standard_deviations: npt.ArrayLike,
    threshold: float,
    seed: int,
) -> float:
    """Share of decisions that small Gaussian noise on the numeric features leaves as they are, in [0, 1].

    Parameters
    ----------
    score_function : callable
        From a matrix like ``matrix`` to scores, shape (n,).
    matrix : ndarray, shape (n, features), float32 or float64
        Missing values (nan) stay missing. Not changed.
    scale : float
        Noise's standard deviation in units of the feature's.
    standard_deviations : array-like, shape (features,)
        Of each feature in training; 0 or nan leaves the column alone, as coded categories must be.
    """
    deviations = np.nan_to_num(np.asarray(standard_deviations, dtype=np.float64))
    noise = np.random.default_rng(seed).standard_normal(matrix.shape) * (scale * deviations)
    noisy = (matrix + noise).astype(matrix.dtype)
    before, after = np.asarray(score_function(matrix)), np.asarray(score_function(noisy))
    return float(np.mean((before >= threshold) == (after >= threshold)))


def fit_recency_rule(recency_days: npt.ArrayLike, labels: npt.ArrayLike) -> RecencyRule:
    """The decision stump on one column with the best accuracy, in either direction; never below the majority class.

    Parameters
    ----------
    recency_days : array-like, shape (n,), without missing values
    labels : array-like, shape (n,), bool or 0/1

    Examples
    --------
    >>> fit_recency_rule([1, 2, 40, 50], [0, 0, 1, 1])
    RecencyRule(threshold_days=2.0, churns_above=True)
    """
    days, truth = np.asarray(recency_days, np.float64), np.asarray(labels).astype(np.int64)
    values, places = np.unique(days, return_inverse=True)
    churners = np.cumsum(np.bincount(places, truth))
    stayers = np.cumsum(np.bincount(places, 1 - truth))
    # Right answers of "churns above value": stayers up to it, churners beyond it. The other direction is the rest.
    right = stayers + churners[-1] - churners
    above, below = int(np.argmax(right)), int(np.argmin(right))
    churns_above = bool(right[above] >= len(days) - right[below])
    return RecencyRule(float(values[above if churns_above else below]), churns_above)


def _judge(name: str, figure: float, rule: Rule, limit: float, detail: str, *, blocking: bool = True) -> GateResult:
    figure, limit = float(figure), float(limit)
    return GateResult(name, bool(_RULES[rule](figure, limit)), figure, limit, rule, detail, blocking)


def _format_pair(figure: float, limit: float) -> tuple[str, str]:
    # More digits until they differ: ".850 must be >= .850" would explain nothing.
    for digits in range(3, 17):
        texts = _format(figure, digits), _format(limit, digits)
        if texts[0] != texts[1] or figure == limit:
            break
    return texts


def _format(value: float, digits: int) -> str:
    if math.isfinite(value) and value == int(value):
        return f"{value:.0f}"
    # A parity of .00005 is not .000.
    text = f"{value:.{digits}g}" if abs(value) < 10.0**-digits else f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text
