"""Whether a window of rows comes from where the reference rows came from: calibrated alarms on bounded sketches.

Every feature becomes counts in at most 256 bins of the reference, so that a comparison costs the same however many
rows stand behind it. The null is that of two samples, so that it knows the finite reference and the window's size;
Holm's correction knows the number of features; and a difference that is certain but small is no alarm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]
BinCounts = npt.NDArray[np.int64]
BINS = 256
EXPECTED_COUNT_MIN = 5.0  # below it the chi-square distribution is not that of the statistic (Cochran 1954)


@dataclass(frozen=True)
class Sketch:
    """The bins of one feature and the reference's counts in them.

    Parameters
    ----------
    edges : ndarray of float, shape (bins - 1,), or None
        Upper ends of all bins but the last one; None for a categorical feature.
    categories : tuple of str
        Of a categorical feature; anything else shares one bin after them.
    counts : ndarray of int, shape (bins + 1,)
        Rows of the reference in each bin; the last place counts missing values.
    """

    edges: Floats | None
    categories: tuple[str, ...]
    counts: BinCounts

    def encode(self, values: pd.Series) -> BinCounts:
        """The bin of each value, shape (n,); the last one for a missing value."""
        last = len(self.counts) - 1
        missing = values.isna().to_numpy()
        if self.edges is None:
            codes = pd.Categorical(values, categories=self.categories).codes.astype(np.int64)
            codes = np.where(codes < 0, len(self.categories), codes)
        else:
            codes = np.searchsorted(self.edges, values.to_numpy(np.float64, na_value=0.0), side="left")
        return np.where(missing, last, codes)

    def count(self, values: pd.Series) -> BinCounts:
        """Values in each bin, as ``counts``."""
        return np.bincount(self.encode(values), minlength=len(self.counts))


class Shift(NamedTuple):
    """How far a window is from the reference, 0 to 1, and how often chance alone brings it as far."""

    effect: float
    p_value: float


def sketch(values: pd.Series, categories: Sequence[str] | None = None) -> Sketch:
    """Sketch a feature of the reference: numeric unless ``categories`` are given.

    Of at most 128 different values each has a bin, and so has what lies between them; more fall between quantiles.

    Examples
    --------
    >>> sketch(pd.Series([1.0, 2.0, 2.0, None])).counts.tolist()
    [0, 1, 0, 2, 0, 1]
    """
    if categories is not None:
        empty = Sketch(None, tuple(categories), np.zeros(len(categories) + 2, np.int64))
    else:
        known = values.dropna().to_numpy(np.float64)
        values_at = np.unique(known)
        if len(values_at) > BINS // 2:
            points = np.linspace(0, 1, BINS // 2)
            values_at = np.unique(np.quantile(known, points, method="inverted_cdf"))
        # each of them ends a bin, and so does what lies just below: they have bins of their own
        edges = np.unique(np.r_[np.nextafter(values_at, -np.inf), values_at])
        empty = Sketch(edges, (), np.zeros(len(edges) + 2, np.int64))
    return Sketch(empty.edges, empty.categories, empty.count(values))


def compare(reference: Sketch, window: BinCounts) -> Shift:
    """Compare a window's counts with the reference's.

    Numeric: Kolmogorov and Smirnov's two-sample distance at the bins' edges, with Stephens' (1970) approximation of
    its distribution, which ties and bins make smaller, never larger. Categorical: the chi-square test of
    homogeneity, rare categories pooled; the effect is the total variation distance. A numeric feature's missing
    values are tested beside, at the price of a factor of two.

    Parameters
    ----------
    window : ndarray of int, shape of ``reference.counts``
    """
    if reference.edges is None:
        return _compare_shares(reference.counts, window)
    shift = _compare_distributions(reference.counts[:-1], window[:-1])
    missing = np.array([[counts[:-1].sum(), counts[-1]] for counts in (reference.counts, window)])
    if not missing[:, 1].any():
        return shift
    gap = _compare_shares(missing[0], missing[1])
    return Shift(max(shift.effect, gap.effect), min(1.0, 2 * min(shift.p_value, gap.p_value)))


def find_drifted(shifts: Mapping[str, Shift], *, false_alarm_rate: float, effect_min: float) -> list[str]:
    """The features that drifted, the largest effect first.

    With ``false_alarm_rate`` 0.01 one check in a hundred, at most, names any feature of a window that is a sample of
    what the reference is a sample of.
    """
    from statsmodels.stats.multitest import multipletests

    # Holm (1979), for any dependence between the tests
    sure, *_ = multipletests([shift.p_value for shift in shifts.values()], alpha=false_alarm_rate, method="holm")
    drifted = [
        name
        for (name, shift), is_sure in zip(shifts.items(), sure, strict=True)
        if is_sure and shift.effect >= effect_min
    ]
    return sorted(drifted, key=lambda name: -shifts[name].effect)


def find_beyond_limits(
    reference: pd.DataFrame,
    window: pd.DataFrame,
    drifted: Sequence[str],
    *,
    drifted_share_max: float = 0.3,
    missing_share_max: float = 0.05,
    mean_sigmas_max: float = 3.0,
) -> list[str]:
    """The plain fixed limits: every one that the window is beyond, in words.

    Parameters
    ----------
    reference, window : DataFrame
        The features; the window also has ``customer_id``, none of which may be missing.
    drifted : sequence of str
        Names of features that drifted.
    """
    found = []
    share = len(drifted) / len(reference.columns)
    if share >= drifted_share_max:
        found.append(f"drifted share {share:.2f}, below {drifted_share_max:g} is allowed")
    if nameless := int(window["customer_id"].isna().sum()):
        found.append(f"predictions without customer_id: {nameless}, none is allowed")
    for name in reference.columns:
        missing = float(window[name].isna().mean())
        if missing >= missing_share_max:
            found.append(f"{name}: {missing:.3f} missing, below {missing_share_max:g} is allowed")
        if not pd.api.types.is_numeric_dtype(reference[name]):
            continue
        mean, deviation = reference[name].mean(), reference[name].std(ddof=0)
        distance = abs(window[name].mean() - mean)
        if distance > mean_sigmas_max * deviation:
            sigmas = distance / deviation if deviation else np.inf
            found.append(f"{name}: mean is {sigmas:.1f} standard deviations off, at most {mean_sigmas_max:g}")
    return found


def _compare_distributions(reference: BinCounts, window: BinCounts) -> Shift:
    from scipy.stats import kstwobign

    rows, window_rows = int(reference.sum()), int(window.sum())
    if not rows or not window_rows:
        return Shift(0.0, 1.0)  # a feature that is missing altogether shows in its missing values
    distance = float(np.abs(np.cumsum(reference) / rows - np.cumsum(window) / window_rows).max())
    root = np.sqrt(rows * window_rows / (rows + window_rows))
    return Shift(distance, float(kstwobign.sf((root + 0.12 + 0.11 / root) * distance)))


def _compare_shares(reference: BinCounts, window: BinCounts) -> Shift:
    from scipy.stats import chi2_contingency
    from scipy.stats.contingency import expected_freq

    table = np.array([reference, window], dtype=np.float64)
    rows = table.sum(axis=1, keepdims=True)
    if not rows.all():
        return Shift(0.0, 1.0)
    effect = float(np.abs(table[0] / rows[0] - table[1] / rows[1]).sum() / 2)
    rare = expected_freq(table).min(axis=0) < EXPECTED_COUNT_MIN
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(axis=1)])
    table = table[:, table.sum(axis=0) > 0]
    # of a single column nothing can differ; two columns of two rows get no continuity correction
    return Shift(effect, float(chi2_contingency(table, correction=False).pvalue))
