"""The search on real Optuna: it finds, it prunes, it repeats itself, and it refuses a wrong space by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest
from sklearn.metrics import log_loss

from closedloop.adapters.optuna import search
from closedloop.config.params import Choices, FloatRange, IntRange, Space
from closedloop.core.training.estimators import build_pipeline, describe_features
from closedloop.core.training.splits import index_hash_folds, score_fold
from closedloop.errors import DataError

SPACE: dict[str, Space] = {
    "rate": FloatRange(type="float", low=0.01, high=1.0, log=True),
    "leaves": IntRange(type="int", low=2, high=10),
    "kind": Choices(type="categorical", choices=["good", "bad"]),
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
        "space": SPACE,
        "on_trial": lambda *_: None,
    }
    return search(score, **{**chosen, **options})


def list_trials(study: optuna.Study) -> list[tuple[int, dict[str, Any], float | None, str]]:
    return [(trial.number, trial.params, trial.value, trial.state.name) for trial in study.trials]


def test_it_minimises_a_loss_and_maximises_an_area() -> None:
    lowest = run()
    # Folds add 0, 1, 2: the mean is 1 above the bowl, whose value is random search's to beat.
    assert lowest.best_value < 1.2
    assert lowest.best_params["kind"] == "good"
    assert lowest.best_value == min(trial.value for trial in lowest.trials if trial.state.name == "COMPLETE")
    highest = run(lambda params, fold: -bowl_loss(params, fold), metric="roc_auc")
    assert highest.best_value == pytest.approx(-lowest.best_value)
    assert highest.best_params == lowest.best_params


def test_same_seed_same_trials_whatever_the_order_of_the_space() -> None:
    first = list_trials(run())
    assert list_trials(run()) == first
    assert list_trials(run(space=dict(reversed(SPACE.items())))) == first
    assert list_trials(run(seed=2)) != first


def test_bad_trials_stop_after_their_first_folds_and_never_win() -> None:
    calls: list[tuple[int, str]] = []

    def count(params: dict[str, Any], fold: int) -> float:
        calls.append((fold, params["kind"]))
        return bowl_loss(params, fold)

    found = run(count)
    pruned = [trial for trial in found.trials if trial.state.name == "PRUNED"]
    complete = [trial for trial in found.trials if trial.state.name == "COMPLETE"]
    assert pruned
    assert complete
    assert len(pruned) + len(complete) == 25
    assert all(len(trial.intermediate_values) < 3 for trial in pruned)
    assert all(len(trial.intermediate_values) == 3 for trial in complete)
    assert len(calls) == sum(len(trial.intermediate_values) for trial in found.trials) < 75
    assert all(trial.number >= 5 for trial in pruned)  # the first five set the median


def test_a_trial_is_not_pruned_once_its_last_fold_is_known() -> None:
    def late_loss(params: dict[str, Any], fold: int) -> float:
        return 100.0 if fold == 0 else bowl_loss(params, fold)

    found = run(late_loss, folds=2)
    assert {trial.state.name for trial in found.trials} == {"COMPLETE"}


def test_each_finished_trial_is_reported_once() -> None:
    seen: list[tuple[int, dict[str, Any], float, str]] = []
    found = run(trials=8, on_trial=lambda *trial: seen.append(trial))
    assert seen == list_trials(found)
    assert [number for number, *_ in seen] == list(range(8))
    first = found.trials[0]
    assert first.value == pytest.approx(np.mean([bowl_loss(dict(first.params), fold) for fold in range(3)]))


def test_values_stay_inside_the_space() -> None:
    for trial in run().trials:
        assert 0.01 <= trial.params["rate"] <= 1.0
        assert trial.params["leaves"] in range(2, 11)
        assert isinstance(trial.params["leaves"], int)


def test_progress_goes_to_standard_error_and_optuna_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    run(trials=2, show_progress=True)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "100%" in printed.err
    assert "Trial" not in printed.err


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

    space = {"C": FloatRange(type="float", low=1e-4, high=10.0, log=True)}
    found = run(score, space=space, folds=2, trials=6, seed=0)
    prior = log_loss(labels, np.full(600, labels.mean()))
    assert found.best_value < prior - 0.1
    assert found.best_params["C"] > 1e-3  # the strongest penalties leave nothing but the base rate


@pytest.mark.filterwarnings("ignore")
def test_a_score_that_is_no_number_stops_the_search() -> None:
    with pytest.raises(DataError, match="trial 0, fold 1: the score is nan"):
        run(lambda params, fold: float("nan") if fold else 0.5)
