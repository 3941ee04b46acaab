"""The cost of training on a draw of the rows: the same recipe on halves of the draw, on the same test rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from closedloop.config.featureset import FeatureSet
from closedloop.config.params import Params
from closedloop.core.evaluation.bootstrap import Bootstrap
from closedloop.core.evaluation.metrics import list_log_losses
from closedloop.core.training.draw import draw_rows
from closedloop.core.training.estimators import score
from closedloop.core.training.weights import WEIGHT
from closedloop.stages.parts.challengers import list_recent
from closedloop.stages.parts.fitting import Fitted, fit

# Normal, and Student's with a degree of freedom less than there are halves.
HALVES, Z, T = 4, 1.96, 3.182
logger = logging.getLogger(__name__)


def measure_draw(
    params: Params, feature_set: FeatureSet, fitted: Fitted, rows: Mapping[str, pd.DataFrame]
) -> dict[str, Any] | None:
    """The gain of all rows over the draw that trained ``fitted``, in log loss of test rows (None: all trained it).

    All rows are too many to train on. Where the loss that more rows would take away falls as one over their number,
    half of the draw loses to the draw what the draw loses to endless rows, so that ``cost`` is that difference times
    the share of the rows that was not drawn.

    Returns
    -------
    dict
        ``rows`` of the draw and ``known_rows`` that it stands for; ``half``: the difference between halves of the draw
        and the draw, with its 95% interval; ``cost``: that times the share not drawn. Or ``why`` there is no figure.
    """
    train = rows["train"]
    known_rows = round(train[WEIGHT].sum()) if WEIGHT in train else len(train)
    if known_rows == len(train):
        return None
    counts = {"rows": len(train), "known_rows": known_rows}
    if fitted.kind.startswith("recalibration"):
        return {**counts, "why": f"a {fitted.kind} is not trained on it"}
    if fitted.recent_share and (recent := list_recent(train, fitted.recent_share)) is not None:
        train = recent
    logger.info("fitting %d times on half of the draw, rows: %d", HALVES, len(train) // 2)
    half = _compare_halves(params, feature_set, fitted, {**rows, "train": train})
    left_out = 1 - counts["rows"] / known_rows
    return {**counts, "half": half, "cost": [left_out * value for value in half]}


def _compare_halves(
    params: Params, feature_set: FeatureSet, fitted: Fitted, rows: Mapping[str, pd.DataFrame]
) -> list[float]:
    """How far the log loss of halves of the draw lies above that of the draw, and the ends of its 95% interval.

    Two things are left to chance: which customers test, which resamples of them show, and which rows were drawn. How
    far halves of a draw differ from each other says how far draws do (McCarthy 1969, half-samples).
    """
    test, halves = rows["test"], []
    truth, used = test["churned"].to_numpy(), score(fitted.pipeline, test)
    for number in range(HALVES):
        half = draw_rows(rows["train"], len(rows["train"]) // 2, salt=f"{params.seed} half {number}")
        other = fit(params, feature_set, fitted.hyper_parameters, {**rows, "train": half})
        halves.append(list_log_losses(truth, score(other.pipeline, test)))
    before = list_log_losses(truth, used)
    differences = np.array([losses.mean() for losses in halves]) - before.mean()
    gaps = np.mean(halves, axis=0) - before
    bootstrap = Bootstrap(params.seed, customers=test["customer_id"].to_numpy())
    draws = np.array([counts @ gaps / counts.sum() for counts in bootstrap.draw(len(test))])
    error = np.hypot(draws.std(ddof=1) * Z, differences.std(ddof=1) * T)
    middle = float(differences.mean())
    return [middle, middle - float(error), middle + float(error)]
