"""Uncertainty of figures: resamples of rows, or of whole customers, and the intervals that they give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from closedloop.errors import DataError, count_noun

Floats = npt.NDArray[np.float64]


class UnusableScores(DataError, ValueError):
    """Labels and scores that no figure can be computed from: one class only, missing values, unequal lengths."""


class Interval(NamedTuple):
    """Both ends of a confidence interval, in the figure's own unit."""

    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """How uncertainty is found (percentile bootstrap, Efron 1979): the same seed gives the same resamples.

    ``customers`` has the customer of each row, shape (n,), or is None. Where ids repeat, whole customers are drawn
    (the cluster bootstrap): a customer's snapshots resemble each other, and drawing single rows would call the model
    more certain than it is.
    """

    seed: int
    samples: int = 1000
    level: float = 0.95
    customers: npt.ArrayLike | None = None

    def draw(self, rows: int) -> Iterator[Floats]:
        """Yield ``samples`` resamples as how often each row was drawn, shape (rows,); the sum varies with customers.

        Raises
        ------
        UnusableScores
            If there is not one customer a row.
        """
        generator = np.random.default_rng(self.seed)
        given = np.arange(rows) if self.customers is None else np.asarray(self.customers, dtype=object)
        owners = pd.factorize(given)[0]
        if len(owners) != rows or (owners < 0).any():
            raise UnusableScores(
                f"customers: found {count_noun(len(owners), 'id')}, allowed are {rows} without a missing one"
            )
        units = int(owners.max()) + 1
        for _ in range(self.samples):
            counts = np.bincount(generator.integers(0, units, units), minlength=units).astype(np.float64)
            yield counts[owners]

    def find_interval(self, draws: Floats) -> Interval:
        """The central ``level`` of what was computed of the resamples, without those that had no figure (nan)."""
        known = draws[~np.isnan(draws)]
        if not len(known):
            return Interval(float("nan"), float("nan"))
        low, high = np.quantile(known, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Interval(float(low), float(high))
