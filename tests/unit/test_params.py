"""params.yaml: values that are checked, merged and digested."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from closedloop.bootstrap import load_run
from closedloop.errors import ConfigError
from closedloop.params import load_params, merge_values, parse_params

ROOT = Path(__file__).parents[2]
LEAST: dict[str, Any] = {
    "dataset": "shop",
    "as_of": "2024-05-31",
    "seed": 7,
    "model": {"type": "logistic_regression"},
}


def test_the_least_params_and_their_defaults():
    params = parse_params(LEAST, "params.yaml")
    assert params.as_of == dt.date(2024, 5, 31)
    assert params.as_of_at == dt.datetime(2024, 5, 31, tzinfo=dt.UTC)
    assert params.split.test_snapshots == 1


def test_the_shipped_file_says_every_value_in_full():
    params = load_params(ROOT / "params.yaml")
    assert params == parse_params(params.model_dump(), "again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, "sed: unknown key"),
        ({"model": {"typ": 1}}, "model.typ: unknown key"),
        ({"features": {"windows": [7]}}, "features.windows: unknown key"),
        ({"as_of": "2024-05-31 12:00"}, "as_of: Value error, snapshots are UTC midnights: give a date"),
        ({"as_of": "31.05.2024"}, "as_of: Input should be a valid date"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0, found -1"),
        ({"model": {"type": "magic"}}, "model.type: Input should be"),
        ({"features": {"window_days": [7, 7]}}, "features.window_days: Value error, must be different whole numbers"),
        ({"features": {"window_days": []}}, "features.window_days: Value error"),
        ({"features": {"window_days": [0]}}, "features.window_days: Value error"),
        ({"features": {"aggregations": ["median"]}}, "unknown aggregation median; allowed: count, days, sum, mean"),
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
    assert run.params.seed == load_params(project.root / "params.yaml").seed
