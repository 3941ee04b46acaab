"""train: search, fit, calibrate, export; the run in MLflow and the model contract."""

from __future__ import annotations

import datetime as dt
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from closedloop.adapters.tables import read_table
from closedloop.contract import Feature, Lineage, digest_folder
from closedloop.dataset import DatasetConfig
from closedloop.errors import GateFailed
from closedloop.featureset import FeatureSet
from closedloop.files import read_json, replace_folder, write_json
from closedloop.params import Params
from closedloop.stages.model_folder import write_model

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from closedloop.adapters.mlflow import Tracking

logger = logging.getLogger(__name__)
PARTS = ("train", "validation", "test")
IMPORTANCE_ROWS_MAX = 3_000


@dataclass(frozen=True)
class Fitted:
    """A fitted pipeline with what was decided on the way."""

    pipeline: Pipeline
    uncalibrated: Pipeline
    features: tuple[Feature, ...]
    calibration: str
    threshold: float
    hyper_parameters: dict[str, Any]


def train(
    params: Params,
    dataset: DatasetConfig,
    feature_set: FeatureSet,
    tracking: Tracking,
    *,
    training_dir: Path,
    data_quality_path: Path,
    model_dir: Path,
    pipeline_dir: Path,
    figures_dir: Path,
    plots_dir: Path,
    run_path: Path,
    metrics_path: Path,
    use_wandb: bool = False,
) -> dict[str, Any]:
    """Train on ``training_dir`` and write the contract folder ``model_dir``; everything is logged to one MLflow run.

    Raises
    ------
    GateFailed
        If the data gate refused the data.
    DataError
        If the training set is missing or cannot train a model.
    ConfigError
        If a hyper-parameter or the search space is wrong.
    """
    from closedloop.adapters.mlflow import DIGEST_TAG
    from closedloop.adapters.skops import PIPELINE_FILE, save_pipeline

    refused = read_json(data_quality_path, made_by="closedloop validate")["failed_critical"]
    if refused:  # the graph stops there; stages run by hand do not
        raise GateFailed(f"{data_quality_path}: {refused} critical expectations failed, so nothing is trained")
    rows = {part: read_table(training_dir / f"{part}.parquet", made_by="closedloop training-set") for part in PARTS}
    lineage = describe_lineage(params, dataset, training_dir, rows)
    with tracking.start_run(f"{params.model.type} {params.as_of}", tags=lineage.list_tags()) as run_id:
        tracking.log_params(params.model_dump(exclude={"tuning": {"space"}}))
        found = search_parameters(params, dataset, feature_set, tracking, rows["train"], use_wandb=use_wandb)
        tracking.log_params({"hyper_parameters": found})
        logger.info("fitting %s on %d rows", params.model.type, len(rows["train"]))
        fitted = fit(params, feature_set, found, rows)
        with replace_folder(model_dir) as folder:
            write_model(
                folder,
                fitted.pipeline,
                features=fitted.features,
                threshold=fitted.threshold,
                params=params,
                dataset=dataset,
                feature_service=feature_set.service,
                test=rows["test"],
                lineage=lineage,
            )
        logger.info("measuring and drawing")
        report = measure(fitted, rows)
        with replace_folder(figures_dir) as figures, replace_folder(plots_dir) as plots:
            tracking.log_curves(draw(fitted, rows, figures, plots))
        with replace_folder(pipeline_dir) as folder:
            save_pipeline(folder / PIPELINE_FILE, fitted.pipeline)
        logger.info("logging run %s", run_id)
        inputs = {
            part: (rows[part], training_dir / f"{part}.parquet", lineage.data_md5[f"{part}.parquet"]) for part in PARTS
        }
        tracking.log_inputs(inputs)
        for part in ("train", "validation"):
            tracking.log_metrics(report[part], prefix=f"{part}_")
        model_uri = tracking.log_pipeline(fitted.pipeline, rows["train"][list(feature_set.names)].head(3))
        write_json(metrics_path, report)
        tracking.log_files(
            {"contract": model_dir, "figures": figures_dir, "": data_quality_path, "metrics": metrics_path}
        )
        # last: by its digest a run is found, so that one which was killed earlier never stands for the model
        folder_sha256 = digest_folder(model_dir)
        tracking.set_tags({DIGEST_TAG: folder_sha256})
        write_json(run_path, {"run_id": run_id, "model_uri": model_uri, "folder_sha256": folder_sha256})
    return report


def describe_lineage(
    params: Params, dataset: DatasetConfig, training_dir: Path, rows: dict[str, pd.DataFrame]
) -> Lineage:
    """Commit, digests and snapshots behind this training set; MD5, since that is what DVC's lock file holds."""
    import hashlib

    from closedloop.adapters.git import read_commit

    commit, dirty = read_commit()
    digests = {}
    for part in PARTS:
        with (training_dir / f"{part}.parquet").open("rb") as stream:
            digests[f"{part}.parquet"] = hashlib.file_digest(
                stream, lambda: hashlib.md5(usedforsecurity=False)
            ).hexdigest()
    snapshots: dict[str, tuple[dt.date, ...]] = {}
    for part in PARTS:
        days = {time.date() for time in rows[part]["event_timestamp"].drop_duplicates()}
        snapshots[f"{part}_snapshots"] = tuple(sorted(days))
    return Lineage(
        dataset=dataset.name,
        as_of=params.as_of,
        git_commit=commit,
        git_dirty=dirty,
        data_md5=digests,
        params_md5=params.digest_md5(),
        **snapshots,
    )


