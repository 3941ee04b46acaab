"""Environment variables that a process sets before it imports anything heavy."""

from __future__ import annotations

import contextlib
import getpass
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Every tool's own switch against telemetry.
TELEMETRY_OFF = {
    "BENTOML_DO_NOT_TRACK": "true",
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_MODE": "offline",
}
# Idle threads that spin take the core that another process needs: on a busy machine a dot product of 16,000 numbers
# took 5 ms instead of 10 microseconds, and a fit of 5 s took 28 s.
QUIET = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_LOGGING_LEVEL": "WARNING"}
# Before an S3 bucket MLflow's server hands out addresses in it, which the network keeps the service's pods from.
PROXIED = {"MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false", "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false"}
THREADS = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"}
# Another program's run: MLflow would go on with it, or fail because this store does not know it. And a Git hook's
# repository, where Git would look for the commit of another folder.
LEFT_OVER = (
    *("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ACTIVE_MODEL_ID"),
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"),
)
STARTED = ("closedloop", "dvc", "mlflow")  # by name, by us or by tools of ours
LOOPBACK = ("127.0.0.1", "localhost", "::1", "0.0.0.0")  # noqa: S104 - called, not listened on


def set_environment() -> None:
    """Switch telemetry off, keep to MLflow's server, and keep numerical libraries from spinning.

    For every HTTP client of this process and of those that it starts, loopback addresses are reached without a proxy.
    What it starts by name (a stage, dvc, mlflow) is found in its own environment, whether or not that is activated.
    """
    for name, value in {**TELEMETRY_OFF, **QUIET, **PROXIED, **THREADS}.items():
        os.environ.setdefault(name, value)
    for name in LEFT_OVER:
        os.environ.pop(name, None)
    _spare_loopback()
    _find_own_programs()
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name; DVC and MLflow ask for it
        os.environ["USER"] = f"uid-{os.getuid()}"


def _find_own_programs() -> None:
    """Put this environment's folder on the PATH just before the first that has programs of the same names.

    Whatever stands before that stays in front: a kubectl of the user's, say.
    """
    own, folders = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath).split(os.pathsep)
    holders = (place for place, folder in enumerate(folders) if any((Path(folder) / name).exists() for name in STARTED))
    place = next(holders, len(folders))
    if folders[place : place + 1] != [own] and (Path(own) / "closedloop").exists():
        os.environ["PATH"] = os.pathsep.join([*folders[:place], own, *folders[place:]])


@contextlib.contextmanager
def keep_environment() -> Iterator[None]:
    """Put the variables back as they were, after the block."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _spare_loopback() -> None:
    """Where a proxy is set, name loopback among the addresses that do not go through it."""
    proxies = [name for name in os.environ if name.lower().endswith("_proxy") and name.lower() != "no_proxy"]
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if not proxies or given.strip() == "*":
        return
    spared = [*filter(None, map(str.strip, given.split(",")))]
    spared += [host for host in LOOPBACK if host not in spared]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(spared)
