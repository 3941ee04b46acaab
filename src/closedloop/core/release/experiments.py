"""Experiments of a fixed sample: how many are needed, and what two proportions say once they are there.

Looked at every day these err far more often than they say; `closedloop.core.release.sequential` is for that. Models
that scored the same customers are compared by `closedloop.core.evaluation.comparison`, which needs far fewer of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from closedloop.core.evaluation.bootstrap import Interval
from closedloop.core.release.policy import ReleasePolicy, StepName
from closedloop.core.release.sequential import find_bound
from closedloop.errors import DataError, count_noun

# A right split is called broken once in a thousand experiments.
SPLIT_ALPHA = 0.001


class Counts(NamedTuple):
    """Events among the units of one arm."""

    events: int
    total: int


@dataclass(frozen=True)
class ProportionTest:
    """The result of an experiment; differences are treatment minus control.

    ``z`` and ``p_value`` (two-sided) are nan where neither arm has an event, or all units have one. ``margin_p`` is
    the one-sided p of non-inferiority, ``equivalence_p`` that of two one-sided tests; None without a margin.
    """

    verdict: Literal["adopt", "keep", "undecided", "broken"]
    reason: str
    control_rate: float
    treatment_rate: float
    difference: float
    interval: Interval
    lift: float
    z: float
    p_value: float
    split_p: float
    margin_p: float | None = None
    equivalence_p: float | None = None


def size_proportions(
    baseline: float, effect: float, *, alpha: float = 0.05, power: float = 0.8, ratio: float = 1.0
) -> tuple[int, int]:
    """Units of control and treatment that find a change of a rate, two-sided, by the unpooled normal formula.

    Parameters
    ----------
    baseline : float in (0, 1)
    effect : float, not 0
        Absolute change of the rate that is worth finding, either way.
    ratio : float > 0
        Treatment units per control unit.

    Raises
    ------
    DataError
        If a figure is out of range.

    Examples
    --------
    >>> size_proportions(0.05, 0.005)
    (31231, 31231)
    """
    other = baseline + effect
    _require("baseline", baseline, 0 < baseline < 1, "between 0 and 1")
    _require("mde", effect, effect != 0 and 0 < other < 1, f"not 0, and {baseline:g} with it between 0 and 1")
    _require("alpha", alpha, 0 < alpha < 1, "between 0 and 1")
    _require("power", power, alpha < power < 1, "between alpha and 1")
    _require("ratio", ratio, 0 < ratio < math.inf, "above 0")
    from statsmodels.stats.power import normal_sample_size_one_tail

    spread = math.sqrt(baseline * (1 - baseline) + other * (1 - other) / ratio)
    control = math.ceil(normal_sample_size_one_tail(abs(effect), power, alpha / 2, spread, spread))
    return control, math.ceil(control * ratio)


def size_guard(base_rate: float, error_ratio: float, share: float, *, alpha: float = 0.01, power: float = 0.8) -> int:
    """Challenger's requests after which a release's error guardrail has found so many times the errors.

    The one-sided fixed sample, enlarged by what looking all the time costs at the sample it is planned for.

    Parameters
    ----------
    share : float in (0, 1)
        The challenger's share of the requests.

    Examples
    --------
    >>> size_guard(0.01, 2.0, 0.05)
    3543
    """
    from scipy.stats import norm

    extra, ratio = base_rate * (error_ratio - 1), share / (1 - share)
    _, challenger = size_proportions(base_rate, extra, alpha=2 * alpha, power=power, ratio=ratio)
    reach, quantile = find_bound(1.0, planned=1.0, alpha=alpha), float(norm.ppf(power))
    return math.ceil(challenger * ((reach + quantile) / (float(norm.isf(alpha)) + quantile)) ** 2)


def plan_samples(
    policy: ReleasePolicy, *, base_error_rate: float, error_ratio: float = 2.0, power: float = 0.8
) -> dict[StepName, int]:
    """The least sample of each step before ``champion``, by which so many times the errors would have been found.

    Parameters
    ----------
    base_error_rate, error_ratio
        The stable arm's rate, and how many times as high the challenger's is.
    """
    # in shadow both models score every request
    shares = {step.name: step.weight or 0.5 for step in policy.list_steps() if step.name != "champion"}
    return {
        name: size_guard(base_error_rate, error_ratio, share, alpha=policy.guard_alpha, power=power)
        for name, share in shares.items()
    }


def analyze_proportions(
    control: Counts,
    treatment: Counts,
    *,
    alpha: float = 0.05,
    min_sample: int = 0,
    ratio: float = 1.0,
    margin: float | None = None,
    lower_is_better: bool = False,
) -> ProportionTest:
    """Decide an experiment that is over: adopt the treatment, keep the control, undecided, or a broken split.

    Parameters
    ----------
    alpha : float in (0, 1)
        Two-sided level; non-inferiority is judged one-sided at half of it.
    min_sample : int
        With fewer units in an arm there is no decision.
    ratio : float
        Treatment units per control unit that were planned; tested (exact binomial, .001) before anything else.
    margin : float, optional
        Non-inferiority: adopt if the treatment is worse by less than this.

    Notes
    -----
    The interval is Newcombe's (1998, "Interval estimation for the difference between independent proportions",
    method 10), which keeps its level where rates are small; z is the usual pooled one. A difference is decided where
    both agree.

    Raises
    ------
    DataError
        If counts are impossible or a figure is out of range.

    Examples
    --------
    >>> found = analyze_proportions(Counts(520, 10_000), Counts(580, 10_000))
    >>> found.verdict, round(found.p_value, 3)
    ('undecided', 0.063)
    """
    _require_experiment(control, treatment, alpha, ratio, margin)
    from scipy.stats import binomtest
    from statsmodels.stats.proportion import confint_proportions_2indep, proportions_ztest

    rates = control.events / control.total, treatment.events / treatment.total
    arms = (*treatment, *control)
    low, high = confint_proportions_2indep(*arms, compare="diff", method="newcomb", alpha=alpha)
    with np.errstate(invalid="ignore"):  # no event at all: nan, which decides nothing
        z, p_value = proportions_ztest(arms[::2], arms[1::2])
    found = ProportionTest(
        verdict="undecided",
        reason="",
        control_rate=rates[0],
        treatment_rate=rates[1],
        difference=rates[1] - rates[0],
        interval=Interval(float(low), float(high)),
        lift=rates[1] / rates[0] - 1 if rates[0] else math.nan,
        z=float(z),
        p_value=float(p_value),
        split_p=float(binomtest(treatment.total, control.total + treatment.total, ratio / (1 + ratio)).pvalue),
    )
    if margin is not None:
        margin_p, equivalence_p = _test_margin(control, treatment, margin, lower_is_better=lower_is_better)
        found = replace(found, margin_p=margin_p, equivalence_p=equivalence_p)
    fewest = min(control.total, treatment.total)
    verdict, reason = _decide(found, fewest, min_sample, ratio, alpha, margin, lower_is_better=lower_is_better)
    return replace(found, verdict=verdict, reason=reason)


def _require_experiment(control: Counts, treatment: Counts, alpha: float, ratio: float, margin: float | None) -> None:
    for name, arm in (("control", control), ("treatment", treatment)):
        _require(name, f"{arm.events}/{arm.total}", 0 <= arm.events <= arm.total > 0, "events/total, events <= total")
    _require("alpha", alpha, 0 < alpha < 1, "between 0 and 1")
    _require("ratio", ratio, 0 < ratio < math.inf, "above 0")
    _require("margin", margin, margin is None or 0 < margin < 1, "between 0 and 1")


def _test_margin(control: Counts, treatment: Counts, margin: float, *, lower_is_better: bool) -> tuple[float, float]:
    from statsmodels.stats.proportion import test_proportions_2indep, tost_proportions_2indep

    # Farrington and Manning's score test: the variance is that under the null.
    side = (
        {"value": margin, "alternative": "smaller"} if lower_is_better else {"value": -margin, "alternative": "larger"}
    )
    arms = (*treatment, *control)
    with np.errstate(all="ignore"):  # ratios that are reported beside, and may divide by 0
        one = test_proportions_2indep(*arms, compare="diff", method="score", **side)
        two = tost_proportions_2indep(*arms, -margin, margin, compare="diff", method="score")
    return float(one.pvalue), float(two.pvalue)


def _decide(
    found: ProportionTest,
    fewest: int,
    min_sample: int,
    ratio: float,
    alpha: float,
    margin: float | None,
    *,
    lower_is_better: bool,
) -> tuple[Literal["adopt", "keep", "undecided", "broken"], str]:
    if found.split_p < SPLIT_ALPHA:
        return (
            "broken",
            f"the arms are not as {ratio:g} to 1 (p = {found.split_p:.2g}): nothing measured on them counts",
        )
    if fewest < min_sample:
        return "undecided", f"an arm has {count_noun(fewest, 'unit')}, at least {min_sample:,} are needed"
    if math.isnan(found.p_value):
        return "undecided", "both arms have no events, or nothing else: there is nothing to compare"
    low, high = found.interval
    differs = found.p_value < alpha and (low > 0 or high < 0)
    if differs and (found.difference > 0) is not lower_is_better:
        return "adopt", f"the treatment is better, p = {found.p_value:.3g} < {alpha:g}"
    if found.margin_p is not None and found.margin_p < alpha / 2:
        return "adopt", f"the treatment is not worse by {margin:g} or more, p = {found.margin_p:.3g} < {alpha / 2:g}"
    if differs:
        return "keep", f"the treatment is worse, p = {found.p_value:.3g} < {alpha:g}"
    if found.margin_p is not None:
        return (
            "undecided",
            f"worse by {margin:g} is not ruled out, p = {found.margin_p:.3g}, below {alpha / 2:g} is needed",
        )
    return "undecided", f"no difference beyond chance, p = {found.p_value:.3g}, below {alpha:g} is needed"


def _require(name: str, found: object, allowed: bool, what: str) -> None:
    if not allowed:
        raise DataError(f"{name}: found {found}, allowed is {what}")
