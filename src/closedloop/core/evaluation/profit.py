"""The profit of offers: expected from probabilities before they are made, and counted on labelled rows.

Everywhere below, ``kept`` is shape (n,), what each customer is worth if kept (`read_kept`), and ``value`` says what an
offer costs and how often it keeps a customer who would leave. Profit is counted as in Verbraken, Verbeke and Baesens
(2013), "A novel profit maximizing metric for measuring classification performance of customer churn prediction models",
with a value for each customer in place of one for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from closedloop.core.evaluation.bootstrap import Bootstrap, Floats, Interval, UnusableScores
from closedloop.core.evaluation.metrics import check_scores
from closedloop.core.evaluation.value import CustomerValue, KeptCustomer

CURVE_POINTS_MAX = 100


@dataclass(frozen=True)
class ProfitComparison:
    """Profits for each row of two models' offers on the same rows; the difference is challenger minus champion."""

    champion: float
    challenger: float
    difference: float
    interval: Interval


def read_kept(kept: KeptCustomer, rows: pd.DataFrame, columns: Sequence[str]) -> Floats:
    """The worth of each customer if kept, shape (n,), in the currency of the config; missing values count as 0.

    Parameters
    ----------
    rows : DataFrame, shape (n, ...)
        Feature rows, of training, evaluation or scoring: the source is a feature in each of them.
    columns : sequence of str
        From `closedloop.config.featureset.list_value_columns`: the features that are added up; none for a number.

    Examples
    --------
    >>> rows = pd.DataFrame({"purchase_sum_90d": [100.0, None]})
    >>> read_kept(KeptCustomer(amount_of_days=90, share=0.5), rows, ["purchase_sum_90d"]).tolist()
    [50.0, 0.0]
    """
    if kept.number is not None:
        return np.full(len(rows), kept.number)
    found: Floats = rows[[*columns]].to_numpy(dtype=np.float64, na_value=np.nan)
    worth: Floats = np.nansum(found, axis=1) * kept.share
    return worth


def expected_profit(probability: npt.ArrayLike, kept: npt.ArrayLike, value: CustomerValue) -> Floats:
    """The mean profit of an offer to each customer, shape (n,), if the probabilities of churn are right.

    Examples
    --------
    >>> value = CustomerValue(kept=100, offer_cost=5, save_rate=0.2)
    >>> expected_profit([0.5, 0.25], [100, 80], value).tolist()
    [5.0, -1.0]
    """
    chance, worth = np.asarray(probability, dtype=np.float64), np.asarray(kept, dtype=np.float64)
    if chance.shape != worth.shape:
        raise UnusableScores(f"kept: found {worth.shape}, allowed is one value a row, {chance.shape}")
    return chance * value.save_rate * worth - value.offer_cost


def count_profit(labels: npt.ArrayLike, kept: npt.ArrayLike, value: CustomerValue) -> Floats:
    """The profit that an offer to each labelled customer would bring, shape (n,); a stayer costs the offer alone."""
    return expected_profit(np.asarray(labels).astype(np.float64), kept, value)


def choose_offers(
    probability: npt.ArrayLike,
    kept: npt.ArrayLike,
    value: CustomerValue,
    cycles: npt.ArrayLike | None = None,
) -> npt.NDArray[np.bool_]:
    """The customers who get an offer, shape (n,): those with an expected profit above 0, the best ones first.

    Parameters
    ----------
    cycles : array-like, shape (n,), optional
        The cycle of each row, such as its snapshot: each has the whole ``value.capacity``. None: one cycle.

    Notes
    -----
    Of customers with equal expected profit the earlier row comes first.
    """
    profit = expected_profit(probability, kept, value)
    offered = profit > 0
    if value.capacity is None:
        return offered
    cycle = pd.Series(np.zeros(len(profit)) if cycles is None else np.asarray(cycles))
    rank = pd.Series(-profit).groupby(cycle.to_numpy()).rank(method="first")
    return offered & (rank.to_numpy() <= value.capacity)


def weigh_stake(probability: npt.ArrayLike, kept: npt.ArrayLike, value: CustomerValue) -> dict[str, float]:
    """The value that customers without an outcome yet may take with them, and the expected profit of offers to them.

    Returns
    -------
    dict
        ``customers``; ``at_stake``, what those who are expected to leave are worth; ``offers`` with an expected profit
        above 0, the best ones up to the capacity, and their ``expected_profit``. Money is in the config's currency.

    Examples
    --------
    >>> value = CustomerValue(kept=100, offer_cost=5, save_rate=0.2)
    >>> weigh_stake([0.5, 0.125], [100, 80], value)
    {'customers': 2, 'at_stake': 60.0, 'offers': 1, 'expected_profit': 5.0}
    """
    profit, offered = expected_profit(probability, kept, value), choose_offers(probability, kept, value)
    at_stake = float(np.asarray(probability, dtype=np.float64) @ np.asarray(kept, dtype=np.float64))
    counts = {"customers": len(profit), "at_stake": at_stake, "offers": int(offered.sum())}
    return counts | {"expected_profit": float(profit[offered].sum())}


