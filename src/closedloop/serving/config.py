"""What a worker is told by the command that starts it; that command imports nothing else of the service."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import msgspec

CONFIG_FILE = "config.json"
CONFIG_VARIABLE = "CLOSEDLOOP_SERVING_CONFIG"


class WorkerConfig(msgspec.Struct, frozen=True):
    """What a worker needs to know; written by the command that starts it. Tokens come from the environment alone.

    ``online`` is Feast's configuration of the online store, None where requests must carry their features; its password
    is why the file is private;
    ``as_of`` None means the clock: the wall's, or the one in the file ``clock`` that a replay moves.
    """

    model_name: str
    state_dir: str
    bundled_dir: str | None = None
    online: dict[str, Any] | None = None
    feature_max_age_days: int = 31
    as_of: dt.date | None = None
    clock: str | None = None
    body_bytes_max: int = 1_000_000
    batch_items_max: int = 1_000
    queue_max: int = 512
    outcomes_per_minute: int = 6_000
    range_margin: float = 1.0
    access_log: bool = False
    fsync_before_answer: bool = False
    fsync_every_ms: int = 50
    spool_segment_bytes: int = 16_000_000
    spool_bytes_max: int | None = None
    disk_free_bytes_min: int = 50_000_000


def read_config(path: Path) -> WorkerConfig:
    """The file that started this process."""
    return msgspec.json.decode(path.read_bytes(), type=WorkerConfig)
