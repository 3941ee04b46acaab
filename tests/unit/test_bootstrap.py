"""What the command that starts the service hands over to its processes: a file, and the environment."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

import pytest

from closedloop.adapters.online_store import open_online_reader
from closedloop.bootstrap import RunContext, load_run, write_serving_config, write_stream_config
from closedloop.config.settings import read_stream_environment
from closedloop.serving.config import WorkerConfig, read_config
from closedloop.serving.worker import Worker, read_id_key

ROOT = Path(__file__).parents[2]
REDIS = {"type": "redis", "connection_string": "redis:6379,password=s3cr3t"}
REGISTRY = {"path": "postgresql+psycopg://closedloop:r3g1stry@postgres/feast"}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the config of `serve` or `stream`."""

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
    path = write(command, **variables)
    assert not {"abc", "sealed"} & set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    worker = Worker(WorkerConfig(model_name="shop", state_dir=tmp_path))
    worker.log.close()
    worker.metrics.close()
    assert (worker.tokens, worker.id_key) == ({"abc": ("predict",)}, b"sealed")


def test_a_key_that_is_made_is_private_before_it_is_written(tmp_path, monkeypatch):
    """And stays the key of this folder."""
    modes, write = [], Path.write_bytes

    def note(path: Path, content: bytes) -> int:
        written = write(path, content)
        modes.append(stat.S_IMODE(path.stat().st_mode))
        return written

    monkeypatch.setattr(Path, "write_bytes", note)
    key = read_id_key(tmp_path, "")
    assert read_id_key(tmp_path, "") == key
    assert set(modes) == {0o600}


def test_properties_in_another_form_reach_the_stream_worker(write):
    path = write("stream", CLOSEDLOOP_STREAM='{"properties": {"sasl.password": "x"}}')
    assert "sasl" not in path.read_text(encoding="utf-8")
    assert read_stream_environment().properties == {"sasl.password": "x"}


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
