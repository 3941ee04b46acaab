"""The challengers that a retraining makes: trained on all snapshots, on newest ones, or the champion recalibrated."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from closedloop.config.featureset import FeatureSet
from closedloop.config.params import ModelParams, Params
from closedloop.contract import Feature, check_digest, read_contract
from closedloop.core.evaluation.metrics import list_log_losses
from closedloop.core.training.calibration import recalibrate_pipeline
from closedloop.core.training.estimators import score
from closedloop.core.training.model_types import find_model_type
from closedloop.errors import GateFailed, count_noun
from closedloop.stages.parts.fitting import Fitted, cut, fit

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from closedloop.adapters.mlflow import Tracking

logger = logging.getLogger(__name__)
CLASS_ROWS_MIN, RECENT_CLASS_ROWS_MIN = 10, 100
# The newest third of the snapshots or of a table's days, and less: soon after a change the shortest knows it best.
RECENT_SHARES = (3, 6, 12)


@dataclass(frozen=True)
class Recalibrated:
    """A registered version's pipeline with a new intercept and slope, and the same without any."""

    version: int
    pipeline: Pipeline
    uncalibrated: Pipeline
    features: tuple[Feature, ...]


def recalibrate(
    tracking: Tracking, model: ModelParams, newest: pd.DataFrame, feature_set: FeatureSet
) -> Recalibrated | str:
    """Fit the scores of version ``model.recalibrates`` to the newest rows; or say why that cannot be.

    Parameters
    ----------
    newest
        Training rows (`list_newest`): their customers neither validate nor test.
    """
    version = model.recalibrates
    assert version is not None
    with tempfile.TemporaryDirectory() as folder:
        place, digest = tracking.fetch_version(str(version), Path(folder))
        check_digest(place, digest)
        contract = read_contract(place)
    if contract.feature_service != feature_set.service:
        return f"version {version} takes features of {contract.feature_service}"
    if contract.model_type != model.type:
        return f"version {version} is of type {contract.model_type}"
    return refit(version, tracking.load_pipeline(str(version), model.type), contract.features, newest)


def refit(version: int, pipeline: Pipeline, features: tuple[Feature, ...], newest: pd.DataFrame) -> Recalibrated | str:
    """Fit a pipeline's scores to the newest rows; or say why that cannot be."""
    truth = newest["churned"].to_numpy()
    if min(truth.sum(), len(truth) - truth.sum()) < CLASS_ROWS_MIN:
        return f"a class has fewer than {count_noun(CLASS_ROWS_MIN, 'training row')} among the newest"
    base, recalibrated = recalibrate_pipeline(pipeline, newest, truth)
    return Recalibrated(version, recalibrated, base, features)


def fit_sizes(
    params: Params, feature_set: FeatureSet, hyper_parameters: dict[str, Any], rows: Mapping[str, pd.DataFrame]
) -> list[Fitted]:
    """One training with these hyper-parameters; where there are none, one of the model type's smaller models beside it.

    What suits 20,000 customers learns 2,000 by heart, the more so where each of them has a row in a dozen snapshots.
    """
    small = find_model_type(params.model.type).small if not hyper_parameters else {}
    found = [fit(params, feature_set, hyper_parameters, dict(rows))]
    if small:
        found.append(replace(fit(params, feature_set, dict(small), dict(rows)), kind="training of a smaller model"))
    return found


def fit_best(
    params: Params, feature_set: FeatureSet, hyper_parameters: dict[str, Any], rows: Mapping[str, pd.DataFrame]
) -> Fitted:
    """The one of `fit_sizes` with the lowest log loss on validation rows."""
    return choose_best(fit_sizes(params, feature_set, hyper_parameters, rows), rows["validation"])


