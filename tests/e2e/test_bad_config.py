"""A wrong setting: one screen that names the file, the key, the rule and what was found; nothing is written."""

from __future__ import annotations

import pytest

SCREEN_LINES = 25


def refuse(project, *words, stage="ingest", folder=None):
    output = project.run(stage, status=1).output
    text = " ".join(output.split())
    assert "ConfigError: " in text
    for word in words:
        assert word in text
    assert "Traceback" not in output
    assert len(output.splitlines()) <= SCREEN_LINES
    assert not any((project.root / name).exists() for name in ("data", "metrics", "models", "reports", "mlflow.db"))


def append(project, name, text):
    path = project.root / name
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def replace(project, name, old, new):
    path = project.root / name
    content = path.read_text(encoding="utf-8")
    assert old in content
    path.write_text(content.replace(old, new, 1), encoding="utf-8")


def test_no_params(project):
    (project.root / "params.yaml").unlink()
    refuse(project, "ConfigError: params.yaml: there is no such file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "params.yaml: must hold keys and values, found NoneType"),
        (b"- 1\n", "params.yaml: must hold keys and values, found list"),
        (b"dataset: [shop\n", "params.yaml: cannot be read as YAML"),
        (b"dataset: \xff\n", "params.yaml: cannot be read as YAML"),
    ],
    ids=["empty", "list", "open bracket", "not utf-8"],
)
def test_params_that_are_no_yaml_mapping(project, content, words):
    (project.root / "params.yaml").write_bytes(content)
    refuse(project, words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"colour": "blue"}, "params.yaml: colour: unknown key"),
        ({"split": {"test_share": 0.2}}, "params.yaml: split.test_share: unknown key"),
        ({"as_of": "2025-13-01"}, "params.yaml: as_of: "),
        ({"as_of": "2025-01-01T10:30"}, "as_of: snapshots are UTC midnights"),
        ({"as_of": "2025-01-01 00:00:00+02:00"}, "as_of: snapshots are UTC midnights"),
        ({"as_of": "yesterday"}, "params.yaml: as_of: "),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0, found -1"),
        ({"seed": "seven"}, "seed: "),
        ({"features": {"window_days": [7, 7]}}, "features.window_days: must be different whole numbers"),
        ({"features": {"aggregations": ["median"]}}, "features.aggregations: unknown aggregation median"),
        ({"model": {"type": "xgbost"}}, "model.type: "),
        ({"model": {"threshold": "profit"}}, "profit needs the section value in configs/datasets/shop.yaml"),
        ({"dataset": "shoes"}, "dataset 'shoes': configs/datasets/shoes.yaml does not exist; data sets here: "),
        ({"dataset": "../shop"}, "params.yaml: dataset: String should match pattern"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_parameter(project, values, words):
    project.change_params(values)
    refuse(project, words)


@pytest.mark.parametrize(
    ("as_of", "words"),
    [
        ("2025-13-01", "month must be in 1..12"),
        ("2025-02-30", "day is out of range"),
        ("2025-01-01 10:30:00", "as_of: "),
    ],
)
def test_a_date_without_quotes_that_yaml_itself_reads(project, as_of, words):
    replace(project, "params.yaml", '"2025-01-01"', as_of)
    refuse(project, "ConfigError: params.yaml: ", words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"colour": "blue"}, "configs/datasets/shop.yaml: colour: unknown key"),
        ({"columns": {"income": "income"}}, "columns.income: unknown key"),
        ({"name": "shoes"}, "name is 'shoes', but the file is called 'shop'"),
        ({"kind": "graph"}, "kind: Input should be 'events' or 'table', found 'graph'"),
        ({"timezone": "Mars/Olympus"}, "timezone: 'Mars/Olympus' is not an IANA time zone"),
        ({"label": {"event_type": "visit"}}, "label.event_type 'visit' is not one of event_types"),
        ({"columns": {"sensitive": "age"}}, "a column may be numeric, categorical or sensitive, once"),
        ({"gates": {"accuracy_min": 1.5}}, "gates.accuracy_min: Input should be less than or equal to 1, found 1.5"),
        ({"gates": {"accuracy": 0.9}}, "gates.accuracy: unknown key"),
        ({"feature_max_age_days": 0}, "feature_max_age_days: Input should be greater than or equal to 1, found 0"),
        (
            {"value": {"kept": {"amount_of_days": 60}, "offer_cost": 5, "save_rate": 0.2}},
            "value.kept.amount_of_days: 60 is no window; features.window_days has 7, 30, 90",
        ),
        ({"model_name": "telco_churn"}, "model_name 'telco_churn' belongs to telco.yaml"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_key_of_the_data_set(project, values, words):
    project.change_dataset("shop", values)
    refuse(project, "configs/datasets/shop.yaml: ", words)


@pytest.mark.parametrize(
    ("expectation", "words"),
    [
        ({"type": "expect_peace", "kwargs": {}}, "'expect_peace' is not an expectation of Great Expectations"),
        (
            {"type": "expect_column_values_to_be_between", "kwargs": {"colum": "age", "max_value": 9}},
            "expect_column_values_to_be_between on customers: ",
        ),
    ],
)
def test_an_expectation_that_does_not_exist_or_does_not_fit(project, expectation, words):
    project.change_params({"as_of": "2023-02-01", "simulator": {"customers": 300}})
    project.change_dataset("shop", {"expectations": [{"table": "customers", **expectation}]})
    project.run("ingest")
    output = project.run("validate", status=1).output
    text = " ".join(output.split())
    assert "ConfigError: expectations: " in text
    assert words in text
    assert len(output.splitlines()) <= SCREEN_LINES
    assert not (project.root / "metrics/data_quality.json").exists()
    assert not (project.root / "reports/data_docs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour: blue\n", "colour: unknown key"),
        ("features: {ofline: x}\n", "features.ofline: unknown key"),
        ("features: [1]\n", "features: must hold keys and values"),
        ("tracking: {\n", "configs/local.yaml: cannot be read as YAML"),
    ],
)
def test_a_wrong_key_of_the_profile(project, text, words):
    append(project, "configs/local.yaml", text)
    refuse(project, "ConfigError: configs/local.yaml", words)


