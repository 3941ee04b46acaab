"""Rules for drift in common use, on the same windows as the project's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

RESAMPLES = 300


def measure_psi(reference: np.ndarray, window: np.ndarray) -> float:
    """The population stability index over ten bins of about equal reference counts."""
    groups = np.minimum((np.cumsum(reference) - 1) * 10 // reference.sum(), 9).clip(0)
    one, other = (np.bincount(groups, counts, minlength=10) / counts.sum() for counts in (reference, window))
    one, other = one.clip(1e-4), other.clip(1e-4)
    return float(((other - one) * np.log(other / one)).sum())


def measure_distance(found: Any, window: np.ndarray) -> float:
    """The distance that `closedloop.core.monitoring.drift.compare` calls effect, without its p value."""
    gap = found.counts / found.counts.sum() - window / window.sum()
    if found.edges is None:
        return float(np.abs(gap).sum() / 2)
    return float(np.abs(np.cumsum(gap)).max())


def find_threshold(
    sketches: Mapping[str, Any], codes: Mapping[str, np.ndarray], size: int, rate: float, rng: np.random.Generator
) -> float:
    """The largest distance over all features that windows drawn from the reference itself exceed at this rate."""
    rows = len(next(iter(codes.values())))
    worst = []
    for _ in range(RESAMPLES):
        drawn = rng.choice(rows, size)
        counts = {name: np.bincount(codes[name][drawn], minlength=len(f.counts)) for name, f in sketches.items()}
        worst.append(max(measure_distance(found, counts[name]) for name, found in sketches.items()))
    return float(np.quantile(worst, 1 - rate))


def run_evidently(reference: pd.DataFrame, window: pd.DataFrame) -> dict[str, Any]:
    """Evidently's default preset: how many columns it calls drifted, and their share; from half on it is drift."""
    from evidently import Report
    from evidently.presets import DataDriftPreset

    metrics = Report([DataDriftPreset()]).run(window, reference).dict()["metrics"]
    return dict(next(one["value"] for one in metrics if "DriftedColumnsCount" in one["metric_name"]))
