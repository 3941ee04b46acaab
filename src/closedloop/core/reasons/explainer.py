"""Reasons for scores: contributions of the contract's features to the raw score, summed by reason and sorted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Shapley(Protocol):
    """Contributions to a model's raw score; ``base`` is what it is without knowing any column."""

    base: float

    def weigh(self, matrix: np.ndarray) -> np.ndarray:
        """Contributions (n, n_columns) of rows."""


class Reason(NamedTuple):
    """A feature's part in a score: ``contribution`` is in units of the raw score, above 0 towards churn.

    ``reason`` is a group of the contract or a single feature; ``feature`` is the one of the group that contributes
    most, and ``value`` is its value.
    """

    reason: str
    feature: str
    value: float | str | None
    contribution: float


class Explained(NamedTuple):
    """A raw score, which is ``base`` and all contributions, and the strongest reasons for it."""

    raw_score: float
    base: float
    reasons: list[Reason]


class Ranked(NamedTuple):
    """The strongest reasons of n rows: places in `Explainer.names` and of features, and contributions: (n, reasons)."""

    reason: np.ndarray
    feature: np.ndarray
    contribution: np.ndarray


class Explainer:
    """Explains the scores of one model.

    Parameters
    ----------
    features
        Names of the contract's features, in its order.
    groups
        Features that are summed into one reason, by the reason's name; every other feature is a reason of its own.
    shapley
        Of the columns that the model takes.
    prepare
        Makes those columns from packed rows, float32 (n, n_features).
    owners
        For each column the place of the feature that it is made from.
    """

    def __init__(
        self,
        features: Sequence[str],
        groups: Mapping[str, Sequence[str]],
        shapley: Shapley,
        prepare: Callable[[np.ndarray], np.ndarray],
        owners: np.ndarray,
    ) -> None:
        self._features, self._shapley, self._prepare, self._owners = tuple(features), shapley, prepare, owners
        grouped = {name for members in groups.values() for name in members}
        reasons = {**groups, **{name: (name,) for name in features if name not in grouped}}
        self.names = tuple(sorted(reasons))
        places = {name: place for place, name in enumerate(features)}
        self._members = [np.array([places[one] for one in sorted(reasons[name])]) for name in self.names]
        self.base = shapley.base

    def weigh(self, matrix: np.ndarray) -> np.ndarray:
        """Contributions, float64 (n, n_features), of packed rows; with ``base`` they sum to the raw scores."""
        found = self._shapley.weigh(self._prepare(matrix))
        total = np.zeros((len(matrix), len(self._features)))
        for column, owner in enumerate(self._owners):
            total[:, owner] += found[:, column]
        return total

    def rank(self, contributions: np.ndarray, top: int) -> Ranked:
        """The ``top`` reasons of each row, the largest contribution first and ties by name."""
        sums = np.stack([contributions[:, members].sum(axis=1) for members in self._members], axis=1)
        order = np.argsort(-np.abs(sums), axis=1, kind="stable")[:, :top]
        leading = np.empty(sums.shape, dtype=np.intp)
        for place, members in enumerate(self._members):
            leading[:, place] = members[np.abs(contributions[:, members]).argmax(axis=1)]
        return Ranked(order, np.take_along_axis(leading, order, axis=1), np.take_along_axis(sums, order, axis=1))

    def explain(self, matrix: np.ndarray, rows: Sequence[Sequence[float | str | None]], top: int) -> list[Explained]:
        """The reasons of each row: packed in ``matrix``, and as values in the contract's order in ``rows``."""
        contributions = self.weigh(matrix)
        raw_scores = (self.base + contributions.sum(axis=1)).tolist()
        ranked = (part.tolist() for part in self.rank(contributions, top))
        return [
            Explained(
                raw_score,
                self.base,
                [
                    Reason(self.names[reason], self._features[feature], values[feature], contribution)
                    for reason, feature, contribution in zip(*one, strict=True)
                ],
            )
            for raw_score, values, *one in zip(raw_scores, rows, *ranked, strict=True)
        ]


def find_owners(prepare: Callable[[np.ndarray], np.ndarray], categories: Sequence[int | None]) -> np.ndarray:
    """For each prepared column the place of the feature that moves it, found by changing one feature at a time.

    Parameters
    ----------
    categories
        How many categories each feature has; None for a number.
    """
    blank = np.array([np.nan if count is None else -1 for count in categories], dtype=np.float32)
    rows, changed = [blank], [-1]
    for place, count in enumerate(categories):
        for value in (0.0, 1.0) if count is None else range(count):
            row = blank.copy()
            row[place] = value
            rows.append(row)
            changed.append(place)
    found = np.nan_to_num(prepare(np.array(rows)), nan=float(np.finfo(np.float32).max))
    owners = np.full(found.shape[1], -1)
    for row, place in zip(found[1:], changed[1:], strict=True):
        owners[row != found[0]] = place
    if (owners < 0).any():
        raise ValueError(f"column {int(np.argmin(owners))} follows from no feature")
    return owners
