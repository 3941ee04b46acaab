"""What the command that starts the service hands over to its processes: a file, and the environment."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from closedloop.adapters.online import open_online_reader
from closedloop.bootstrap import RunContext, load_run, write_serving_config, write_stream_config
from closedloop.environment import ID_KEY_VARIABLE, PROPERTIES_VARIABLE, TOKENS_VARIABLE
from closedloop.serving.config import read_config
from closedloop.serving.worker import read_id_key, read_tokens

ROOT = Path(__file__).parents[2]
REDIS = {"type": "redis", "connection_string": "redis:6379,password=s3cr3t"}
REGISTRY = {"path": "postgresql+psycopg://closedloop:r3g1stry@postgres/feast"}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the config of `serve` or `stream`, and undoes in the end what that sets in the environment."""
    for name in (TOKENS_VARIABLE, ID_KEY_VARIABLE, PROPERTIES_VARIABLE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def write_one(command: str = "serve", **variables: str) -> Path:
        monkeypatch.setenv("CLOSEDLOOP_SERVING__STATE", str(tmp_path))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        run: RunContext = load_run(ROOT / "params.yaml", root=ROOT)
        if command == "stream":
            return write_stream_config(run, as_of=None, bundled_dir=None, agent=False)
        return write_serving_config(run, as_of=None, bundled_dir=None)

    return write_one


@pytest.mark.parametrize("command", ["serve", "stream"])
@pytest.mark.parametrize(
    "variables",
    [
        {"CLOSEDLOOP_SERVING": '{"tokens": {"abc": ["predict"]}, "id_key": "sealed"}'},
        {"CLOSEDLOOP_SERVING__TOKENS__abc": '["predict"]', "CLOSEDLOOP_SERVING__ID_KEY": "sealed"},
        {"closedloop_serving__tokens": '{"abc": ["predict"]}', "closedloop_serving__id_key": "sealed"},
        {"CLOSEDLOOP_SERVING__TOKENS": '{"abc": ["predict"]}', "CLOSEDLOOP_SERVING__ID_KEY": "sealed"},
    ],
)
def test_secrets_in_every_form_that_the_settings_take_reach_the_workers(write, tmp_path, command, variables):
    write(command, **variables)
    assert read_tokens() == {"abc": ("predict",)}
    assert read_id_key(tmp_path, os.environ[ID_KEY_VARIABLE]) == b"sealed"


def test_properties_in_another_form_reach_the_stream_worker(write):
    write("stream", CLOSEDLOOP_STREAM='{"properties": {"sasl.password": "x"}}')
    assert json.loads(os.environ[PROPERTIES_VARIABLE]) == {"sasl.password": "x"}


@pytest.mark.parametrize("command", ["serve", "stream"])
def test_the_file_has_the_online_stores_password_alone_and_is_private(write, command):
    overrides = {"registry": REGISTRY, "online_store": REDIS, "offline_store": {"type": "file", "password": "0ffl1ne"}}
    path = write(command, CLOSEDLOOP_FEATURES__OVERRIDES=json.dumps(overrides))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text(encoding="utf-8")
    assert "s3cr3t" in text
    assert "r3g1stry" not in text
    assert "0ffl1ne" not in text


def test_the_file_has_what_the_reader_of_the_online_store_needs(write):
    config = read_config(write())
    assert config.online is not None
    assert config.online["online_store"]["type"] == "sqlite"
    assert open_online_reader(config.online, "shop", "view", ["a"]) is not None


@pytest.mark.parametrize("command", ["serve", "stream"])
def test_the_file_names_the_parameters_of_the_command(write, command):
    assert json.loads(write(command).read_text(encoding="utf-8"))["params"] == str(ROOT / "params.yaml")