def tabulate_profit(
    labels: npt.ArrayLike, scores: npt.ArrayLike, kept: npt.ArrayLike, value: CustomerValue, bootstrap: Bootstrap
) -> pd.DataFrame:
    """Profit by threshold: of offers to all customers with ``score >= threshold``, highest threshold first.

    Columns: ``threshold``, ``offered_share`` (of rows), ``profit`` for each row, offered or not, and ``low`` and
    ``high``, the ends of its bootstrap interval by customer. Thinned evenly to at most 100 thresholds; no offer at all
    and an offer to everyone stay.
    """
    truth, score = check_scores(labels, scores, both_classes=False)
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    ends = np.flatnonzero(np.r_[ranked[1:] != ranked[:-1], True]) + 1  # rows at or above each distinct score
    table = _draw_curve(count_profit(truth, kept, value), order, _thin(np.r_[0, ends]), bootstrap)
    table.insert(0, "threshold", np.r_[1.0, ranked][table.pop("offers")])
    return table


def tabulate_capacity(
    labels: npt.ArrayLike, scores: npt.ArrayLike, kept: npt.ArrayLike, value: CustomerValue, bootstrap: Bootstrap
) -> pd.DataFrame:
    """Profit by number of offers, to the customers with the highest expected profit first.

    Columns: ``offers``, and those of `tabulate_profit` without the threshold. ``value.capacity`` cuts nothing.
    """
    truth, score = check_scores(labels, scores, both_classes=False)
    order = np.argsort(-expected_profit(score, kept, value), kind="stable")
    return _draw_curve(count_profit(truth, kept, value), order, _thin(np.arange(len(truth) + 1)), bootstrap)


def measure_profit(gains: Floats, offered: npt.NDArray[np.bool_], bootstrap: Bootstrap) -> tuple[float, Interval]:
    """Profit for each row of the offers made, with its bootstrap interval by customer.

    Parameters
    ----------
    gains : ndarray, shape (n,)
        From `count_profit`.
    """
    made = np.where(offered, gains, 0.0)
    draws = np.array([counts @ made / counts.sum() for counts in bootstrap.draw(len(made))])
    return float(made.mean()), bootstrap.find_interval(draws)


def compare_profit(
    gains: Floats, champion: npt.NDArray[np.bool_], challenger: npt.NDArray[np.bool_], bootstrap: Bootstrap
) -> ProfitComparison:
    """Compare the offers that two models make to the same rows, paired by customer.

    Parameters
    ----------
    gains : ndarray, shape (n,)
        From `count_profit`.
    champion, challenger : bool array, shape (n,)
        Who gets an offer by either model, from `choose_offers`.

    Examples
    --------
    >>> gains, first, other = np.array([10.0, -5.0]), np.array([True, False]), np.array([True, True])
    >>> compare_profit(gains, first, other, Bootstrap(seed=1)).difference
    -2.5
    """
    gaps = gains * (challenger.astype(np.float64) - champion.astype(np.float64))
    draws = np.array([counts @ gaps / counts.sum() for counts in bootstrap.draw(len(gaps))])
    before, after = (float(np.where(offered, gains, 0.0).mean()) for offered in (champion, challenger))
    return ProfitComparison(before, after, float(gaps.mean()), bootstrap.find_interval(draws))


def _thin(places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    points = np.linspace(0, len(places) - 1, min(len(places), CURVE_POINTS_MAX)).round().astype(np.int64)
    return np.asarray(places[np.unique(points)])


def _draw_curve(
    gains: Floats, order: npt.NDArray[np.int64], offers: npt.NDArray[np.int64], bootstrap: Bootstrap
) -> pd.DataFrame:
    """Profit of the first ``offers`` rows in ``order``, for each row, with intervals."""

    def cumulate(weights: Floats) -> Floats:
        return np.asarray(np.r_[0.0, np.cumsum((weights * gains)[order])][offers] / weights.sum())

    draws = np.array([cumulate(counts) for counts in bootstrap.draw(len(gains))])
    ends = [bootstrap.find_interval(draws[:, column]) for column in range(len(offers))]
    return pd.DataFrame(
        {
            "offers": offers,
            "offered_share": offers / len(gains),
            "profit": cumulate(np.ones(len(gains))),
            "low": [end.low for end in ends],
            "high": [end.high for end in ends],
        }
    )
