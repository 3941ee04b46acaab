"""Evidently: reports for people, of bounded samples; the verdict comes from `core.monitoring` and not from here."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from closedloop.adapters.jinja import disarm
from closedloop.files import replace_file

if TYPE_CHECKING:
    import pandas as pd

METHOD = "psi"  # pinned: the default method depends on the row count, and some methods show drift by low figures
PSI_MAX = 0.2  # the usual rule of thumb


def write_data_reports(
    path: Path,
    path_all: Path,
    current: pd.DataFrame,
    reference: pd.DataFrame,
    *,
    numeric: Collection[str],
    first: Collection[str],
) -> dict[str, float]:
    """Write the drift of some columns as one HTML file, and drift and quality of every column as another.

    Parameters
    ----------
    path, path_all
        The short page, with the columns of ``first`` in their order, and the long one.
    current, reference : DataFrame
        The features and ``score``; ``numeric`` names the columns that are numbers, the others are categories.

    Returns
    -------
    dict
        The population stability index by column; a column that is all missing in either frame has no entry.
    """
    from evidently import DataDefinition
    from evidently.metrics import DriftedColumnsCount, ValueDrift
    from evidently.presets import DataSummaryPreset

    given = list(reference.columns)
    current, reference = (_disarm(frame[given], numeric) for frame in (current, reference))
    names, numbers = list(reference.columns), {disarm(name) for name in numeric}
    filled = [name for name in names if current[name].notna().any() and reference[name].notna().any()]
    drift = {name: ValueDrift(column=name, method=METHOD, threshold=PSI_MAX) for name in filled}
    metrics: list[Any] = [DataSummaryPreset(columns=names)]
    if filled:
        metrics = [DriftedColumnsCount(columns=filled, method=METHOD, threshold=PSI_MAX), *drift.values(), *metrics]
    categorical = [name for name in names if name not in numbers]
    kinds = DataDefinition(numerical_columns=sorted(numbers), categorical_columns=categorical)
    found = _write(path_all, metrics, kinds, current, reference)
    shown = [drift[name] for name in map(disarm, first) if name in drift]
    _write(path, shown or metrics[:1], kinds, current, reference)
    values = {entry["config"].get("column"): entry["value"] for entry in found if "ValueDrift" in entry["metric_name"]}
    return {name: float(values[disarm(name)]) for name in given if disarm(name) in filled}


def write_outcome_report(path: Path, closed: pd.DataFrame, reference: pd.DataFrame, threshold: float) -> bool:
    """Write the classification quality of rows with known outcomes, beside the reference's, as one HTML file.

    Parameters
    ----------
    closed, reference : DataFrame
        ``score``, and ``outcome`` or ``churned``: 0 or 1.

    Returns
    -------
    bool
        False, and no file, if either frame has one class only: most figures are undefined then, and Evidently fails.
    """
    from evidently import BinaryClassification, DataDefinition
    from evidently.presets import ClassificationPreset

    frames = [closed, reference.rename(columns={"churned": "outcome"})]
    frames = [frame[["score", "outcome"]].astype({"outcome": int}) for frame in frames]
    if any(frame["outcome"].nunique() < 2 for frame in frames):
        return False
    task = BinaryClassification(target="outcome", prediction_probas="score", pos_label=1)
    kinds = DataDefinition(numerical_columns=["score"], categorical_columns=["outcome"], classification=[task])
    _write(path, [ClassificationPreset(probas_threshold=threshold)], kinds, *frames)
    return True


def _disarm(frame: pd.DataFrame, numeric: Collection[str]) -> pd.DataFrame:
    """Replace markup characters in names and categories, which Evidently writes unescaped into its page."""
    shown = frame.copy()
    for name in shown.columns.difference(list(numeric)):
        shown[name] = shown[name].map(disarm, na_action="ignore")
    return shown.rename(columns=disarm)


def _write(
    path: Path, metrics: Sequence[Any], kinds: Any, current: pd.DataFrame, reference: pd.DataFrame
) -> list[dict[str, Any]]:
    from evidently import Dataset, Report

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it divides by the count of a column's values, which may be zero
        frames = [Dataset.from_pandas(frame.reset_index(drop=True), kinds) for frame in (current, reference)]
        made = Report(list(metrics)).run(*frames)
        with replace_file(path) as beside:
            made.save_html(str(beside))
        found: list[dict[str, Any]] = made.dict()["metrics"]
    return found
