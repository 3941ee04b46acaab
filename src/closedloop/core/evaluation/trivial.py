"""The simplest models one could ship instead: one score for all customers, or a rule on recency alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from closedloop.core.evaluation.bootstrap import Bootstrap, Floats, Interval
from closedloop.core.evaluation.metrics import list_log_losses


@dataclass(frozen=True)
class RecencyRule:
    """The simplest model one could ship: churn depends on the days since the last purchase alone."""

    threshold_days: float
    churns_above: bool

    def predict(self, recency_days: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Decisions, shape (n,): above the threshold, or at and below it, customers churn."""
        above: npt.NDArray[np.bool_] = np.asarray(recency_days, dtype=np.float64) > self.threshold_days
        return above if self.churns_above else ~above


@dataclass(frozen=True)
class Gains:
    """The savings of a model against a trivial rule on the same rows, each with its paired interval.

    ``log_loss_gain`` is the share of the rule's log loss that the model saves (1: all of it; below 0: the model is
    worse); ``accuracy_lead`` is the model's accuracy minus the rule's.
    """

    log_loss_gain: float
    log_loss_interval: Interval
    accuracy_lead: float
    accuracy_interval: Interval


def measure_gains(
    labels: npt.ArrayLike,
    scores: Floats,
    threshold: float,
    trivial_scores: Mapping[str, Floats],
    bootstrap: Bootstrap,
) -> dict[str, Gains]:
    """The model's gains against each trivial rule; the resamples are the same for all.

    Parameters
    ----------
    labels, scores, threshold
        Of the model on test rows: 0/1 and probabilities of churn in [0, 1], shape (n,).
    trivial_scores
        Probabilities of churn of the same rows by the rule's name; a rule calls a churner from 0.5 on.

    Examples
    --------
    >>> labels, scores = np.tile([0, 0, 0, 1], 50), np.tile([0.1, 0.1, 0.1, 0.7], 50)
    >>> gains = measure_gains(labels, scores, 0.5, {"one rate": np.full(200, 0.25)}, Bootstrap(seed=1, samples=50))
    >>> round(gains["one rate"].log_loss_gain, 3), gains["one rate"].accuracy_lead
    (0.701, 0.25)
    """
    truth = np.asarray(labels).astype(np.int8)
    loss, right = list_log_losses(truth, scores), (scores >= threshold) == truth
    losses = {name: list_log_losses(truth, given) for name, given in trivial_scores.items()}
    leads = {name: right.astype(float) - ((given >= 0.5) == truth) for name, given in trivial_scores.items()}
    draws = [
        [(1 - counts @ loss / (counts @ losses[name]), counts @ leads[name] / counts.sum()) for name in losses]
        for counts in bootstrap.draw(len(truth))
    ]
    found = np.array(draws)
    return {
        name: Gains(
            float(1 - loss.sum() / losses[name].sum()),
            bootstrap.find_interval(found[:, place, 0]),
            float(leads[name].mean()),
            bootstrap.find_interval(found[:, place, 1]),
        )
        for place, name in enumerate(losses)
    }


def score_recency(train_days: npt.ArrayLike, train_labels: npt.ArrayLike, days: npt.ArrayLike) -> Floats:
    """Probabilities of churn by the best recency rule: the churn rate of the training rows on the same side.

    >>> score_recency([1, 2, 40, 50], [0, 0, 1, 1], [3, 1])
    array([0.83333333, 0.16666667])
    """
    rule = fit_recency_rule(train_days, train_labels)
    called, truth = rule.predict(train_days), np.asarray(train_labels).astype(bool)
    # half a churner and half a stayer are added: a rate of exactly 0 or 1 would have no finite loss
    rates = [(truth[called == side].sum() + 0.5) / ((called == side).sum() + 1) for side in (False, True)]
    return np.array(rates)[rule.predict(days).astype(np.int64)]


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
