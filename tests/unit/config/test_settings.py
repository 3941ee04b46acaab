"""Settings: where things live. Environment, then the profile's file, then the default."""

from __future__ import annotations

from pathlib import Path

import pytest

from closedloop.config.settings import load_settings, read_serving_environment
from closedloop.errors import ConfigError


@pytest.fixture
def configs(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("CLOSEDLOOP_PROFILE", raising=False)
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "local.yaml").write_text("engine: {memory_limit: 3GB}\nrelease: {auto_promote: true}\n", encoding="utf-8")
    (folder / "production.yaml").write_text("tracking: {uri: http://mlflow}\n", encoding="utf-8")
    return folder


def test_the_default_the_file_and_the_environment(configs, monkeypatch):
    settings = load_settings(folder=configs)
    assert settings.engine.threads == 2  # default
    assert settings.engine.memory_limit == "3GB"  # file
    monkeypatch.setenv("CLOSEDLOOP_ENGINE__MEMORY_LIMIT", "4GB")
    changed = load_settings(folder=configs)
    assert changed.engine.memory_limit == "4GB"  # environment
    assert changed.release.auto_promote  # the section's other keys, and other sections, stay
    assert settings.engine.memory_limit == "3GB"


def test_the_profile_is_an_argument_or_from_the_environment(configs, monkeypatch):
    monkeypatch.setenv("CLOSEDLOOP_PROFILE", "production")
    assert load_settings(folder=configs).tracking.uri == "http://mlflow"
    assert load_settings("local", folder=configs).tracking.uri == "sqlite:///mlflow.db"


def test_an_unknown_profile_is_refused(configs, monkeypatch):
    with pytest.raises(ConfigError, match=r"staging\.yaml: there is no such file"):
        load_settings("staging", folder=configs)
    (configs / "staging.yaml").write_text("{}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="profile: Input should be 'local' or 'production', found 'staging'"):
        load_settings("staging", folder=configs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("enigne: {}", "enigne: unknown key"),
        ("engine: {thread: 2}", "engine.thread: unknown key"),
        ("engine: {threads: 0}", "engine.threads: Input should be greater than or equal to 1, found 0"),
        ("engine: {memory_limit: lots}", "engine.memory_limit: String should match pattern"),
    ],
)
def test_a_wrong_key_of_the_file_is_named(configs, text, message):
    (configs / "local.yaml").write_text(f"{text}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_settings(folder=configs)
    assert message in str(error.value)
    assert str(configs / "local.yaml") in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CLOSEDLOOP_ENGINE__THREAD", "engine.thread: unknown key"),
        ("CLOSEDLOOP_ENGINE__THREADS", "engine.threads: Input should be a valid integer"),
    ],
)
def test_a_wrong_key_of_the_environment_is_named(configs, monkeypatch, name, message):
    monkeypatch.setenv(name, "many")
    with pytest.raises(ConfigError) as error:
        load_settings(folder=configs)
    assert message in str(error.value)
    assert "the environment (CLOSEDLOOP_*)" in str(error.value)


