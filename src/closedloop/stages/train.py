"""train: search, fit, calibrate and export a model; write the MLflow run and the model contract."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from closedloop.adapters.mlflow import DIGEST_TAG
from closedloop.config.dataset import DatasetConfig
from closedloop.config.featureset import FeatureSet
from closedloop.config.layout import CHOICES_FILE, Layout
from closedloop.config.params import Params
from closedloop.contract import Lineage, digest_folder
from closedloop.errors import GateFailed, count_noun
from closedloop.files import read_json, replace_folder, write_json
from closedloop.stages.parts.challengers import choose_challenger, fit_best, list_newest, recalibrate
from closedloop.stages.parts.draw_cost import measure_draw
from closedloop.stages.parts.fitting import Fitted, build_unfitted
from closedloop.stages.parts.model_folder import write_model
from closedloop.stages.parts.next_period import measure_next_period
from closedloop.tabular.tables import read_table

if TYPE_CHECKING:
    from closedloop.adapters.mlflow import Tracking
    from closedloop.core.training.splits import RowFold

logger = logging.getLogger(__name__)
PARTS = ("train", "validation", "test")
IMPORTANCE_ROWS_MAX = 3_000


def train(
    params: Params,
    dataset: DatasetConfig,
    feature_set: FeatureSet,
    tracking: Tracking,
    layout: Layout,
    *,
    use_wandb: bool = False,
) -> dict[str, Any]:
    """Train on ``layout.training`` and write the contract folder ``layout.model``; all is logged to one MLflow run.

    Raises
    ------
    GateFailed
        If the data gate refused the data.
    DataError
        If the training set is missing or cannot train a model.
    ConfigError
        If a hyper-parameter or the search space is wrong.
    """
    refused = read_json(layout.data_quality, made_by="closedloop validate")["failed_critical"]
    if refused:  # DVC stops the graph at a failed gate; a stage run by hand must check it here
        raise GateFailed(
            f"{layout.data_quality}: {count_noun(refused, 'critical expectation')} failed, so nothing is trained"
        )
    rows = {part: read_table(layout.training / f"{part}.parquet", made_by="closedloop training-set") for part in PARTS}
    lineage = describe_lineage(params, dataset, layout.training, rows)
    with tracking.start_run(f"{params.model.type} {params.as_of}", tags=lineage.list_tags()) as run_id:
        tracking.log_params(params.model_dump(exclude={"tuning": {"space"}}))
        found = search_parameters(params, dataset, feature_set, tracking, rows["train"], use_wandb=use_wandb)
        logger.info("fitting %s, rows: %d", params.model.type, len(rows["train"]))
        fitted = fit_best(params, feature_set, found, rows)
        if params.model.recalibrates is not None:
            newest = list_newest(rows["train"], by_day=dataset.label is None)
            other = recalibrate(tracking, params.model, newest, feature_set)
            fitted = choose_challenger(params, feature_set, fitted, rows, other)
        tracking.log_params({"hyper_parameters": fitted.hyper_parameters})
        with replace_folder(layout.model) as folder:
            model = fitted.pipeline, fitted.features, fitted.threshold
            write_model(folder, *model, params=params, dataset=dataset, test=rows["test"], lineage=lineage)
        logger.info("measuring, drawing and logging run %s", run_id)
        report = measure(fitted, rows) | {"draw": measure_draw(params, feature_set, fitted, rows)}
        report["next_period"] = measure_next_period(params, dataset, feature_set, fitted, rows)
        with replace_folder(layout.train_figures) as figures, replace_folder(layout.train_plots) as plots:
            tracking.log_curves(draw(fitted, rows, figures, plots))
        model_uri = log_run(tracking, fitted, rows, lineage, report, layout, params.model.type)
        # last, since runs are found by this tag: a run that was killed earlier must not be found
        run = {"model_uri": model_uri, "folder_sha256": digest_folder(layout.model), "kind": fitted.kind}
        tracking.set_tags({DIGEST_TAG: run["folder_sha256"]})
        write_json(layout.run_file, {"run_id": run_id, **run})
    return report


def log_run(
    tracking: Tracking,
    fitted: Fitted,
    rows: dict[str, pd.DataFrame],
    lineage: Lineage,
    report: dict[str, Any],
    layout: Layout,
    model_type: str,
) -> str:
    """Save the pipeline and the figures, and log both with the run's inputs and files; returns the model's address."""
    from closedloop.adapters.skops import PIPELINE_FILE, save_pipeline
    from closedloop.core.training.deciding import DecidingModel

    figures = {name: report[name] for name in ("threshold", "train", "validation")}
    with replace_folder(layout.pipeline) as folder:
        save_pipeline(folder / PIPELINE_FILE, fitted.pipeline)
        write_json(folder / CHOICES_FILE, {name: value for name, value in report.items() if name not in figures})
    places = {part: layout.training / f"{part}.parquet" for part in PARTS}
    tracking.log_inputs({part: (rows[part], place, lineage.data_md5[place.name]) for part, place in places.items()})
    for part in ("train", "validation"):
        tracking.log_metrics(report[part], prefix=f"{part}_")
    tracking.log_metrics(report["next_period"].get("figures", {}), prefix="next_period_")
    names = [feature.name for feature in fitted.features]
    example = rows["train"][names].head(3)
    model_uri = tracking.log_pipeline(DecidingModel(fitted.pipeline, fitted.threshold), example, model_type)
    write_json(layout.train_metrics, figures)
    tracking.log_files(
        {
            "contract": layout.model,
            "figures": layout.train_figures,
            "": layout.data_quality,
            "metrics": layout.train_metrics,
        }
    )
    return model_uri


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
    """Return params.yaml's hyper-parameters, updated with the best of the search; each trial is a nested run."""
    given, tuning = dict(params.model.params), params.tuning
    if tuning.trials == 0:
        return given

    from closedloop.adapters.optuna import search
    from closedloop.adapters.wandb import open_mirror
    from closedloop.core.training.splits import score_fold

    if len(rows) > tuning.rows_max:
        rows = rows.sample(tuning.rows_max, random_state=params.seed).sort_index()
    labels, folds = rows["churned"].to_numpy(), choose_folds(params, dataset, rows)

    def score_parameters(candidate: dict[str, Any], fold: int) -> float:
        build = partial(build_unfitted, params, feature_set, {**given, **candidate})
        return score_fold(lambda frame: build(frame)[0], rows, labels, folds[fold], tuning.objective)

    with open_mirror(dataset.model_name, enabled=use_wandb) as mirror:
        found = search(
            score_parameters,
            tuning.space[params.model.type],
            folds=len(folds),
            trials=tuning.trials,
            metric=tuning.objective,
            seed=params.seed,
            on_trial=partial(log_trial, tracking, mirror, tuning.objective),
        )
    return {**given, **found.best_params}


