"""Uplift: whom an offer keeps, learnt from the arms of closed campaigns, and whether a list ranked by it does better.

The outcome is transformed so that its mean is the effect (Athey and Imbens 2016, "Recursive partitioning for
heterogeneous causal effects", PNAS 113). What is transformed is the outcome less the churn model's score, and rows are
weighted by the precision of their campaign (Nie and Wager 2021, "Quasi-oracle estimation of heterogeneous treatment
effects", Biometrika 108): a hold-out is small, and the score explains most of what differs between the arms by chance.
The learner is a ridge regression. With some hundred customers held out, boosted trees, forests and two churn models
found less on simulated campaigns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from closedloop.contract import Feature
from closedloop.core.actions.arms import HELD_OUT, TREATED
from closedloop.core.actions.effect import Estimate
from closedloop.core.evaluation.bootstrap import Bootstrap, Floats
from closedloop.core.release.assignment import hash_share
from closedloop.core.training.estimators import build_pipeline, list_missing
from closedloop.errors import count_noun

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

HELD_OUT_MIN, OUTCOMES_MIN = 100, 20
FOLDS = 5
PENALTIES = tuple(10.0**power for power in range(6))


class Trial(NamedTuple):
    """Whether a list by uplift does better than the list that it would replace; the figures are None if too few."""

    wins: bool
    reason: str
    qini: Estimate | None = None
    qini_before: Estimate | None = None
    difference: Estimate | None = None


def transform_outcomes(rows: pd.DataFrame) -> tuple[Floats, Floats]:
    """Each customer's pseudo-outcome of the effect, shape (n,), and its weight, shape (n,).

    The weighted mean of the first over a random part of the customers is the share of them whom the campaign keeps,
    whatever the score is worth.

    Parameters
    ----------
    rows : DataFrame, shape (n, ...)
        ``arm``, ``outcome`` (1 churned, 0 stayed), ``score`` (the churn model's) and ``treated_share`` (of the
        campaign, between 0 and 1).

    Examples
    --------
    >>> rows = pd.DataFrame({"arm": ["treated", "held_out"], "outcome": [0, 1], "score": 0.5, "treated_share": 0.5})
    >>> transform_outcomes(rows)[0].tolist()
    [1.0, 1.0]
    """
    share, is_treated = rows["treated_share"].to_numpy(), (rows["arm"] == TREATED).to_numpy()
    kept = (rows["score"] - rows["outcome"]).to_numpy(dtype=np.float64)
    return np.where(is_treated, kept / share, -kept / (1 - share)), share * (1 - share)


def measure_qini(gains: npt.ArrayLike, order: npt.NDArray[np.int64], weights: npt.ArrayLike) -> float:
    """The Qini coefficient of a list (Radcliffe 2007, "Using control groups to target on predicted lift").

    It is the area between the curve of what is kept by calling the first customers of the list, and the straight line
    of a list in random order. Both axes are for each customer. Radcliffe counts outcomes of the arms; here each row
    has its gain, so that hold-outs of different size go together.

    Parameters
    ----------
    gains, weights : array-like, shape (n,)
        From `transform_outcomes`; the gains may be multiplied by what each customer is worth.
    order : int array, shape (n,)
        The rows, the first to be called first.

    Examples
    --------
    >>> measure_qini([1.0, 0.0], np.array([0, 1]), [1.0, 1.0]), measure_qini([1.0, 0.0], np.array([1, 0]), [1.0, 1.0])
    (0.125, -0.125)
    """
    weight = np.asarray(weights, dtype=np.float64)
    curve = np.r_[0.0, np.cumsum((weight * np.asarray(gains))[order])] / weight.sum()
    steps = weight[order] / weight.sum()
    return float(((curve[1:] + curve[:-1]) / 2) @ steps - curve[-1] / 2)


def learn_effect(rows: pd.DataFrame, inputs: pd.DataFrame, features: Sequence[Feature]) -> Pipeline:
    """Fit the effect of an offer: the part of the customers with these features whom it keeps.

    Parameters
    ----------
    rows : DataFrame, shape (n, ...)
        As for `transform_outcomes`.
    inputs : DataFrame, shape (n, ...)
        The features of the same customers; apart from the rows, as they may have any name.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import Pipeline

    prepare = build_pipeline(
        features,
        model_type="logistic_regression",
        model_params={},
        normalize=True,
        feature_selection=None,
        seed=0,
        missing=list_missing(features, inputs),
    )[:-1]
    kept, weights = transform_outcomes(rows)
    learner = Pipeline([*prepare.steps, ("ridge", RidgeCV(PENALTIES))])
    return learner.fit(inputs, kept, ridge__sample_weight=weights / weights.mean())


