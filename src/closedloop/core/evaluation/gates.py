"""The model-quality gate: one function a rule, each a figure against a limit. A figure that is nan never passes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from closedloop.errors import GateFailed, count_noun

if TYPE_CHECKING:
    import pandas as pd

    from closedloop.core.evaluation.comparison import Comparison
    from closedloop.core.evaluation.profit import ProfitComparison
    from closedloop.core.evaluation.trivial import Gains

Rule = Literal[">=", ">", "<=", "<"]
_RULES: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
_VERDICTS = {"lose": -1.0, "inconclusive": 0.0, "win": 1.0}
# What a person may do about a refusal: mend the cause, or change a setting.
REMEDIES = {
    "class_rows": "give more rows, raise split.test_fraction or split.test_snapshots, or lower gates.class_rows_min",
    "accuracy": "set model.threshold to accuracy, or lower gates.accuracy_min",
    "f1_weighted": "set model.threshold to f1, or lower gates.f1_weighted_min",
    "roc_auc": "find better features or more rows, or lower gates.roc_auc_min",
    "average_precision": "find better features or more rows, or lower gates.average_precision_gain_min",
    "lift": "find better features or more rows, or lower gates.lift_min",
    "too_good_accuracy": "take the column that leaks out of the features, or raise gates.accuracy_max",
    "too_good_roc_auc": "take the column that leaks out of the features, or raise gates.roc_auc_max",
    "single_column": "take the column out of the features; if it is known when a prediction is made, name it in "
    "gates.single_column_allowed",
    "group_fairness": "look at the groups' figures on the model card, or lower gates.group_accuracy_min",
    "noise_robustness": "choose a smoother model (fewer leaves, more rows a leaf), or lower gates.noise_agreement_min",
    "class_balance": "set model.threshold to f1, accuracy or another number, or raise gates.rate_difference_max",
    "calibration": "set model.calibrate to true, add validation rows, or raise gates.calibration_error_max",
    "latency": "choose a smaller model, or raise gates.latency_ratio_max",
    "onnx_parity_train": "choose another model.type, or raise gates.parity_max",
    "onnx_parity_test": "choose another model.type, or raise gates.parity_max",
    "feature_cutoff": "run features and training-set again from the events; a difference that stays is a leak",
    "better_than_trivial": "find better features or another model.type, or lower gates.trivial_margin_min",
    "profit": "look at the profit curves on the model card, and set model.calibrate to true; what an offer costs and "
    "brings stands in value in the data set's config",
    "trivial_accuracy": "set model.threshold to accuracy; where calls are made for another reason than accuracy, to f1 "
    "or a number",
}


@dataclass(frozen=True)
class GateResult:
    """One figure against one limit; a result that is not ``blocking`` is reported but stops nothing.

    ``excused``: that is because the champion misses the limit too (`closedloop.core.evaluation.excuses`).
    """

    name: str
    passed: bool
    figure: float
    limit: float
    rule: Rule
    detail: str
    blocking: bool = True
    excused: bool = False

    @property
    def remedy(self) -> str:
        """The remedy of a refusal; empty if there was none."""
        return "" if self.passed or not self.blocking else REMEDIES[self.name]

    def sentence(self) -> str:
        """The sentence that the operator reads.

        Examples
        --------
        >>> gate_accuracy(0.812, 0.85).sentence()
        'accuracy .812 must be >= .850 (test rows)'
        """
        figure, limit = format_pair(self.figure, self.limit)
        return f"{self.name} {figure} must be {self.rule} {limit} ({self.detail})"

    def report_only(self, reason: str) -> GateResult:
        """The same, but it stops nothing; ``reason`` says why. An empty reason changes nothing."""
        if not reason:
            return self
        return replace(self, blocking=False, detail=f"{self.detail}; reported only: {reason}")

    def excuse(self, reason: str) -> GateResult:
        """The same, but the champion, to which ``reason`` points, takes away what stops."""
        return replace(self, blocking=False, excused=True, detail=f"{self.detail}; excused: {reason}")


class _NotCompared(GateResult):
    def sentence(self) -> str:
        """The reason, in place of a figure and a limit that say nothing."""
        return f"{self.name} nothing was compared ({self.detail})"


def gate_accuracy(accuracy: float, minimum: float) -> GateResult:
    """Accuracy is at least ``minimum``."""
    return _judge("accuracy", accuracy, ">=", minimum, "test rows")


def gate_f1_weighted(f1_weighted: float, minimum: float) -> GateResult:
    """Weighted F1 is at least ``minimum``."""
    return _judge("f1_weighted", f1_weighted, ">=", minimum, "test rows")


def gate_roc_auc(interval_low: float, minimum: float) -> GateResult:
    """The lower end of the AUC's interval is at least ``minimum``: luck on few rows does not pass."""
    return _judge("roc_auc", interval_low, ">=", minimum, "lower end of the 95% interval, test rows")


