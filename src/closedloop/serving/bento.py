"""The service for `bentoml serve`: the application of `closedloop serve` behind BentoML's stack, without an agent."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from closedloop.adapters.bentoml import MODEL_DIR, create_service
from closedloop.contract import read_contract
from closedloop.serving.config import CONFIG_VARIABLE, WorkerConfig, read_config
from closedloop.serving.http.app import Application
from closedloop.serving.worker import Worker


def find_config() -> WorkerConfig:
    """The file that the environment names, else what the Bento itself says; its model serves until slots name another.

    Without a file, state lies in `CLOSEDLOOP_SERVING__STATE` or BentoML's home, and no customer is known by id.
    """
    named, model_dir = os.environ.get(CONFIG_VARIABLE), MODEL_DIR.resolve()  # BentoML enters the Bento's sources
    if named:
        config = read_config(Path(named))
        return config.model_copy(update={"bundled_dir": config.bundled_dir or model_dir})
    name = read_contract(model_dir).model_name
    home = Path(os.environ.get("BENTOML_HOME", Path.home() / "bentoml"))
    state = Path(os.environ.get("CLOSEDLOOP_SERVING__STATE", home / "closedloop"))
    return WorkerConfig(model_name=name, state_dir=state / name, bundled_dir=model_dir)


def start() -> tuple[Application, Callable[[], Awaitable[None]]]:
    """The application, and what ends it."""
    worker = Worker(find_config())
    return Application(worker), worker.stop


service = create_service(start)
