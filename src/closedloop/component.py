"""Entry points of the components in pipelines/retrain.py: run a stage's command, and record how the retraining ended.

Each component is a process of its own, on this machine or in a pod. The settings say where the stores are.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from closedloop.config.environment import set_environment
from closedloop.config.layout import list_paths
from closedloop.config.params import PARAMS_FILE
from closedloop.errors import ClosedloopError, ConfigError, DataError, GateFailed
from closedloop.processes import end_with_starter

if TYPE_CHECKING:
    from closedloop.store.checks import RetrainingState

LAST_STAGE = "package"


def plan_run(
    params: str, as_of: str, data_start_date: str, data_end_date: str, model_name: str, trigger_id: str
) -> str:
    """Return the parameters that all stages of a run share, as JSON for `run_stage`.

    Parameters
    ----------
    params
        All of params.yaml, as JSON or YAML; empty: the file in the working directory.
    as_of, data_start_date, data_end_date
        Dates that override those of ``params``; empty ones are chosen as `closedloop retrain` does.
    model_name
        Must be the data set's model name, or empty.

    Raises
    ------
    ConfigError
        If a value or the model's name is wrong.
    DataError
        If the retraining of this trigger id has already ended.
    """
    from closedloop.bootstrap import build_checks, build_retraining_plan, load_newest
    from closedloop.loop.retrain import ENDED, override_dates
    from closedloop.store.checks import Retraining

    with tempfile.TemporaryDirectory() as folder:
        path = _write_params(folder, params) if params else PARAMS_FILE
        context = load_newest(path, override_dates(as_of, data_start_date, data_end_date))
    name = context.dataset.model_name
    if model_name not in ("", name):
        raise ConfigError(f"model_name is {model_name!r}, but data set {context.dataset.name} has {name!r}")
    planned = build_retraining_plan(context)(context.params)
    checks, now = build_checks(context), dt.datetime.now(dt.UTC)
    context.database.upgrade()
    # a request is on record unless the pipeline was started directly, not by `closedloop retrain`
    asked = Retraining(trigger_id, name, "pipeline", "a run of the pipeline", planned.as_of_at, now)
    found = checks.request_retraining(asked)
    if found.state in ENDED:
        raise DataError(f"retraining {trigger_id} is {found.state} already; another one needs another trigger id")
    if found.state != "running":
        found = checks.advance_retraining(found, "running", now=now)
    claim = {"trigger_id": trigger_id, "claimed_at": found.updated_at.isoformat()}
    return json.dumps({**claim, "params": planned.model_dump_json()})


def run_stage(command: str, given: Mapping[str, Any]) -> None:
    """Run a stage's command; record a gate's refusal, an error, and the success of the last stage.

    Parameters
    ----------
    given
        ``run``, the text from `plan_run`, and artifacts (with a ``path``) by the layout's names. An artifact's path is
        a folder; a single file lies in it under its name in dvc.yaml.
    """
    from closedloop.bootstrap import build_checks, load_run, locate_retraining_state
    from closedloop.cli import main as cli
    from closedloop.files import hold_lock
    from closedloop.loop.retrain import record_end

    set_environment()
    end_with_starter()
    os.environ["CLOSEDLOOP_RELEASE__AUTO_PROMOTE"] = "false"  # a retraining never makes a champion
    cli.configure_logging()
    run = json.loads(given["run"])
    claim = (run["trigger_id"], dt.datetime.fromisoformat(run["claimed_at"]))
    paths = {
        name: Path(given[name].path) / (usual.name if usual.suffix else "")
        for name, usual in list_paths(command.replace("-", "_")).items()
        if name in given
    }
    with tempfile.TemporaryDirectory() as folder:
        params = _write_params(folder, run["params"])
        context = load_run(params)
        checks = build_checks(context)
        arguments = [command, f"--params={params}"]
        arguments += [f"--{name.replace('_', '-')}={path}" for name, path in paths.items()]
        if command == "register":
            check_id = checks.read_retraining(run["trigger_id"]).check_id or ""
            arguments += [f"--trigger-id={run['trigger_id']}", f"--check-id={check_id}"]
        try:
            # wait: the last stage of a killed retraining may still run for a moment
            with hold_lock(locate_retraining_state(context) / "stage.lock"):
                cli.app(arguments, standalone_mode=False)
        except BaseException as error:
            state: RetrainingState = "refused" if isinstance(error, GateFailed) else "failed"
            detail = f"{command}: {error or type(error).__name__}"
            record_end(checks, *claim, state, now=dt.datetime.now(dt.UTC), detail=detail)
            if isinstance(error, ClosedloopError):
                sys.exit(f"{type(error).__name__}: {error}")
            raise
    if command == LAST_STAGE:
        made, now = json.loads(paths["registration"].read_text(encoding="utf-8")), dt.datetime.now(dt.UTC)
        record_end(checks, *claim, "registered", now=now, model_version=str(made["version"]), detail=made["kind"])


def _write_params(folder: str, text: str) -> Path:
    path = Path(folder) / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path
