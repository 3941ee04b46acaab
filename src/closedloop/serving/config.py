"""The config that a command gives to a process that answers, in a file that only its user can read."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from closedloop.config.settings import ServingSettings

CONFIG_FILE = "config.json"
CONFIG_VARIABLE = "CLOSEDLOOP_SERVING_CONFIG"


class WorkerConfig(BaseModel):
    """The settings of the service, without their secrets, which come from the environment alone, and what follows.

    ``online`` is Feast's configuration of the online store, None where requests must carry their features; its password
    is why the file is private;
    ``as_of`` None means the clock: the wall's, or the one in the file ``clock`` that a replay moves. ``params`` is the
    ``params.yaml`` of the command, for the agent; ``agent``: whether one runs beside this process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)

    model_name: str
    state_dir: Path
    settings: ServingSettings = ServingSettings()
    bundled_dir: Path | None = None
    online: dict[str, Any] | None = None
    feature_max_age_days: int = 31
    as_of: dt.date | None = None
    clock: Path | None = None
    params: Path = Path("params.yaml")
    agent: bool = True


def read_config(path: Path) -> WorkerConfig:
    """The file that started this process."""
    return WorkerConfig.model_validate_json(path.read_bytes())