def search_parameters(
    params: Params,
    dataset: DatasetConfig,
    feature_set: FeatureSet,
    tracking: Tracking,
    rows: pd.DataFrame,
    *,
    use_wandb: bool,
) -> dict[str, Any]:
    """Hyper-parameters: those of params.yaml, with the best of the search on top; each trial is a nested run."""
    given = dict(params.model.params)
    if params.tuning.trials == 0:
        return given
    from closedloop.adapters.optuna import search
    from closedloop.adapters.wandb import open_mirror
    from closedloop.core.folds import index_day_folds, index_hash_folds, index_time_folds, score_fold

    if len(rows) > params.tuning.rows_max:
        rows = rows.sample(params.tuning.rows_max, random_state=params.seed).sort_index()
    labels, metric = rows["churned"].to_numpy(), params.tuning.objective
    if dataset.label is not None:
        folds = index_time_folds(
            rows["event_timestamp"], horizon_days=dataset.label.horizon_days, folds=params.tuning.folds
        )
    elif dataset.columns.time is not None:
        folds = index_day_folds(rows["event_timestamp"], folds=params.tuning.folds)
    else:
        folds = index_hash_folds(rows["customer_id"], folds=params.tuning.folds, salt=str(params.seed))

    def score_parameters(candidate: dict[str, Any], fold: int) -> float:
        def build(frame: pd.DataFrame) -> Pipeline:
            return build_unfitted(params, feature_set, {**given, **candidate}, frame)[0]

        return score_fold(build, rows, labels, folds[fold], metric)

    with open_mirror(dataset.model_name, enabled=use_wandb) as mirror:

        def log(number: int, candidate: dict[str, Any], value: float, state: str) -> None:
            with tracking.start_trial(number):
                tracking.log_params(candidate)
                tracking.log_metrics({metric: value})
                tracking.set_tags({"state": state})
            mirror(number, candidate, {metric: value})

        found = search(
            score_parameters,
            params.tuning.space[params.model.type],
            folds=len(folds),
            trials=params.tuning.trials,
            metric=metric,
            seed=params.seed,
            on_trial=log,
        )
    return {**given, **found.best_params}


def build_unfitted(
    params: Params, feature_set: FeatureSet, hyper_parameters: dict[str, Any], rows: pd.DataFrame
) -> tuple[Pipeline, tuple[Feature, ...]]:
    """The pipeline for these rows, and the features that it takes."""
    from closedloop.core.estimators import build_pipeline, describe_features

    features = describe_features(rows, feature_set.numeric, feature_set.categorical)
    pipeline = build_pipeline(
        features,
        model_type=params.model.type,
        model_params=hyper_parameters,
        normalize=params.preprocess.normalize,
        feature_selection=params.preprocess.feature_selection,
        seed=params.seed,
    )
    return pipeline, features


def fit(
    params: Params, feature_set: FeatureSet, hyper_parameters: dict[str, Any], rows: dict[str, pd.DataFrame]
) -> Fitted:
    """Fit on train rows; calibrate and choose the threshold on validation rows."""
    from closedloop.core.calibration import calibrate_pipeline, choose_threshold
    from closedloop.core.estimators import round_thresholds, score

    train_rows, validation = rows["train"], rows["validation"]
    unfitted, features = build_unfitted(params, feature_set, hyper_parameters, train_rows)
    uncalibrated = round_thresholds(unfitted.fit(train_rows, train_rows["churned"].to_numpy()))
    pipeline, calibration = uncalibrated, "switched off (model.calibrate)"
    labels = validation["churned"].to_numpy()
    if params.model.calibrate:
        ids = validation["customer_id"].tolist()
        pipeline, calibration = calibrate_pipeline(uncalibrated, validation, labels, ids)
    threshold = choose_threshold(labels, score(pipeline, validation), params.model.threshold)
    return Fitted(pipeline, uncalibrated, features, calibration, threshold, hyper_parameters)


def measure(fitted: Fitted, rows: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Figures of the train and validation rows, and what was decided."""
    from closedloop.core.estimators import score
    from closedloop.core.metrics import measure_classification

    report: dict[str, Any] = {"threshold": fitted.threshold, "hyper_parameters": fitted.hyper_parameters}
    report["calibration"] = fitted.calibration
    for part in ("train", "validation"):
        scores = score(fitted.pipeline, rows[part])
        report[part] = measure_classification(rows[part]["churned"].to_numpy(), scores, fitted.threshold)
    return report


def draw(fitted: Fitted, rows: dict[str, pd.DataFrame], figures: Path, plots: Path) -> pd.DataFrame:
    """Pictures and plot data of the validation rows; returns the training curve."""
    from sklearn.inspection import permutation_importance

    from closedloop.adapters.pictures import draw_importance, draw_scores, draw_training_curve
    from closedloop.core.curves import trace_training
    from closedloop.core.estimators import score

    validation = rows["validation"]
    labels = validation["churned"].to_numpy()
    draw_scores(figures, labels, score(fitted.pipeline, validation), fitted.threshold, rows_name="validation")
    curve = trace_training(fitted.uncalibrated, rows["train"], rows["train"]["churned"].to_numpy(), validation, labels)
    curve.to_csv(plots / "training_curve.csv", index=False)
    draw_training_curve(figures / "training_curve.png", curve)
    names = [feature.name for feature in fitted.features]
    sample = validation.sample(min(IMPORTANCE_ROWS_MAX, len(validation)), random_state=0)
    found = permutation_importance(
        fitted.pipeline, sample[names], sample["churned"].to_numpy(), scoring="roc_auc", n_repeats=3, random_state=0
    )
    columns = {"feature": names, "mean": found.importances_mean, "standard_deviation": found.importances_std}
    importance = pd.DataFrame(columns).sort_values(["mean", "feature"], ascending=[False, True])
    importance.to_csv(plots / "importance.csv", index=False)
    draw_importance(figures / "importance.png", importance)
    return curve
