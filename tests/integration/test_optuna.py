"""The search on real Optuna: it finds, it prunes, it repeats itself, and it refuses a wrong space by name."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import optuna
import pytest
from sklearn.metrics import log_loss

from closedloop.adapters.optuna import check_space, search
from closedloop.core.estimators import build_pipeline, describe_features
from closedloop.core.folds import index_hash_folds, score_fold
from closedloop.errors import ConfigError, DataError

SPACE: dict[str, dict[str, Any]] = {
    "rate": {"type": "float", "low": 0.01, "high": 1.0, "log": True},
    "leaves": {"type": "int", "low": 2, "high": 10},
    "kind": {"type": "categorical", "choices": ["good", "bad"]},
}


def bowl_loss(params: dict[str, Any], fold: int) -> float:
    """Lowest at rate 0.1, 5 leaves, kind good; the fold shifts all trials alike."""
    penalty = 2.0 if params["kind"] == "bad" else 0.0
    return float(np.log10(params["rate"] / 0.1) ** 2 + (params["leaves"] - 5) ** 2 / 10 + penalty + fold)


def run(score: Any = bowl_loss, **options: Any) -> Any:
    chosen: dict[str, Any] = {
        "folds": 3,
        "trials": 25,
        "metric": "log_loss",
        "seed": 1,
        "show_progress": False,
    }
    return search(score, SPACE, **{**chosen, **options})


def test_it_minimises_a_loss_and_maximises_an_area() -> None:
    lowest = run()
    # Folds add 0, 1, 2: the mean is 1 above the bowl, whose value is random search's to beat.
    assert lowest.best_value < 1.2
    assert lowest.best_params["kind"] == "good"
    assert lowest.best_value == min(trial.value for trial in lowest.trials if trial.state == "COMPLETE")
    highest = run(lambda params, fold: -bowl_loss(params, fold), metric="roc_auc")
    assert highest.best_value == pytest.approx(-lowest.best_value)
    assert highest.best_params == lowest.best_params


def test_same_seed_same_trials_whatever_the_order_of_the_space() -> None:
    first = run()
    assert run().trials == first.trials
    turned = search(
        bowl_loss,
        dict(reversed(SPACE.items())),
        folds=3,
        trials=25,
        metric="log_loss",
        seed=1,
        show_progress=False,
    )
    assert turned.trials == first.trials
    assert run(seed=2).trials != first.trials


def test_bad_trials_stop_after_their_first_folds_and_never_win() -> None:
    calls: list[tuple[int, str]] = []

    def count(params: dict[str, Any], fold: int) -> float:
        calls.append((fold, params["kind"]))
        return bowl_loss(params, fold)

    found = run(count)
    pruned = [trial for trial in found.trials if trial.state == "PRUNED"]
    assert pruned
    assert {trial.state for trial in found.trials} == {"COMPLETE", "PRUNED"}
    assert all(len(trial.fold_values) < 3 for trial in pruned)
    assert all(len(trial.fold_values) == 3 for trial in found.trials if trial.state == "COMPLETE")
    assert len(calls) == sum(len(trial.fold_values) for trial in found.trials) < 75
    assert all(trial.number >= 5 for trial in pruned)  # the first five set the median
    assert found.trials[found.best_number].params == found.best_params


def test_a_trial_is_not_pruned_once_its_last_fold_is_known() -> None:
    def late_loss(params: dict[str, Any], fold: int) -> float:
        return 100.0 if fold == 0 else bowl_loss(params, fold)

    found = run(late_loss, folds=2)
    assert {trial.state for trial in found.trials} == {"COMPLETE"}


def test_each_finished_trial_is_reported_once() -> None:
    seen: list[tuple[int, dict[str, Any], float, str]] = []
    found = run(trials=8, on_trial=lambda *trial: seen.append(trial))
    assert seen == [(trial.number, trial.params, trial.value, trial.state) for trial in found.trials]
    assert [number for number, *_ in seen] == list(range(8))
    first = found.trials[0]
    assert first.value == pytest.approx(np.mean([bowl_loss(dict(first.params), fold) for fold in range(3)]))


def test_values_stay_inside_the_space() -> None:
    for trial in run().trials:
        assert 0.01 <= trial.params["rate"] <= 1.0
        assert trial.params["leaves"] in range(2, 11)
        assert isinstance(trial.params["leaves"], int)


def test_progress_goes_to_standard_error_and_optuna_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    run(trials=2, show_progress=True)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "2/2" in printed.err
    assert "Trial" not in printed.err
    assert optuna.logging.get_verbosity() == before
    assert logging.getLogger("optuna").level == before


def test_a_search_over_time_folds_of_a_real_model() -> None:
    import pandas as pd

    generator = np.random.default_rng(0)
    frame = pd.DataFrame({"x": generator.normal(size=600), "noise": generator.normal(size=600)})
    labels = np.asarray(generator.random(600) < 1 / (1 + np.exp(-2 * frame["x"])))
    folds = index_hash_folds([str(row) for row in range(600)], folds=2, salt="search")

    def score(params: dict[str, Any], fold: int) -> float:
        def build(train: pd.DataFrame) -> Any:
            return build_pipeline(
                describe_features(train, ["x", "noise"], []),
                model_type="logistic_regression",
                model_params=params,
                normalize=True,
                feature_selection=None,
                seed=0,
            )

        return score_fold(build, frame, labels, folds[fold], "log_loss")

    space = {"C": {"type": "float", "low": 1e-4, "high": 10.0, "log": True}}
    found = search(score, space, folds=2, trials=6, metric="log_loss", seed=0, show_progress=False)
    prior = log_loss(labels, np.full(600, labels.mean()))
    assert found.best_value < prior - 0.1
    assert found.best_params["C"] > 1e-3  # the strongest penalties leave nothing but the base rate


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"low": 1, "high": 2}, "type is None, allowed: float, int, categorical"),
        ({"type": "uniform", "low": 1, "high": 2}, "type is 'uniform'"),
        ("0.1", "type is None"),
        ({"type": "float", "low": 1, "max": 2}, "max is unknown, allowed: high, log, low, step"),
        ({"type": "float", "low": 1}, "high is None, allowed: a finite number of type float"),
        ({"type": "float", "low": "1e-3", "high": 1}, "low is '1e-3'"),
        ({"type": "float", "low": 0.0, "high": float("inf")}, "high is inf"),
        ({"type": "int", "low": 1.5, "high": 3}, "low is 1.5, allowed: a finite number of type int"),
        ({"type": "int", "low": True, "high": 3}, "low is True"),
        ({"type": "float", "low": 2, "high": 1}, "low is 2, high 1, allowed: low <= high"),
        ({"type": "float", "low": 0, "high": 1, "log": True}, "low is 0, high 1, allowed: .* above 0 if log"),
        ({"type": "float", "low": 1, "high": 2, "log": "yes"}, "log is 'yes', allowed: true, false"),
        ({"type": "int", "low": 1, "high": 9, "step": 0}, "step is 0, allowed: above 0"),
        ({"type": "int", "low": 1, "high": 9, "step": 2, "log": True}, "step is 2, .* not together with log"),
        ({"type": "categorical", "choices": []}, "choices is \\[\\], allowed: a list"),
        ({"type": "categorical", "choices": "ab"}, "choices is 'ab'"),
        ({"type": "categorical", "choices": [[1], [2]]}, "choices is \\[\\[1\\], \\[2\\]\\]"),
    ],
)
def test_a_wrong_entry_is_named(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"tuning.space.depth: {message}"):
        check_space({"ok": SPACE["rate"], "depth": entry})


def test_empty_searches_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tuning\.space is empty"):
        search(bowl_loss, {}, folds=1, trials=1, metric="log_loss", seed=0)
    with pytest.raises(ConfigError, match=r"tuning\.trials is 0"):
        run(trials=0)
    with pytest.raises(ConfigError, match=r"tuning\.folds is 0"):
        run(folds=0)


@pytest.mark.filterwarnings("ignore")
def test_a_score_that_is_no_number_stops_the_search() -> None:
    with pytest.raises(DataError, match="trial 0, fold 1: the score is nan"):
        run(lambda params, fold: float("nan") if fold else 0.5)