def gate_average_precision(gain_low: float, minimum: float) -> GateResult:
    """The lower end of the interval of average precision above the churn rate exceeds ``minimum``."""
    detail = "average precision above the churn rate, lower end of the interval, test rows"
    return _judge("average_precision", gain_low, ">", minimum, detail)


def gate_lift(interval_low: float, minimum: float) -> GateResult:
    """The lower end of the interval of the top tenth's lift exceeds ``minimum``."""
    detail = "churn rate of the tenth with the highest scores over that of all, lower end of the interval, test rows"
    return _judge("lift", interval_low, ">", minimum, detail)


def gate_class_rows(churners: int, stayers: int, minimum: int) -> GateResult:
    """There are enough test rows of both classes to prove anything."""
    detail = f"test rows of the smaller class, {churners} churned, {stayers} stayed"
    return _judge("class_rows", min(churners, stayers), ">=", minimum, detail)


def gate_single_column(
    columns: Mapping[str, float], pairs: Mapping[tuple[str, str], float], maximum: float, pair_maximum: float
) -> GateResult:
    """No column that is not allowed to ranks the label alone, and no two of them together.

    Parameters
    ----------
    columns, pairs : mapping of names to float
        Cross-fitted AUC (see `closedloop.core.evaluation.column_leaks`), the highest first; without those on the
        allow-list. ``pairs`` is empty if they were not looked at.
    """
    beyond = {name: auc for name, auc in columns.items() if not auc < maximum}
    pair, together = next(iter(pairs.items()), (("", ""), 0.0))
    if not beyond and pairs and not together < pair_maximum:
        detail = f"cross-fitted AUC of the columns {pair[0]} and {pair[1]} together: look for a leak"
        return _judge("single_column", together, "<", pair_maximum, detail)
    named = ", ".join(f"{name} {auc:.3f}" for name, auc in list(beyond.items() or columns.items())[:5])
    what = "the label can be read from them: look for a leak" if beyond else "the strongest columns"
    highest = max(columns.values(), default=0.0)
    return _judge("single_column", highest, "<", maximum, f"cross-fitted AUC of a column alone, {what}: {named}")


def gate_too_good(measure: Literal["accuracy", "roc_auc"], figure: float, maximum: float) -> GateResult:
    """``measure`` stays below ``maximum``; named ``too_good_accuracy`` or ``too_good_roc_auc``."""
    return _judge(f"too_good_{measure}", figure, "<", maximum, "too good to be true: look for a leak, test rows")


