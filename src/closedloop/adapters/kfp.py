"""Kubeflow Pipelines: compile the retraining pipeline, run it as processes here, or through a cluster's interface."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from closedloop.errors import ClosedloopError, ConfigError, ServiceUnavailable
from closedloop.files import hold_lock
from closedloop.processes import name_starter

if TYPE_CHECKING:
    from closedloop.config.settings import RetrainingSettings

EXPERIMENT = "closedloop-retrain"
# Poll here: the client's `wait_for_run_completion` never returns for a cancelled run.
ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
# A stage's message to people starts with the stage's name, 12 columns wide; KFP indents it by 4. The pattern leaves out
# the inputs and outputs that KFP prints of every component.
STAGE_MESSAGE = re.compile(r"    (?P<message>[ a-z_-]{12}  (?!\w+=)[^ \"{}\[\]].*)")
COLOUR = re.compile(r"\x1b\[\d+m")


class PipelineFailed(ClosedloopError):
    """A run of the pipeline did not succeed."""


def load_pipeline(path: Path, settings: RetrainingSettings) -> Any:
    """Load the pipeline that ``path`` declares, with the image, variables and requests of the settings."""
    spec = importlib.util.spec_from_file_location("closedloop_pipeline", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"{path}: there is no such pipeline; run this in the project's folder")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # KFP reads the source of each component
    spec.loader.exec_module(module)
    return module.build_pipeline(settings)


def compile_pipeline(path: Path, settings: RetrainingSettings) -> str:
    """Compile the pipeline to the YAML that a cluster takes."""
    from kfp.compiler import Compiler

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "pipeline.yaml"
        Compiler().compile(load_pipeline(path, settings), str(target))
        return target.read_text(encoding="utf-8")


class LocalRunner:
    """Runs each component as a process here, one after the other; ``folder`` keeps the last run's artifacts and log."""

    is_exclusive = True

    def __init__(self, path: Path, folder: Path, settings: RetrainingSettings) -> None:
        # local processes use neither image nor secret, and KFP warns of an image without "python" in its name
        self._path, self._folder = path, folder
        self._settings = settings.model_copy(update={"base_image": "python", "secret": "", "environment": {}})

    def hold(self) -> contextlib.AbstractContextManager[bool]:
        """Lock the model's retraining on this machine; yield False if another process holds the lock."""
        return hold_lock(self._folder / "lock", wait=False)

    def run(self, name: str, arguments: Mapping[str, str]) -> None:  # noqa: ARG002
        """Run the pipeline; its stages' messages go to stderr, and all output to ``log.txt``.

        Raises
        ------
        PipelineFailed
            If a component failed; the message names it.
        """
        from kfp import local

        pipeline, artifacts = load_pipeline(self._path, self._settings), self._folder / "artifacts"
        shutil.rmtree(artifacts, ignore_errors=True)
        artifacts.mkdir(parents=True, exist_ok=True)  # a stage of a killed run may still write there
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(artifacts))
        log_path = self._folder / "log.txt"
        with log_path.open("w", encoding="utf-8") as log, _quote_executable(), name_starter():
            output = _StageMessages(log, sys.stderr)
            try:
                with contextlib.redirect_stdout(output):
                    pipeline(**arguments)
            except RuntimeError as error:
                failed = COLOUR.sub("", f"{error} {output.last_line}").strip()
                raise PipelineFailed(f"{failed} ({log_path})") from error


@contextlib.contextmanager
def _quote_executable() -> Iterator[None]:
    """Quote Python's path for the shell: KFP writes it unquoted into the script of a component."""
    before = sys.executable
    sys.executable = shlex.quote(before)
    try:
        yield
    finally:
        sys.executable = before


