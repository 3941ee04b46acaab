"""The worth of each retraining policy against never retraining: paired, by customer, all policies together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from closedloop.core.evaluation.bootstrap import Bootstrap, Floats, Interval

NEVER = "never"
LIST_SHARE = 0.2  # of the customers of a snapshot: how long a list of calls is


class Worth(NamedTuple):
    """The savings of a policy against ``never``, each figure with the interval that holds for all policies together.

    ``gain`` is log loss a prediction, nats; ``found`` is the number of leavers more in the lists of the fifth with the
    highest scores.
    """

    gain: float
    gain_interval: Interval
    found: float
    found_interval: Interval


def find_listed(labels: npt.ArrayLike, scores: npt.ArrayLike) -> Floats:
    """For each row of a snapshot, by how much it is a leaver on the list of the highest scores, shape (n,).

    0 or 1, but that rows which tie at the end of the list share its last places.

    Examples
    --------
    >>> find_listed([1, 0, 1, 0, 0], [0.9, 0.8, 0.2, 0.1, 0.1]).tolist()
    [1.0, 0.0, 0.0, 0.0, 0.0]
    """
    truth, score = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    size = LIST_SHARE * len(score)
    last = np.sort(score)[::-1][max(int(np.ceil(size)) - 1, 0)]
    above, tied = score > last, score == last
    places: Floats = above + tied * (size - above.sum()) / tied.sum()
    return truth * places


def weigh_policies(
    customers: npt.ArrayLike,
    losses: Mapping[str, Floats],
    listed: Mapping[str, Floats],
    bootstrap: Bootstrap,
) -> dict[str, Worth]:
    """Compare every policy with ``never`` on the same rows, by a paired bootstrap over customers.

    The intervals hold for all policies together: with ``k`` of them each has the level 1 - (1 - level) / k (Bonferroni;
    Dunn 1961, Journal of the American Statistical Association 56), so that at most about (1 - level) / 2 of histories
    in which none is better show one that seems to be.

    Parameters
    ----------
    customers
        The customer of each row, shape (n,).
    losses, listed
        By policy, ``never`` among them: log loss of each row, and `find_listed` of each row.
    bootstrap
        Its customers are those given here.

    Examples
    --------
    >>> base, better = np.full(200, 0.7), np.tile([0.5, 0.7], 100)
    >>> losses, listed = {"never": base, "drift": better}, {"never": np.zeros(200), "drift": np.zeros(200)}
    >>> found = weigh_policies(np.arange(200), losses, listed, Bootstrap(seed=1))["drift"]
    >>> round(found.gain, 3), found.gain_interval.low > 0
    (0.1, True)
    """
    others = [name for name in losses if name != NEVER]
    if not others:
        return {}
    owners, units = pd.factorize(np.asarray(customers, dtype=object))
    gaps = [losses[NEVER] - losses[name] for name in others] + [listed[name] - listed[NEVER] for name in others]
    sums = np.stack([np.bincount(owners, gap, len(units)) for gap in gaps], axis=1)
    rows = np.bincount(owners, minlength=len(units)).astype(np.float64)
    together = replace(
        bootstrap,
        customers=None,
        samples=bootstrap.samples * len(others),
        level=1 - (1 - bootstrap.level) / len(others),
    )
    draws = np.array([np.r_[counts @ sums, counts @ rows] for counts in together.draw(len(units))])
    found = {}
    for place, name in enumerate(others):
        gains = draws[:, place] / draws[:, -1]
        more = draws[:, len(others) + place]
        found[name] = Worth(
            float(gaps[place].mean()),
            together.find_interval(gains),
            float(gaps[len(others) + place].sum()),
            together.find_interval(more),
        )
    return found


def pick_policy(worth: Mapping[str, Worth], retrainings: Mapping[str, int], *, gain_min: float = 0.0) -> str:
    """The policy that saves most among those that save ``gain_min`` for certain; ``never`` if there is none.

    Of two that save the same, the one with fewer retrainings.

    Examples
    --------
    >>> sure, unsure = Interval(0.01, 0.03), Interval(-0.01, 0.09)
    >>> worth = {"drift": Worth(0.02, sure, 0, sure), "own": Worth(0.04, unsure, 0, unsure)}
    >>> pick_policy(worth, {"drift": 3, "own": 1}), pick_policy({"own": worth["own"]}, {"own": 1})
    ('drift', 'never')
    """
    certain = [name for name in worth if worth[name].gain_interval.low > gain_min]
    return min(certain, key=lambda name: (-round(worth[name].gain, 9), retrainings[name]), default=NEVER)
