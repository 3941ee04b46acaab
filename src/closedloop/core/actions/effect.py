"""The effect of a campaign: treated customers beside the random hold-out, and what that was worth."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import pandas as pd

from closedloop.core.actions.arms import HELD_OUT, TREATED
from closedloop.core.release.experiments import Counts, analyze_proportions
from closedloop.errors import count_noun

ALPHA, TENTHS = 0.05, 10
EffectVerdict = Literal["kept", "harmed", "undecided", "cannot tell"]


class Estimate(NamedTuple):
    """A figure with the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def scale(self, factor: float, less: float = 0.0) -> Estimate:
        """The figure, times a factor, less a constant."""
        return Estimate(*(float(factor * end - less) for end in self))


class Effect(NamedTuple):
    """Churn of the two arms of some customers, and what follows.

    ``effect`` is the churn of the held out less that of the treated: the share of the treated whom the campaign kept.
    ``saved`` is that in customers. ``profit`` is the value of those kept less the cost of all offers, in the currency
    of the data set's config. None: an arm has nobody (effect, saved), no value is configured (profit), or nothing tells
    how far it may be off, since an arm has one customer or what was lost is the same for all (profit).
    """

    treated: int
    held_out: int
    treated_churn: float | None
    held_out_churn: float | None
    effect: Estimate | None
    saved: Estimate | None
    profit: Estimate | None
    verdict: EffectVerdict
    reason: str


def measure_effect(results: pd.DataFrame, *, offer_cost: float | None = None) -> Effect:
    """Compare the arms of a campaign whose outcomes are known.

    The interval of the effect is Newcombe's (1998, method 10), by `analyze_proportions`; that of the profit is Welch's
    (1947, Biometrika 34) on the value that each customer took along.

    Parameters
    ----------
    results : DataFrame
        ``arm``, ``outcome`` (1 churned, 0 stayed; a row without one is left out) and ``kept_value`` (NaN: not known).
    offer_cost
        Of each offer; None: no profit is reported.

    Examples
    --------
    >>> arms = pd.DataFrame({"arm": ["treated"] * 400 + ["held_out"] * 200, "kept_value": 50.0})
    >>> arms["outcome"] = [1] * 40 + [0] * 360 + [1] * 40 + [0] * 160
    >>> found = measure_effect(arms, offer_cost=1)
    >>> found.verdict, round(found.saved.value), round(found.profit.value)
    ('kept', 40, 1600)
    """
    known = results[results["outcome"].notna()]
    treated, held_out = (known[known["arm"] == arm] for arm in (TREATED, HELD_OUT))
    sizes, churn = (len(treated), len(held_out)), [_mean(arm["outcome"]) for arm in (treated, held_out)]
    if not all(sizes):
        missing = "treated" if not sizes[0] else "held out"
        reason = f"no customer {missing} has an outcome: nothing tells the campaign from what happened by itself"
        return Effect(*sizes, churn[0], churn[1], None, None, None, "cannot tell", reason)
    counts = [Counts(int(arm["outcome"].sum()), len(arm)) for arm in (held_out, treated)]
    found = analyze_proportions(*counts, alpha=ALPHA, ratio=sizes[0] / sizes[1], lower_is_better=True)
    # by difference, as the negative of 0 is shown as -0
    effect = Estimate(0 - found.difference, 0 - found.interval.high, 0 - found.interval.low)
    verdict, reason = _judge(effect)
    has_value = min(sizes) > 1 and bool(known["kept_value"].notna().all())
    profit = _measure_profit(treated, held_out, offer_cost) if has_value and offer_cost is not None else None
    return Effect(*sizes, churn[0], churn[1], effect, effect.scale(sizes[0]), profit, verdict, reason)


def measure_groups(results: pd.DataFrame) -> dict[str, dict[str, Effect]]:
    """The effect by tenth of the score (1: the highest) and by segment, by the names of the groups.

    Parameters
    ----------
    results : DataFrame
        As for `measure_effect`, with ``probability`` and ``segment``.
    """
    rank = results["probability"].rank(ascending=False, method="first")
    tenth = (rank * TENTHS / len(results)).apply(math.ceil)
    groups = {"tenth": tenth, "segment": results["segment"]}
    return {
        name: {str(key): measure_effect(some) for key, some in results.groupby(by)}
        for name, by in groups.items()
        if by.notna().any()
    }


def _judge(effect: Estimate) -> tuple[EffectVerdict, str]:
    if effect.low > 0:
        return "kept", "fewer of the treated left than of the customers left alone"
    if effect.high < 0:
        return "harmed", "more of the treated left than of the customers left alone"
    return "undecided", "no effect is shown: the interval spans zero"


def _measure_profit(treated: pd.DataFrame, held_out: pd.DataFrame, offer_cost: float) -> Estimate | None:
    from scipy.stats import t

    lost = [(arm["outcome"] * arm["kept_value"]).to_numpy() for arm in (held_out, treated)]
    parts = [arm.var(ddof=1) / len(arm) for arm in lost]
    error = math.sqrt(sum(parts))
    if not error:
        return None
    kept = lost[0].mean() - lost[1].mean()
    freedom = sum(parts) ** 2 / sum(part**2 / (len(arm) - 1) for part, arm in zip(parts, lost, strict=True))
    reach = float(t.isf(ALPHA / 2, freedom)) * error
    return Estimate(kept, kept - reach, kept + reach).scale(len(treated), offer_cost * len(treated))


def _mean(values: pd.Series) -> float | None:
    return float(values.mean()) if len(values) else None


def describe_effect(effect: Effect) -> list[str]:
    """The effect in sentences, for people."""
    arms = f"{count_noun(effect.treated, 'customer')} treated, {effect.held_out:,} held out"
    if effect.effect is None or effect.saved is None:
        return [f"{effect.verdict}: {effect.reason}", arms]
    lines = [
        f"{effect.verdict}: {effect.reason}",
        f"{arms}: {effect.treated_churn:.1%} and {effect.held_out_churn:.1%} of them left",
        f"effect {_show(effect.effect, '+.1%')}: customers kept {_show(effect.saved, '+,.0f')}",
    ]
    return [*lines, *([f"net profit {_show(effect.profit, '+,.0f')}"] if effect.profit else [])]


def _show(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} (95% interval {estimate.low:{form}} to {estimate.high:{form}})"
