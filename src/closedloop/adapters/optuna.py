"""Optuna: a seeded search over hyper-parameters, fold by fold, that stops bad trials early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from closedloop.config.params import Space
from closedloop.core.training.splits import Metric
from closedloop.errors import DataError

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution


def search(
    score_fold: Callable[[dict[str, Any], int], float],
    space: Mapping[str, Space],
    *,
    folds: int,
    trials: int,
    metric: Metric,
    seed: int,
    on_trial: Callable[[int, dict[str, Any], float, str], None],
    show_progress: bool = True,
) -> optuna.Study:
    """Search ``space`` with TPE; the same arguments give the same trials.

    Parameters
    ----------
    score_fold
        From hyper-parameters and a fold's position (0 to ``folds`` - 1) to the metric on that fold.
    metric
        ``roc_auc`` is maximised, ``log_loss`` minimised; a trial's value is the mean over the folds that it saw. A
        trial whose mean so far is worse than the median of earlier trials at the same fold is pruned.
    on_trial
        Called with number, parameters, value and state (COMPLETE or PRUNED) of each finished trial.

    Raises
    ------
    DataError
        If a fold's value is not a finite number.
    """
    import optuna
    from optuna.trial import TrialState
    from rich.console import Console
    from rich.progress import track

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # its line a trial would break the progress bar
    study = optuna.create_study(
        direction="maximize" if metric == "roc_auc" else "minimize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
    )
    distributions = {name: _describe(space[name]) for name in sorted(space)}
    # on standard error: standard output is for results
    for _ in track(range(trials), "search", console=Console(stderr=True), disable=not show_progress):
        trial = study.ask(distributions)
        values: list[float] = []
        for fold in range(folds):
            values.append(score_fold(dict(trial.params), fold))
            if not np.isfinite(values[-1]):
                raise DataError(f"trial {trial.number}, fold {fold}: the score is {values[-1]} with {trial.params}")
            trial.report(float(np.mean(values)), fold)
            if fold + 1 < folds and trial.should_prune():
                break
        pruned = len(values) < folds
        study.tell(trial, None if pruned else float(np.mean(values)), TrialState.PRUNED if pruned else None)
        on_trial(trial.number, trial.params, float(np.mean(values)), "PRUNED" if pruned else "COMPLETE")
    return study


def _describe(entry: Space) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    kinds: dict[str, type[BaseDistribution]] = {"float": FloatDistribution, "int": IntDistribution}
    kind = kinds.get(entry.type, CategoricalDistribution)
    return kind(**entry.model_dump(exclude={"type"}))