def choose_challenger(
    params: Params, feature_set: FeatureSet, fitted: Fitted, rows: Mapping[str, pd.DataFrame], other: Recalibrated | str
) -> Fitted:
    """Of a retraining, those on newest snapshots alone, and a recalibration: the lowest log loss on validation rows.

    ``other``: the recalibration, or why there is none.

    Raises
    ------
    GateFailed
        If there is no recalibration, and ``model.recalibrates_only`` asks for nothing else.
    """
    if isinstance(other, str):
        if params.model.recalibrates_only:
            raise GateFailed(f"not recalibrated: {other} (monitoring.policy recalibrate trains nothing else)")
        logger.info("not recalibrated: %s", other)
        return choose_best([fitted, *fit_recent(params, feature_set, fitted, rows)], rows["validation"])
    recalibrated = complete_recalibration(params, feature_set, other, rows["validation"])
    if params.model.recalibrates_only:
        return recalibrated
    trained = [fitted, *fit_recent(params, feature_set, fitted, rows)]
    return choose_best([*trained, recalibrated], rows["validation"])


def fit_recent(
    params: Params, feature_set: FeatureSet, fitted: Fitted, rows: Mapping[str, pd.DataFrame]
) -> list[Fitted]:
    """The same training on newest snapshots alone, for each share that has enough rows.

    Newest validation rows calibrate it: those of a table are of many days, and from before a change most of them.
    """
    given, found = {**rows, "validation": list_newest_validation(rows["validation"])}, []
    for share in RECENT_SHARES:
        recent = list_recent(rows["train"], share)
        if recent is None:
            continue
        on = f"on the newest {count_noun(recent['event_timestamp'].nunique(), 'snapshot')}"
        made = fit_sizes(params, feature_set, fitted.hyper_parameters, {**given, "train": recent})
        kinds = [one.kind for one in made] if len(made) > 1 else [fitted.kind]
        found += [replace(one, kind=f"{kind} {on}", recent_share=share) for one, kind in zip(made, kinds, strict=True)]
    return found


def list_newest_validation(rows: pd.DataFrame) -> pd.DataFrame:
    """Validation rows of the newest third of their snapshots or days; all of them if these are too few."""
    recent = list_recent(rows)
    return rows if recent is None else recent


def choose_best(candidates: Sequence[Fitted], validation: pd.DataFrame) -> Fitted:
    """The candidate with the lowest log loss on the newest validation rows."""
    validation = list_newest_validation(validation)
    truth = validation["churned"].to_numpy()
    losses = [float(list_log_losses(truth, score(each.pipeline, validation)).mean()) for each in candidates]
    for each, loss in zip(candidates, losses, strict=True):
        logger.info("log loss on validation rows %.5f: %s", loss, each.kind)
    return candidates[losses.index(min(losses))]


def list_newest(rows: pd.DataFrame, *, by_day: bool) -> pd.DataFrame:
    """Training rows of the newest snapshot; ``by_day``, of a table, whose one day is small: of the newest third."""
    recent = list_recent(rows) if by_day else None
    return rows[rows["event_timestamp"] == rows["event_timestamp"].max()] if recent is None else recent


def list_recent(rows: pd.DataFrame, share: int = RECENT_SHARES[0]) -> pd.DataFrame | None:
    """Rows of the newest snapshots, one in ``share`` of all; None if they are too few, or of one class.

    Right after a change most training rows are from before it, and outweigh the few that know it.
    """
    days = sorted(rows["event_timestamp"].unique())
    recent = rows[rows["event_timestamp"].isin(days[-(len(days) // share) :])] if len(days) >= share else rows.head(0)
    churned = int(recent["churned"].sum())
    return recent if min(churned, len(recent) - churned) >= RECENT_CLASS_ROWS_MIN else None


def complete_recalibration(
    params: Params, feature_set: FeatureSet, other: Recalibrated, validation: pd.DataFrame
) -> Fitted:
    """A recalibration as a candidate, with its threshold chosen on validation rows."""
    version, threshold = other.version, cut(params, feature_set, other.pipeline, validation)
    note = f"intercept and slope of version {version} on the newest outcomes"
    kind = f"recalibration of version {version}"
    return Fitted(other.pipeline, other.uncalibrated, other.features, note, threshold, {}, kind)