def test_production_promotes_nobody_by_itself(configs, monkeypatch):
    assert not load_settings("production", folder=configs).release.auto_promote
    (configs / "production.yaml").write_text("release: {auto_promote: true}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"release\.auto_promote is refused in production"):
        load_settings("production", folder=configs)
    (configs / "production.yaml").write_text("{}\n", encoding="utf-8")
    monkeypatch.setenv("CLOSEDLOOP_RELEASE__AUTO_PROMOTE", "true")
    with pytest.raises(ConfigError, match=r"release\.auto_promote is refused in production"):
        load_settings("production", folder=configs)


def test_the_root_is_where_the_real_configs_stand(configs, tmp_path):
    workspace = tmp_path / "workspaces/other"
    workspace.mkdir(parents=True)
    (workspace / "configs").symlink_to(configs)
    settings = load_settings(folder=workspace / "configs")
    assert settings.root == tmp_path.resolve()
    assert settings.locate("state/x") == tmp_path.resolve() / "state/x"
    assert settings.locate("/elsewhere") == Path("/elsewhere")
    assert settings.locate_url("sqlite:///m.db") == f"sqlite:///{tmp_path.resolve()}/m.db"
    assert settings.locate_url("sqlite:////abs/m.db") == "sqlite:////abs/m.db"
    assert settings.locate_url("postgresql://host/db") == "postgresql://host/db"


@pytest.mark.parametrize("proxy", ["istio", "gateway"])
def test_a_proxy_that_splits_needs_prometheus(proxy, tmp_path, monkeypatch):
    (tmp_path / "local.yaml").write_text(f"release: {{traffic: {proxy}}}", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"release\.traffic {proxy} needs release\.prometheus"):
        load_settings("local", folder=tmp_path)
    monkeypatch.setenv("CLOSEDLOOP_RELEASE__PROMETHEUS", "http://prometheus:9090")
    assert load_settings("local", folder=tmp_path).release.traffic == proxy


def test_settings_are_the_policies_that_releases_and_checks_are_judged_by(tmp_path):
    from closedloop.core.monitoring.policy import MonitoringPolicy
    from closedloop.core.release.policy import ReleasePolicy

    (tmp_path / "local.yaml").write_text("{}", encoding="utf-8")
    settings = load_settings("local", folder=tmp_path)
    for policy, section in ((ReleasePolicy(), settings.release), (MonitoringPolicy(), settings.monitoring)):
        assert isinstance(section, type(policy))
        assert section.model_dump(include=set(type(policy).model_fields)) == policy.model_dump()
    text = "release: {steps: [canary_25], requests_min: 7, hours_max: 1, last_hours_max: 2, guard_hours_max: 3}"
    (tmp_path / "local.yaml").write_text(text, encoding="utf-8")
    steps = load_settings("local", folder=tmp_path).release.list_steps()
    assert steps == [("shadow", 0.0, 7, 1), ("canary_25", 0.25, 7, 2), ("champion", 1.0, 0, 3)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPERATIONS", "postgresql://app:s3cr3t@host/store"),
        ("OPERATIONS", '["postgresql://app:s3cr3t@host/store"]'),
        ("OPERATIONS__URL__X", "postgresql://app:s3cr3t@host/store"),
        ("TRACKING", '"http://reader:s3@cr3t@host"'),
        ("TRACKING", f'"http://reader:s3cr3t{"t" * 90}@host"'),
        ("FEATURES", '"redis:6379,password=s3cr3t"'),
        ("SERVING__TOKENS", '{"s3cr3t": ["predct"]}'),
        ("SERVING__ID_KEY", "s3cr3t" * 11),
        ("SERVING", '["s3cr3t"]'),
        ("SERVING__TOKENS", '["s3cr3t"]'),
        ("SERVING__TOKENS", '{"s3cr3t": ["predict"], "": ["admin"]}'),
        ("SERVING__TOKENS", '{" s3cr3t": ["predict"]}'),
        ("STREAM__PROPERTIES", '{"sasl.password": {"x": "s3cr3t"}}'),
        ("RETRAINING__TOKEN__X", "s3cr3t"),
    ],
)
def test_a_wrong_value_of_the_environment_is_shown_without_its_password(configs, monkeypatch, name, value):
    monkeypatch.setenv(f"CLOSEDLOOP_{name}", value)
    with pytest.raises(ConfigError, match=name.partition("__")[0].lower()) as refused:
        load_settings(folder=configs)
    assert "s3cr3t" not in str(refused.value)
    assert "cr3t" not in str(refused.value)


@pytest.mark.parametrize("read", [read_serving_environment, lambda: load_settings("local")])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SERVING__TOKENS", '{"s3cr3t": ["predict"], "s3cr3t": ["admin"]}'),
        ("SERVING", '{"port": 3000, "port": 3001}'),
    ],
)
def test_a_name_that_stands_twice_in_the_environments_json_is_refused(monkeypatch, read, name, value):
    """The first of two tokens' scopes was lost without a word."""
    monkeypatch.setenv(f"CLOSEDLOOP_{name}", value)
    with pytest.raises(ConfigError, match=r"serving.*no object has a name twice") as refused:
        read()
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "variable"),
    [
        ("serving: {tokens: {s3cr3t: [predict]}}", "CLOSEDLOOP_SERVING__TOKENS"),
        ("serving: {id_key: s3cr3t}", "CLOSEDLOOP_SERVING__ID_KEY"),
        ("stream: {properties: {sasl.password: s3cr3t}}", "CLOSEDLOOP_STREAM__PROPERTIES"),
        ("retraining: {token: s3cr3t}", "CLOSEDLOOP_RETRAINING__TOKEN"),
        ("webhook: {secret: s3cr3t}", "CLOSEDLOOP_WEBHOOK__SECRET"),
    ],
)
def test_a_secret_in_a_file_is_refused_and_not_shown(configs, text, variable):
    (configs / "local.yaml").write_text(f"{text}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"is a secret: set {variable} in the environment") as refused:
        load_settings(folder=configs)
    assert "s3cr3t" not in str(refused.value)
