"""Tables behind the plots: calibration, lift, and the ROC and precision-recall curves."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from closedloop.core.evaluation.metrics import CALIBRATION_BINS, bin_scores, check_scores

CURVE_POINTS_MAX = 200


def tabulate_calibration(labels: npt.ArrayLike, scores: npt.ArrayLike, bins: int = CALIBRATION_BINS) -> pd.DataFrame:
    """Predicted against actual churn in equal-count bins, lowest scores first.

    Rows of equal score share a bin (the one of their mean rank), so the table does not depend on row order; bins
    that ties leave empty are dropped. Columns: ``bin`` (from 1), ``rows``, ``lowest_score``, ``highest_score``,
    ``mean_score``, ``churn_rate``.
    """
    truth, score = check_scores(labels, scores, both_classes=False)
    table = bin_scores(truth, score, bins)
    return table[["bin", "rows", "lowest_score", "highest_score", "mean_score", "churn_rate"]]


def tabulate_lift(labels: npt.ArrayLike, scores: npt.ArrayLike) -> pd.DataFrame:
    """The churners that calling each score decile would catch, highest scores first.

    Columns: ``decile`` (1 = highest scores; ties as in `tabulate_calibration`), ``rows``, ``churners``,
    ``churn_rate``, ``lift`` (churn rate over that of all rows), ``contacted_share`` and ``captured_share`` (of all
    rows and of all churners, down to this decile).
    """
    truth, score = check_scores(labels, scores)
    table = bin_scores(truth, score, 10).iloc[::-1].reset_index(drop=True)
    table["decile"] = 11 - table["bin"]
    table["lift"] = table["churn_rate"] / truth.mean()
    table["contacted_share"] = table["rows"].cumsum() / len(truth)
    table["captured_share"] = table["churners"].cumsum() / truth.sum()
    return table[["decile", "rows", "churners", "churn_rate", "lift", "contacted_share", "captured_share"]]


def tabulate_curve(
    labels: npt.ArrayLike, scores: npt.ArrayLike, kind: Literal["roc", "precision_recall"]
) -> pd.DataFrame:
    """Points of the ROC or the precision-recall curve, thinned evenly to at most 200; both ends stay.

    Columns: ``false_positive_rate``, ``true_positive_rate`` or ``recall``, ``precision``; and ``threshold``, nan at
    the end that no score reaches.
    """
    from sklearn import metrics

    truth, score = check_scores(labels, scores)
    if kind == "roc":
        false_rate, true_rate, thresholds = metrics.roc_curve(truth, score, drop_intermediate=False)
        columns = {"false_positive_rate": false_rate, "true_positive_rate": true_rate}
    else:
        precision, recall, thresholds = metrics.precision_recall_curve(truth, score)
        columns = {"recall": recall, "precision": precision}
        thresholds = np.append(thresholds, np.nan)
    table = pd.DataFrame({**columns, "threshold": np.where(np.isfinite(thresholds), thresholds, np.nan)})
    kept = np.unique(np.linspace(0, len(table) - 1, min(len(table), CURVE_POINTS_MAX)).round().astype(int))
    return table.iloc[kept].reset_index(drop=True)
