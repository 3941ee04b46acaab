"""Optuna: a seeded search over hyper-parameters, fold by fold, that gives up on bad trials early."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from closedloop.core.folds import Metric
from closedloop.errors import ConfigError, DataError

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

ENTRY_KEYS = {
    "float": {"low", "high", "log", "step"},
    "int": {"low", "high", "log", "step"},
    "categorical": {"choices"},
}


@dataclass(frozen=True)
class TrialRecord:
    """One finished trial; ``value`` is its mean over the folds it saw, ``state`` COMPLETE or PRUNED."""

    number: int
    params: Mapping[str, Any]
    value: float
    state: str
    fold_values: tuple[float, ...]


@dataclass(frozen=True)
class SearchResult:
    """The best complete trial, and all trials in order."""

    best_params: Mapping[str, Any]
    best_value: float
    best_number: int
    trials: tuple[TrialRecord, ...]


def search(
    score_fold: Callable[[dict[str, Any], int], float],
    space: Mapping[str, Mapping[str, Any]],
    *,
    folds: int,
    trials: int,
    metric: Metric,
    seed: int,
    on_trial: Callable[[int, dict[str, Any], float, str], None] | None = None,
    show_progress: bool = True,
) -> SearchResult:
    """Search ``space`` with TPE; the same arguments give the same trials.

    Parameters
    ----------
    score_fold
        From hyper-parameters and a fold's position (0 to ``folds`` - 1) to the metric on that fold.
    space
        By parameter: ``{type: float | int, low, high, log, step}`` or ``{type: categorical, choices}``.
    metric
        ``roc_auc`` is maximised, ``log_loss`` minimised; a trial's value is the mean over folds. A trial
        whose mean so far is worse than the median of earlier trials at the same fold is pruned.
    on_trial
        Called with number, parameters, value and state of each finished trial.

    Raises
    ------
    ConfigError
        Naming the entry of ``space`` that is wrong, or if ``trials`` or ``folds`` is below 1.
    DataError
        If a fold's value is not a finite number.
    """
    import optuna

    check_space(space)
    for name, count in (("trials", trials), ("folds", folds)):
        if count < 1:
            raise ConfigError(f"tuning.{name} is {count}, allowed: 1 or more")
    with _quiet_optuna(), _show_progress(trials, show_progress) as advance:
        study = optuna.create_study(
            direction="maximize" if metric == "roc_auc" else "minimize",
            sampler=optuna.samplers.TPESampler(seed=seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
        )

        def report(_: Any, finished: FrozenTrial) -> None:
            record = _record_trial(finished)
            advance(f"best {study.best_value:.5f}")
            if on_trial is not None:
                on_trial(record.number, dict(record.params), record.value, record.state)

        study.optimize(
            lambda trial: _run_trial(trial, score_fold, space, folds),
            n_trials=trials,
            n_jobs=1,
            callbacks=[report],
        )
    records = tuple(_record_trial(trial) for trial in study.trials)
    return SearchResult(dict(study.best_params), float(study.best_value), study.best_trial.number, records)


def check_space(space: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a search space that Optuna would misread or refuse half-way.

    Raises
    ------
    ConfigError
        Naming the entry, what was found and what is allowed.
    """
    if not space:
        raise ConfigError("tuning.space is empty: name at least one parameter to search")
    for name, entry in space.items():
        place = f"tuning.space.{name}"
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        if kind not in ENTRY_KEYS:
            raise ConfigError(f"{place}: type is {kind!r}, allowed: {', '.join(ENTRY_KEYS)}")
        if unknown := sorted(set(entry) - ENTRY_KEYS[kind] - {"type"}):
            raise ConfigError(
                f"{place}: {', '.join(unknown)} is unknown, allowed: {', '.join(sorted(ENTRY_KEYS[kind]))}"
            )
        if kind == "categorical":
            choices = entry.get("choices")
            plain = isinstance(choices, list | tuple) and all(isinstance(c, str | int | float | None) for c in choices)
            if not plain or not choices:
                raise ConfigError(
                    f"{place}: choices is {choices!r}, allowed: a list of strings, numbers, true, false, null"
                )
        else:
            _check_range(place, entry)


def _check_range(place: str, entry: Mapping[str, Any]) -> None:
    kinds = (int,) if entry["type"] == "int" else (int, float)
    for key in ("low", "high", "step"):
        value: Any = entry.get(key)
        if key == "step" and value is None:
            continue
        if not isinstance(value, kinds) or isinstance(value, bool) or not np.isfinite(value):
            raise ConfigError(f"{place}: {key} is {value!r}, allowed: a finite number of type {entry['type']}")
    log = entry.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"{place}: log is {log!r}, allowed: true, false")
    if entry["low"] > entry["high"] or (log and entry["low"] <= 0):
        raise ConfigError(
            f"{place}: low is {entry['low']}, high {entry['high']}, allowed: low <= high, and above 0 if log"
        )
    if "step" in entry and (log or entry["step"] <= 0):
        raise ConfigError(f"{place}: step is {entry['step']}, allowed: above 0, and not together with log")


def _run_trial(
    trial: Trial,
    score_fold: Callable[[dict[str, Any], int], float],
    space: Mapping[str, Mapping[str, Any]],
    folds: int,
) -> float:
    import optuna

    params = {name: _suggest_value(trial, name, space[name]) for name in sorted(space)}
    values: list[float] = []
    for fold in range(folds):
        values.append(score_fold(params, fold))
        if not np.isfinite(values[-1]):
            raise DataError(f"trial {trial.number}, fold {fold}: the score is {values[-1]} with {params}")
        trial.set_user_attr("fold_values", values)
        trial.report(float(np.mean(values)), fold)
        if fold + 1 < folds and trial.should_prune():
            raise optuna.TrialPruned()
    return float(np.mean(values))


def _suggest_value(trial: Trial, name: str, entry: Mapping[str, Any]) -> Any:
    if entry["type"] == "categorical":
        return trial.suggest_categorical(name, entry["choices"])
    options = {key: entry[key] for key in ("log", "step") if key in entry}
    if entry["type"] == "int":
        return trial.suggest_int(name, entry["low"], entry["high"], **options)
    return trial.suggest_float(name, entry["low"], entry["high"], **options)


def _record_trial(trial: FrozenTrial) -> TrialRecord:
    values = tuple(float(value) for value in trial.user_attrs["fold_values"])
    return TrialRecord(trial.number, dict(trial.params), float(np.mean(values)), trial.state.name, values)


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Optuna's log line per trial gives way to the progress bar; its level is put back."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def _show_progress(trials: int, show: bool) -> Iterator[Callable[[str], None]]:
    """A bar on standard error: standard output is for results."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("search"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("", total=trials)
        yield lambda text: bar.update(task, advance=1, description=text)
