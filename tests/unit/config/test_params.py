"""params.yaml: values that are checked, merged and digested."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from closedloop.bootstrap import load_run
from closedloop.config.params import merge_values, parse_params
from closedloop.config.yaml import read_yaml
from closedloop.core.training.estimators import require_hyper_parameters
from closedloop.core.training.model_types import MODEL_TYPES, find_model_type
from closedloop.errors import ConfigError

ROOT = Path(__file__).parents[3]
LEAST: dict[str, Any] = {
    "dataset": "shop",
    "as_of": "2024-05-31",
    "seed": 7,
    "model": {"type": "logistic_regression"},
}
DEPTHS = {"type": "int", "low": 2, "high": 8}


def test_the_least_params_and_their_defaults():
    params = parse_params(LEAST, "params.yaml")
    assert params.as_of == dt.date(2024, 5, 31)
    assert params.as_of_at == dt.datetime(2024, 5, 31, tzinfo=dt.UTC)
    assert params.split.test_snapshots == 1


def test_every_model_type_has_an_estimator():
    for kind in MODEL_TYPES:
        assert parse_params(merge_values(LEAST, {"model": {"type": kind}}), "params.yaml").model.type == kind
        for size in ({}, find_model_type(kind).small):
            require_hyper_parameters(kind, size)


def test_the_shipped_file_says_every_value_in_full():
    params = parse_params(read_yaml(ROOT / "params.yaml"), "params.yaml")
    assert params == parse_params(params.model_dump(), "again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, "sed: unknown key"),
        ({"model": {"typ": 1}}, "model.typ: unknown key"),
        ({"features": {"windows": [7]}}, "features.windows: unknown key"),
        ({"as_of": "2024-05-31 12:00"}, "as_of: snapshots are UTC midnights: give a date"),
        ({"as_of": "31.05.2024"}, "as_of: Input should be a valid date"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0, found -1"),
        ({"model": {"type": "magic"}}, "model.type: must be one of logistic_regression, random_forest"),
        ({"model": {"threshold": 1.0}}, "model.threshold: Input should be less than 1, found 1.0"),
        ({"model": {"threshold": 0}}, "model.threshold: Input should be greater than 0, found 0"),
        ({"model": {"threshold": "recall"}}, "Input should be 'accuracy', 'f1' or 'profit', found 'recall'"),
        ({"simulator": {"customers": 0}}, "simulator.customers: Input should be greater than or equal to 1, found 0"),
        ({"simulator": {"customers": 1_000_001}}, "simulator.customers: Input should be less than or equal to 1000000"),
        ({"features": {"window_days": [7, 7]}}, "features.window_days: must be different whole numbers"),
        ({"features": {"window_days": []}}, "features.window_days: must be different"),
        ({"features": {"window_days": [0]}}, "features.window_days: must be different"),
        ({"features": {"aggregations": ["median"]}}, "unknown aggregation median; allowed: count, days, sum, mean"),
        ({"features": {"window_days": 7}}, "features.window_days: must be a list, such as [a, b], found 7"),
        ({"model": {"params": {"learning_rate": "1e-1"}}}, "model.params: learning_rate is the text '1e-1': write"),
        ({"model": [1]}, "model: must hold keys and values, found [1]"),
        ({"split": {"test_fraction": 0.5}}, "split.test_fraction: Input should be less than 0.5, found 0.5"),
        ({"evaluation": {"level": 1}}, "evaluation.level: Input should be less than 1, found 1"),
    ],
)
def test_a_wrong_value_is_named(change, message):
    with pytest.raises(ConfigError) as error:
        parse_params(merge_values(LEAST, change), "params.yaml")
    assert str(error.value).startswith("params.yaml:\n  ")
    assert message in str(error.value)


def test_values_are_merged_key_by_key_and_the_last_wins():
    base = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    merged = merge_values(base, {"a": {"c": [3]}}, {"d": {"e": 1}}, {"a": {"b": 2}})
    assert merged == {"a": {"b": 2, "c": [3]}, "d": {"e": 1}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": None}


def test_the_digest_follows_the_values_and_not_their_spelling():
    digest = parse_params(LEAST, "x").digest_md5()
    assert parse_params({**LEAST, "as_of": dt.date(2024, 5, 31), "split": {}}, "x").digest_md5() == digest
    assert parse_params({**LEAST, "seed": 8}, "x").digest_md5() != digest


def test_the_command_line_wins_over_the_file_and_the_environment_never_does(project, monkeypatch):
    monkeypatch.setenv("CLOSEDLOOP_AS_OF", "2020-01-01")
    monkeypatch.setenv("CLOSEDLOOP_PARAMS__SEED", "99")
    monkeypatch.setenv("CLOSEDLOOP_SEED", "99")
    run = load_run(project.root / "params.yaml", root=project.root, overrides={"as_of": "2023-05-01"})
    assert run.params.as_of == dt.date(2023, 5, 1)
    assert run.params.seed == read_yaml(project.root / "params.yaml")["seed"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"low": 1, "high": 2}, "depth: needs the key 'type'"),
        (
            {"type": "uniform", "low": 1, "high": 2},
            "depth: type must be one of 'float', 'int', 'categorical', found 'uniform'",
        ),
        ("0.1", "depth: "),
        ({"type": "float", "low": 1, "max": 2}, "depth.float.max: unknown key"),
        ({"type": "float", "low": 1}, "depth.float.high: is required"),
        ({"type": "float", "low": "1e-3", "high": 1}, "depth.float.low: Input should be a valid number, found '1e-3'"),
        ({"type": "float", "low": 0.0, "high": float("inf")}, "depth.float.high: Input should be a finite number"),
        ({"type": "int", "low": 1.5, "high": 3}, "depth.int.low: Input should be a valid integer, found 1.5"),
        ({"type": "int", "low": True, "high": 3}, "depth.int.low: Input should be a valid integer, found True"),
        ({"type": "float", "low": 2, "high": 1}, "depth.float: low must not be above high"),
        ({"type": "float", "low": 0, "high": 1, "log": True}, "depth.float: low must not be above high, "),
        ({"type": "float", "low": 1, "high": 2, "log": "yes"}, "depth.float.log: Input should be a valid boolean"),
        ({"type": "int", "low": 1, "high": 9, "step": 0}, "depth.int.step: Input should be greater than or equal to 1"),
        ({"type": "int", "low": 1, "high": 9, "step": 2, "log": True}, "step and log exclude each other"),
        ({"type": "categorical", "choices": []}, "depth.categorical.choices: List should have at least 1 item"),
        ({"type": "categorical", "choices": "ab"}, "depth.categorical.choices: must be a list"),
        ({"type": "categorical", "choices": [[1], [2]]}, "depth.categorical.choices.0"),
    ],
)
def test_a_wrong_entry_of_the_search_space_is_named(entry, message):
    with pytest.raises(ConfigError) as error:
        parse_params(merge_values(LEAST, {"tuning": {"space": {"random_forest": {"depth": entry}}}}), "params.yaml")
    assert "tuning.space.random_forest.depth" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"params": {"class_weight": "balanced"}}},
        {"tuning": {"space": {"logistic_regression": {"class_weight": {"type": "categorical", "choices": [None]}}}}},
    ],
)
def test_class_weights_are_not_searched_by_log_loss(change):
    """By which they always lose: a trial's scores are not calibrated."""
    searched = {"trials": 3, "space": {"logistic_regression": {"C": {"type": "float", "low": 0.1, "high": 1.0}}}}
    values = merge_values(LEAST, {"tuning": searched}, change)
    with pytest.raises(ConfigError, match=r"set tuning\.objective to roc_auc"):
        parse_params(values, "params.yaml")
    assert parse_params(merge_values(values, {"tuning": {"objective": "roc_auc"}}), "p").tuning.trials == 3
    assert parse_params(merge_values(values, {"tuning": {"trials": 0}}), "p").tuning.trials == 0


@pytest.mark.parametrize("space", [{}, {"logistic_regression": {}}, {"random_forest": {"max_depth": DEPTHS}}])
def test_trials_without_a_space_of_the_model_type_are_refused(space):
    """Nothing would be searched, and the model would pass for the best of all trials."""
    values = merge_values(LEAST, {"tuning": {"trials": 20, "space": space}})
    with pytest.raises(ConfigError) as error:
        parse_params(values, "params.yaml")
    assert "tuning.space has no hyper-parameter of logistic_regression" in str(error.value)
    assert "tuning.trials is 20" in str(error.value)
    assert parse_params(merge_values(values, {"tuning": {"trials": 0}}), "params.yaml").tuning.trials == 0
    if "random_forest" in space:
        found = parse_params(merge_values(values, {"model": {"type": "random_forest"}}), "params.yaml")
        assert list(found.tuning.space["random_forest"]) == ["max_depth"]
