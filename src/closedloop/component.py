"""What the components of pipelines/retrain.py call: a stage's command, and its end on record in the operations store.

They run in processes of their own, here or in a cluster's pods; where the stores are, the settings say.
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

from closedloop.environment import set_environment
from closedloop.errors import ClosedloopError, ConfigError, DataError, GateFailed
from closedloop.params import PARAMS_FILE

if TYPE_CHECKING:
    from closedloop.adapters.checks import State

LAST_STAGE = "package"


def plan_run(
    params: str, as_of: str, data_start_date: str, data_end_date: str, model_name: str, trigger_id: str
) -> str:
    """The values that all stages of a run work by, as a text for `run_stage`.

    Parameters
    ----------
    params
        All of params.yaml, as JSON or YAML; empty: the file here.
    as_of, data_start_date, data_end_date
        Dates that win over it; empty ones are chosen as `closedloop retrain` does.
    model_name
        Must be the data set's, where it is given.

    Raises
    ------
    ConfigError
        If a value or the model's name is wrong.
    DataError
        If this trigger's retraining has ended.
    """
    from closedloop.adapters.checks import Retraining
    from closedloop.bootstrap import build_checks, load_newest
    from closedloop.loop.retrain import ENDED, choose_dates, override_dates

    with tempfile.TemporaryDirectory() as folder:
        path = _write_params(folder, params) if params else PARAMS_FILE
        context = load_newest(path, override_dates(as_of, data_start_date, data_end_date))
    name = context.dataset.model_name
    if model_name not in ("", name):
        raise ConfigError(f"model_name is {model_name!r}, but data set {context.dataset.name} has {name!r}")
    planned = choose_dates(context.params, context.dataset, window_days=context.settings.retraining.window_days)
    checks, now = build_checks(context), dt.datetime.now(dt.UTC)
    checks.upgrade()
    # there is a request, unless somebody started the pipeline by itself
    asked = Retraining(trigger_id, name, "pipeline", "a run of the pipeline", planned.as_of_at, now)
    found = checks.request_retraining(asked)
    if found.state in ENDED:
        raise DataError(f"retraining {trigger_id} is {found.state} already; another one needs another trigger id")
    if found.state != "running":
        found = checks.advance_retraining(found, "running", now=now)
    claim = {"trigger_id": trigger_id, "claimed_at": found.updated_at.isoformat()}
    return json.dumps({**claim, "params": planned.model_dump_json()})


def run_stage(command: str, given: Mapping[str, Any]) -> None:
    """Run a stage's command; a gate that says no, an error and the last stage's success are recorded.

    Parameters
    ----------
    given
        ``run``, as `plan_run` made it, and artifacts (with a ``path``) by the option that they are for. A file stands
        in its artifact's folder, under its name in dvc.yaml.
    """
    from closedloop import cli
    from closedloop.bootstrap import build_checks, load_run, locate_retraining_state
    from closedloop.files import hold_lock
    from closedloop.loop.retrain import record_end

    set_environment()
    os.environ["CLOSEDLOOP_RELEASE__AUTO_PROMOTE"] = "false"  # what retrains by itself must not release by itself
    cli.configure_logging()
    run = json.loads(given["run"])
    claim = (run["trigger_id"], dt.datetime.fromisoformat(run["claimed_at"]))
    options = {name: Path(str(value)) for name, value in cli.list_defaults(command).items()}
    paths = {
        name: Path(artifact.path) / options[name].name if options[name].suffix else Path(artifact.path)
        for name, artifact in given.items()
        if name in options and hasattr(artifact, "path")
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
            # a killed retraining's last stage may still be running
            with hold_lock(locate_retraining_state(context) / "stage.lock"):
                cli.app(arguments, standalone_mode=False)
        except BaseException as error:
            state: State = "refused" if isinstance(error, GateFailed) else "failed"
            detail = f"{command}: {error or type(error).__name__}"
            record_end(checks, *claim, state, now=dt.datetime.now(dt.UTC), detail=detail)
            if isinstance(error, ClosedloopError):
                sys.exit(f"{type(error).__name__}: {error}")
            raise
    if command == LAST_STAGE:
        version = str(json.loads(paths["registration"].read_text(encoding="utf-8"))["version"])
        record_end(checks, *claim, "registered", now=dt.datetime.now(dt.UTC), model_version=version)


def _write_params(folder: str, text: str) -> Path:
    path = Path(folder) / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path