def log_trial(
    tracking: Tracking,
    mirror: Callable[..., None],
    metric: str,
    number: int,
    candidate: dict[str, Any],
    value: float,
    state: str,
) -> None:
    """Log one trial of the search as a nested run, and to the mirror."""
    with tracking.start_trial(number):
        tracking.log_params(candidate)
        tracking.log_metrics({metric: value})
        tracking.set_tags({"state": state})
    mirror(number, candidate, {metric: value})


def choose_folds(params: Params, dataset: DatasetConfig, rows: pd.DataFrame) -> Sequence[RowFold]:
    """Folds for the search: by time where rows have one, else by a stable hash of the id."""
    from closedloop.core.training.splits import index_day_folds, index_hash_folds, index_time_folds

    folds, times = params.tuning.folds, rows["event_timestamp"]
    if dataset.label is not None:
        return index_time_folds(times, horizon_days=dataset.label.horizon_days, folds=folds)
    if dataset.columns.time is not None:
        return index_day_folds(times, folds=folds)
    return index_hash_folds(rows["customer_id"], folds=folds, salt=str(params.seed))


def measure(fitted: Fitted, rows: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Return metrics of the train and validation rows, and the choices made while fitting."""
    from closedloop.core.evaluation.metrics import measure_classification
    from closedloop.core.training.estimators import score

    report: dict[str, Any] = {"threshold": fitted.threshold, "hyper_parameters": fitted.hyper_parameters}
    report["calibration"], report["kind"] = fitted.calibration, fitted.kind
    for part in ("train", "validation"):
        scores = score(fitted.pipeline, rows[part])
        report[part] = measure_classification(rows[part]["churned"].to_numpy(), scores, fitted.threshold)
    return report


def draw(fitted: Fitted, rows: dict[str, pd.DataFrame], figures: Path, plots: Path) -> pd.DataFrame:
    """Draw pictures and plot data of the validation rows; return the training curve."""
    from sklearn.inspection import permutation_importance

    from closedloop.adapters.matplotlib import draw_importance, draw_scores, draw_training_curve
    from closedloop.core.training.estimators import score
    from closedloop.core.training.learning_curve import trace_training

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