def test_a_profile_without_a_file(project, monkeypatch):
    monkeypatch.setenv("CLOSEDLOOP_PROFILE", "moon")
    refuse(project, "ConfigError: configs/moon.yaml: there is no such file")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("CLOSEDLOOP_ENGINE__THREADS", "many", "engine.threads: Input should be a valid integer"),
        ("CLOSEDLOOP_ENGINE__THREADS", "0", "engine.threads: Input should be greater than or equal to 1"),
        ("CLOSEDLOOP_ENGINE__MEMORY_LIMIT", "much", "engine.memory_limit: String should match pattern"),
        ("CLOSEDLOOP_ENGINE__THREDS", "2", "engine.threds: unknown key"),
        ("CLOSEDLOOP_ENGINE", "fast", "engine"),
        ("CLOSEDLOOP_RELEASE__AUTO_PROMOTE", "perhaps", "release.auto_promote: Input should be a valid boolean"),
    ],
)
def test_a_wrong_setting_in_the_environment(project, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    refuse(project, "the environment (CLOSEDLOOP_*)", words)


def test_a_setting_in_the_environment_wins_and_params_are_never_taken_from_it(project, monkeypatch):
    from closedloop.bootstrap import load_run

    monkeypatch.setenv("CLOSEDLOOP_ENGINE__THREADS", "3")
    monkeypatch.setenv("CLOSEDLOOP_SEED", "99")
    monkeypatch.setenv("CLOSEDLOOP_PARAMS__SEED", "99")
    run = load_run(project.root / "params.yaml", root=project.root)
    assert (run.settings.engine.threads, run.params.seed) == (3, 7)


def test_a_wrong_date_on_the_command_line(project):
    refuse_refresh = project.run("refresh", "--as-of", "2025-13-01", status=1).output
    assert "ConfigError: params.yaml: as_of: " in " ".join(refuse_refresh.split())
    assert not (project.root / "state/refresh").exists()


@pytest.mark.parametrize(
    "arguments", [("evaluate", "--threshold", "7"), ("evaluate", "--threshold", "x"), ("refresh",), ("fly",)]
)
def test_a_wrong_command_line_is_not_mistaken_for_a_gate_that_said_no(project, arguments):
    """2 is what a gate says; the command line library would end with 2 too."""
    output = project.run(*arguments, status=1).output
    assert "Usage: closedloop" in output
    assert "Traceback" not in output