def predict_effect(learner: Pipeline, inputs: pd.DataFrame) -> Floats:
    """The effect on each customer, shape (n,), to six digits: the last bits of a machine rank nobody."""
    return np.asarray(learner.predict(inputs), dtype=np.float64).round(6)


def find_shortage(rows: pd.DataFrame) -> str | None:
    """Why these arms are too small to learn from; None if they are not.

    Parameters
    ----------
    rows : DataFrame
        ``arm``, ``outcome`` and ``campaign``, the date.
    """
    held_out = rows[rows["arm"] == HELD_OUT]
    if len(held_out) < HELD_OUT_MIN:
        counts = held_out["campaign"].value_counts(sort=False)
        told = ", ".join(f"{day}: {count:,}" for day, count in counts.items())
        named = f" ({told})" if told else ""
        return (
            f"too few: {count_noun(len(held_out), 'customer')} held out in closed campaigns{named}, at least "
            f"{HELD_OUT_MIN} are needed"
        )
    for arm, name in ((TREATED, "treated"), (HELD_OUT, "held out")):
        outcomes = rows.loc[rows["arm"] == arm, "outcome"]
        left, stayed = int(outcomes.sum()), int((1 - outcomes).sum())
        if min(left, stayed) < OUTCOMES_MIN:
            return (
                f"too few: of the customers {name} {left:,} left and {stayed:,} stayed, at least {OUTCOMES_MIN} of "
                "each are needed"
            )
    return None


def try_uplift(
    rows: pd.DataFrame, inputs: pd.DataFrame, features: Sequence[Feature], *, seed: int, bootstrap: Bootstrap
) -> Trial:
    """Compare a list by uplift with the list by ``before``, paired, on customers whom the learner has not seen.

    Customers are dealt into five parts; a learner of four parts ranks the fifth. Both lists are cut alike. The interval
    is of these lists: customers are drawn, and no learner is fitted again.

    Parameters
    ----------
    rows, inputs : DataFrame, shape (n, ...)
        As for `learn_effect`; the rows have also ``customer_id``, ``campaign``, ``worth`` (what a customer is worth if
        kept) and ``before``, by which the other list is ranked.
    bootstrap
        Its customers are those of the rows.
    """
    if shortage := find_shortage(rows):
        return Trial(False, shortage)
    shares = [hash_share(f"uplift {seed}", name) for name in rows["customer_id"]]
    part = (np.array(shares) * FOLDS).astype(int)
    effect = np.zeros(len(rows))
    for one in np.unique(part):
        learner = learn_effect(rows[part != one], inputs[part != one], features)
        effect[part == one] = predict_effect(learner, inputs[part == one])
    kept, weights = transform_outcomes(rows)
    worth = rows["worth"].to_numpy()
    gains, orders = kept * worth, [_order(effect * worth, part), _order(rows["before"].to_numpy(), part)]
    points = [measure_qini(gains, order, weights) for order in orders]
    draws = np.array(
        [[measure_qini(gains, order, weights * counts) for order in orders] for counts in bootstrap.draw(len(rows))]
    )
    found = [
        Estimate(point, *bootstrap.find_interval(drawn))
        for point, drawn in zip((*points, points[0] - points[1]), (*draws.T, draws[:, 0] - draws[:, 1]), strict=True)
    ]
    wins = found[2].low > 0
    reason = "its list keeps more" if wins else "no gain is shown: the interval of the difference is not above zero"
    return Trial(wins, reason, *found)


def _order(figure: Floats, part: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows by a figure, the highest first; each part by itself, since learners of different parts differ in level."""
    place = pd.Series(figure).groupby(part).rank(ascending=False, pct=True, method="first")
    return np.argsort(place.to_numpy(), kind="stable")


def describe_trial(trial: Trial) -> str:
    """The trial in a sentence, for people."""
    if trial.qini is None or trial.qini_before is None or trial.difference is None:
        return trial.reason
    difference = trial.difference
    return (
        f"{trial.reason}; Qini {trial.qini.value:.4g} by uplift, {trial.qini_before.value:.4g} without, difference "
        f"{difference.value:+.4g} (95% interval {difference.low:+.4g} to {difference.high:+.4g})"
    )