def gate_group_fairness(groups: pd.DataFrame, minimum: float, *, where: str = "groups") -> GateResult:
    """Accuracy of the worst group with enough rows is at least ``minimum``.

    Parameters
    ----------
    groups : DataFrame
        From `closedloop.core.evaluation.metrics.measure_groups`.
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
    detail = f"accuracy of the worst group, {where} = {worst['group']}, {count_noun(int(worst['rows']), 'row')}"
    return _judge("group_fairness", float(worst["accuracy"]), ">=", minimum, detail)


def gate_noise_robustness(agreement: float, minimum: float) -> GateResult:
    """The share of decisions that survive noise (`measure_noise_agreement`) is at least ``minimum``."""
    return _judge("noise_robustness", agreement, ">=", minimum, "share of equal decisions under noise, test rows")


def gate_class_balance(predicted_rate: float, churn_rate: float, maximum: float) -> GateResult:
    """The model sends out about as many churners as there are."""
    detail = f"predicted rate {predicted_rate:.3f}, actual rate {churn_rate:.3f}"
    # Rounded, since .7 - .5 is not .2 in binary and limits are written in decimals.
    return _judge("class_balance", round(abs(predicted_rate - churn_rate), 12), "<=", maximum, detail)


def gate_calibration(expected_calibration_error: float, maximum: float) -> GateResult:
    """Scores can be read as probabilities."""
    return _judge("calibration", expected_calibration_error, "<=", maximum, "expected calibration error, test rows")


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
    """Training features use nothing at or after their snapshot (see `leak_check`); no rows checked fails."""
    detail = f"rows that differ, {rows_checked} checked" + (f"; first: {first}" if first else "")
    return _judge("feature_cutoff", mismatches if rows_checked else math.nan, "<=", maximum, detail)


def gate_better_than_trivial(gains: Mapping[str, Gains], margin: float) -> GateResult:
    """The share of each trivial rule's log loss that the model saves exceeds ``margin``, at the lower end."""
    worst = min(gains.values(), key=lambda gain: _sort_low(gain.log_loss_interval.low))
    saved = ", ".join(f"{gain.log_loss_gain:.3f} of that of {name}" for name, gain in gains.items())
    detail = f"share of the log loss saved, lower end of the interval; {saved}"
    return _judge("better_than_trivial", worst.log_loss_interval.low, ">", margin, detail)


def gate_trivial_accuracy(gains: Mapping[str, Gains]) -> GateResult:
    """The model's decisions are not worse than those of any trivial rule by more than chance."""
    worst = min(gains.values(), key=lambda gain: _sort_low(gain.accuracy_interval.high))
    leads = ", ".join(f"{gain.accuracy_lead:+.3f} over {name}" for name, gain in gains.items())
    detail = f"lead in accuracy, upper end of the interval; {leads}"
    return _judge("trivial_accuracy", worst.accuracy_interval.high, ">=", 0.0, detail)


def gate_profit(comparison: ProfitComparison | None, reason: str) -> GateResult:
    """The challenger's offers are not sure to bring less than the champion's to the same customers, whatever its AUC.

    Without a comparison it says the ``reason``, and blocks nothing.
    """
    if comparison is None:
        return _NotCompared("profit", True, 0.0, 0.0, ">=", reason, blocking=False)
    both = f"{comparison.challenger:.4g} a customer against the champion's {comparison.champion:.4g}"
    detail = f"difference in profit of the offers, upper end of the interval; {both}"
    return _judge("profit", comparison.interval.high, ">=", 0.0, detail)


def gate_champion_challenger(comparison: Comparison | None, reason: str) -> GateResult:
    """Report of the comparison: -1 lose, 0 inconclusive, 1 win. It blocks nothing; without a win the champion stays.

    Without a comparison it says the ``reason``.
    """
    if comparison is None:
        return _NotCompared("champion_challenger", True, 1.0, 1.0, ">=", reason, blocking=False)
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
        lines = "\n".join(f"- {result.sentence()}; {result.remedy}" for result in failed)
        raise GateFailed(f"{len(failed)} of {count_noun(blocking, 'gate')} failed:\n{lines}")


def _judge(name: str, figure: float, rule: Rule, limit: float, detail: str, *, blocking: bool = True) -> GateResult:
    figure, limit = float(figure), float(limit)
    return GateResult(name, bool(_RULES[rule](figure, limit)), figure, limit, rule, detail, blocking)


def _sort_low(value: float) -> float:
    return -math.inf if math.isnan(value) else value  # what could not be measured is the worst


def format_pair(figure: float, limit: float) -> tuple[str, str]:
    """Both numbers with three digits, or as many more as tell them apart: ".850 must be >= .850" explains nothing."""
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
