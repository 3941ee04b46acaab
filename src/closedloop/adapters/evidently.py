"""Evidently: reports for people, of bounded samples; the verdict comes from `core.monitoring` and not from here."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from closedloop.files import replace_file

if TYPE_CHECKING:
    import pandas as pd

METHOD = "psi"  # unpinned it changes with the rows, and with it whether a high figure means drift or none
PSI_MAX = 0.2  # the usual rule of thumb


def write_data_report(
    path: Path, current: pd.DataFrame, reference: pd.DataFrame, *, numeric: Collection[str]
) -> dict[str, float]:
    """Write drift of every column of ``reference`` and the quality of both frames as one HTML file.

    Parameters
    ----------
    current, reference : DataFrame
        The features and ``score``; ``numeric`` names the columns that are numbers, the others are categories.

    Returns
    -------
    dict
        The population stability index by column; one that is all missing in either frame has none.
    """
    from evidently import DataDefinition
    from evidently.metrics import DriftedColumnsCount, ValueDrift
    from evidently.presets import DataSummaryPreset

    names = list(reference.columns)
    filled = [name for name in names if current[name].notna().any() and reference[name].notna().any()]
    drift = [ValueDrift(column=name, method=METHOD, threshold=PSI_MAX) for name in filled]
    metrics: list[Any] = [DataSummaryPreset(columns=names)]
    if filled:
        metrics = [DriftedColumnsCount(columns=filled, method=METHOD, threshold=PSI_MAX), *drift, *metrics]
    categorical = [name for name in names if name not in numeric]
    kinds = DataDefinition(numerical_columns=sorted(numeric), categorical_columns=categorical)
    found = _write(path, metrics, kinds, current[names], reference)
    values = {entry["config"].get("column"): entry["value"] for entry in found if "ValueDrift" in entry["metric_name"]}
    return {name: float(values[name]) for name in filled}


def write_outcome_report(path: Path, closed: pd.DataFrame, reference: pd.DataFrame, threshold: float) -> bool:
    """Write how the scores of rows with known outcomes did, beside the reference's, as one HTML file.

    Parameters
    ----------
    closed, reference : DataFrame
        ``score``, and ``outcome`` or ``churned``: 0 or 1.

    Returns
    -------
    bool
        False, and no file, if either has one class only: most figures are not defined there, and Evidently fails.
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
