"""The mirror on real Weights & Biases: offline, trials end up in a local folder and nothing is sent."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from closedloop.adapters.wandb import open_mirror
from closedloop.extras import explain_missing

TRIALS = [
    (0, {"learning_rate": 0.125, "kind": "gbdt"}, {"log_loss": 0.5}),
    (1, {"learning_rate": 0.25, "kind": "dart"}, {"log_loss": 0.375}),
]
SCRIPT = f"""
from closedloop.config.environment import set_environment
set_environment()
from closedloop.adapters.wandb import open_mirror
with open_mirror("shop_churn", enabled=True) as record:
    for trial in {TRIALS!r}:
        record(*trial)
"""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Stands for the server and for the way to it; a connection stays in its queue, answered or not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def read_records(path: Path) -> Iterator[Any]:
    """The records of a run's file: after a head of 7 bytes, each one with checksum (4), length (2) and kind (1)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place = path.read_bytes(), 7
    assert len(content) < 32_768  # beyond, records are split over blocks
    while place < len(content):
        _, length, kind = struct.unpack_from("<IHB", content, place)
        assert kind == 1  # whole
        yield Record.FromString(content[place + 7 : place + 7 + length])
        place += 7 + length


def read_trial(path: Path) -> dict[str, Any]:
    """Project, name, parameters and figures of a mirrored run."""
    trial: dict[str, Any] = {"figures": {}}
    for record in read_records(path):
        if record.HasField("run"):
            trial |= {"project": record.run.project, "name": record.run.display_name}
            trial["parameters"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        for item in record.history.item:
            trial["figures"]["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return trial


def test_trials_are_mirrored_into_a_local_folder_and_nothing_is_sent(tmp_path: Path, listener: socket.socket) -> None:
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), address)
    # with a key at hand, so that nothing but the mode keeps it from being used
    key = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address, "NO_PROXY": "", "no_proxy": ""}
    environment = kept | proxies | key | {"HOME": str(tmp_path / "home")}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    with pytest.raises(BlockingIOError):
        listener.accept()
    assert ran.returncode == 0, ran.stderr
    found = [read_trial(path) for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert len(found) == 2
    for trial, (number, parameters, figures) in zip(sorted(found, key=lambda one: one["name"]), TRIALS, strict=True):
        assert (trial["project"], trial["name"]) == ("shop_churn", f"trial {number}")
        assert {name: value for name, value in trial["parameters"].items() if name != "_wandb"} == parameters
        assert {name: value for name, value in trial["figures"].items() if name[0] != "_"} == figures


@pytest.fixture
def without_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("without_wandb")
def test_switched_off_it_needs_and_does_nothing(tmp_path: Path) -> None:
    with open_mirror("shop_churn", enabled=False) as record:
        for trial in TRIALS:
            record(*trial)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_wandb")
def test_without_the_extra_its_name_is_told() -> None:
    with pytest.raises(ModuleNotFoundError) as missing, open_mirror("shop_churn", enabled=True):
        pass
    assert "install closedloop[wandb]" in str(explain_missing(missing.value))