class ClusterRunner:
    """Kubeflow Pipelines at the settings' endpoint."""

    is_exclusive = False

    def __init__(self, path: Path, settings: RetrainingSettings, *, poll_seconds: float = 10) -> None:
        self._path, self._settings, self._poll_seconds = path, settings, poll_seconds

    @cached_property
    def _client(self) -> Any:
        import kfp

        settings = self._settings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # servers before 2.0 are not supported
            return kfp.Client(settings.endpoint, namespace=settings.namespace, existing_token=settings.token or None)

    def ask_server(self) -> str:
        """Return the endpoint's address if it answers; else raise ServiceUnavailable."""
        endpoint, token = self._settings.endpoint, self._settings.token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        health = urllib.request.Request(f"{endpoint.rstrip('/')}/apis/v2beta1/healthz", headers=headers)  # noqa: S310
        try:  # not the client, which would ask five times and hide the answer
            urllib.request.urlopen(health, timeout=5).close()  # noqa: S310 - from the settings
        except (OSError, ValueError) as error:
            raise ServiceUnavailable(f"Kubeflow Pipelines at {endpoint}: {error}") from error
        with self._unavailable():
            self._client.list_experiments(page_size=1, namespace=self._settings.namespace)
        return self._settings.endpoint

    def hold(self) -> contextlib.AbstractContextManager[bool]:
        """Hold no lock: a second call finds the run on the cluster by its name."""
        return contextlib.nullcontext(True)

    def run(self, name: str, arguments: Mapping[str, str]) -> None:
        """Start a run with this name unless one is open, and wait for its end.

        Raises
        ------
        PipelineFailed
            If the run did not succeed (the message names its state), or takes longer than ``timeout_seconds``.
        ServiceUnavailable
            If the endpoint cannot be reached.
        """
        wanted = [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]
        with self._unavailable():
            known = self._client.list_runs(
                experiment_id=self._create_experiment(),
                sort_by="created_at desc",
                filter=json.dumps({"predicates": wanted}),
            ).runs
            run = known[0] if known and known[0].state not in ENDED else None
            run = run or self._client.run_pipeline(job_name=name, **self._describe_run(arguments))
            until = time.monotonic() + self._settings.timeout_seconds
            while run.state not in ENDED and time.monotonic() < until:
                time.sleep(self._poll_seconds)
                run = self._client.get_run(run.run_id)
        if run.state != "SUCCEEDED":
            raise PipelineFailed(f"run {run.run_id} of {self._settings.endpoint} is {run.state}")

    def schedule(self, name: str, cron: str, arguments: Mapping[str, str]) -> str:
        """Let the cluster run the pipeline by a schedule; return the id of the recurring run.

        Parameters
        ----------
        cron
            Six fields; the first one is seconds.
        """
        with self._unavailable():
            once = {"cron_expression": cron, "max_concurrency": 1, "no_catchup": True}
            made = self._client.create_recurring_run(job_name=name, **once, **self._describe_run(arguments))
        return str(made.recurring_run_id)

    def publish(self) -> dict[str, str]:
        """Upload this version of the pipeline unless the cluster has it; return the ids to run it with."""
        text = compile_pipeline(self._path, self._settings)
        version = hashlib.sha256(text.encode()).hexdigest()[:16]
        with tempfile.TemporaryDirectory() as folder, self._unavailable():
            package = Path(folder) / "pipeline.yaml"
            package.write_text(text, encoding="utf-8")
            pipeline_id = self._client.get_pipeline_id(EXPERIMENT)
            if pipeline_id is None:
                pipeline_id = self._client.upload_pipeline(str(package), EXPERIMENT).pipeline_id
            known = self._client.list_pipeline_versions(pipeline_id, page_size=100, sort_by="created_at desc")
            same = [found for found in known.pipeline_versions or [] if found.display_name == version]
            found = same[0] if same else self._client.upload_pipeline_version(str(package), version, pipeline_id)
        return {"pipeline_id": pipeline_id, "version_id": found.pipeline_version_id}

    def _create_experiment(self) -> str:
        return str(self._client.create_experiment(EXPERIMENT).experiment_id)  # or find it

    def _describe_run(self, arguments: Mapping[str, str]) -> dict[str, Any]:
        account = self._settings.service_account or None
        place = {"experiment_id": self._create_experiment(), "service_account": account}
        return {**place, "params": dict(arguments), **self.publish()}

    @contextlib.contextmanager
    def _unavailable(self) -> Iterator[None]:
        """Turn the client's network and server errors into ours; send its printed output to stderr."""
        import kfp_server_api
        import urllib3

        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError, TimeoutError) as error:
            text = " ".join(str(error).split())
            raise ServiceUnavailable(f"Kubeflow Pipelines at {self._settings.endpoint}: {text}") from error


class _StageMessages(io.TextIOBase):
    """A stream that writes all output to a log, and passes the stages' messages on to people."""

    def __init__(self, log: TextIO, people: TextIO) -> None:
        self._log, self._people, self._rest = log, people, ""
        self.last_line = ""  # the last line of a component's own output: its error if it fails

    def write(self, text: str) -> int:
        """Log the text, and pass on the stages' messages among its whole lines."""
        self._log.write(text)
        *lines, self._rest = (self._rest + text).split("\n")
        self._people.writelines(f"{found['message']}\n" for found in map(STAGE_MESSAGE.match, lines) if found)
        said = [line.strip() for line in lines if line.startswith("    ") and line.strip()]  # the others are KFP's
        self.last_line = said[-1] if said else self.last_line
        return len(text)
