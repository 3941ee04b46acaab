"""MLflow: runs, models and the registry; one experiment and one registered model a data set."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from closedloop.errors import ConfigError, DataError, ServiceUnavailable, hide_passwords
from closedloop.settings import Settings

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from sklearn.pipeline import Pipeline

CHALLENGER, CHAMPION = "challenger", "champion"
DIGEST_TAG = "closedloop.folder_sha256"
GATES_TAG = "closedloop.gates"
FEATURES_TAG = "closedloop.feature_service"
VERDICT_TAG, COMPARED_TAG = "closedloop.comparison", "closedloop.compared_with"  # with the champion of that digest
REJECTED_TAG = "closedloop.rejected"
JOURNAL_TAG = "closedloop.journal_head"  # of the registered model
BENTO_TAG = "closedloop.bento_sha256"
MONITOR_TAG = "closedloop.monitor_check"  # of the run that keeps a check's report
CONTRACT_PATH = "contract"
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class Tracking:
    """One data set's experiment and registered model.

    Raises
    ------
    ServiceUnavailable
        On first use, if the tracking store cannot be reached.
    """

    def __init__(self, settings: Settings, model_name: str) -> None:
        self.model_name = model_name
        self._uri = settings.locate_url(settings.tracking.uri)
        artifacts = settings.tracking.artifacts  # mlflow-artifacts:/ is an address too
        self._artifacts = artifacts if urlsplit(artifacts).scheme else settings.locate(artifacts).as_uri()

    @property
    def client(self) -> MlflowClient:
        """MLflow's own client of this store."""
        import mlflow

        self._create_store()
        return mlflow.MlflowClient(self._uri, self._uri)

    @contextmanager
    def start_run(
        self, name: str, *, run_id: str | None = None, tags: Mapping[str, str] | None = None
    ) -> Iterator[str]:
        """Open a run of the data set's experiment, or an earlier one again; yields its id."""
        with self._explain_errors():
            mlflow = self._open()
            if mlflow.get_experiment_by_name(self.model_name) is None:
                mlflow.create_experiment(
                    self.model_name,
                    artifact_location=f"{self._artifacts.rstrip('/')}/{self.model_name}",
                    tags={"mlflow.experimentKind": "custom_model_development"},  # else the UI opens on its GenAI side
                )
            mlflow.set_experiment(self.model_name)
            run = mlflow.start_run(run_id=run_id, run_name=None if run_id else name, tags=dict(tags or {}))
        with self._explain_errors(files=False), run:
            yield run.info.run_id

    def ask_server(self) -> tuple[str, float]:
        """The store's version of MLflow, and the seconds that its server's clock is ahead of ours (0 without a server).

        Raises
        ------
        ServiceUnavailable
            If it does not answer, or does not let us in.
        ConfigError
            If its major version is not ours.
        """
        import email.utils

        import mlflow
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        with self._explain_errors():
            if not self._uri.startswith("http"):
                self.client.search_experiments(max_results=1)
                return mlflow.__version__, 0.0
            creds = get_default_host_creds(self._uri)
            answer = http_request(creds, "/version", "GET", max_retries=0, timeout=5, raise_on_status=False)
        if answer.status_code != 200:
            raise ServiceUnavailable(hide_passwords(f"MLflow at {self._uri} answers {answer.status_code}"))
        version, date = answer.text.strip(), answer.headers.get("date")
        if version.split(".")[0] != mlflow.__version__.split(".")[0]:
            raise ConfigError(f"MLflow's server is version {version}, this client {mlflow.__version__}")
        now = dt.datetime.now(dt.UTC)
        return version, 0.0 if date is None else (email.utils.parsedate_to_datetime(date) - now).total_seconds()

    def find_artifacts(self) -> str:
        """Where artifacts lie, once they were listed.

        Raises
        ------
        ServiceUnavailable
            If they cannot be.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        self._open()
        try:
            get_artifact_repository(self._artifacts).list_artifacts()
        except Exception as error:  # each kind of store has errors of its own
            raise ServiceUnavailable(hide_passwords(f"artifacts at {self._artifacts}: {error}")) from None
        return hide_passwords(self._artifacts)

    @contextmanager
    def _explain_errors(self, *, files: bool = True) -> Iterator[None]:
        """What MLflow and its client throw; ``files``: and the operating system, where only MLflow asks for files."""
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        kinds = (MlflowException, SQLAlchemyError, OSError if files else RequestException)
        try:
            yield
        except kinds as error:
            raise ServiceUnavailable(hide_passwords(f"MLflow at {self._uri}: {error}")) from None

    def _open(self) -> Any:
        """MLflow, speaking to this store: much of it knows only the process-wide address."""
        import mlflow

        self._create_store()
        mlflow.set_tracking_uri(self._uri)
        mlflow.set_registry_uri(self._uri)
        return mlflow

    def _create_store(self) -> None:
        """Make the tables of a local store beside it, and put the finished file in its place.

        MLflow makes them in dozens of steps that no transaction holds together: killed in between, it would refuse
        the file for good.
        """
        prefix = "sqlite:///"
        path = Path(self._uri.removeprefix(prefix))
        if not self._uri.startswith(prefix) or "?" in self._uri or path.exists():
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            SqlAlchemyStore(f"{prefix}{beside}", self._artifacts).engine.dispose()
            with suppress(FileExistsError):  # another process was quicker, and may have written to its file already
                path.hardlink_to(beside)
        except OSError as error:
            raise ServiceUnavailable(f"MLflow at {self._uri}: {error}") from error
        finally:
            beside.unlink(missing_ok=True)

    @contextmanager
    def start_trial(self, number: int) -> Iterator[None]:
        """A run nested in the open one, for one trial of the search."""
        import mlflow

        with mlflow.start_run(nested=True, run_name=f"trial {number}"):
            yield

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters of the open run, nested mappings with dots in their names."""
        import mlflow

        mlflow.log_params(dict(_flatten(params)))

    def log_metrics(self, metrics: Mapping[str, float], *, prefix: str = "") -> None:
        """Figures of the open run, in one call (one by one is 30 times slower)."""
        import mlflow

        mlflow.log_metrics({f"{prefix}{name}": float(value) for name, value in metrics.items() if value == value})

    def log_curves(self, curves: pd.DataFrame) -> None:
        """Metrics of the open run over its steps: column ``step``, and one column a metric."""
        import mlflow

        for row in curves.to_dict("records"):
            step = int(row.pop("step"))
            mlflow.log_metrics(row, step=step)

    def log_inputs(self, frames: Mapping[str, tuple[pd.DataFrame, Path, str]]) -> None:
        """Data set inputs of the open run: by name, the frame, its file and the file's digest."""
        import mlflow
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.data.sources import LocalArtifactDatasetSource
        from mlflow.models import infer_signature

        for name, (frame, path, digest) in frames.items():
            # from_pandas would profile every row, which takes longer than the fit
            schema = infer_signature(frame.head(100)).inputs
            source = LocalArtifactDatasetSource(str(path))
            mlflow.log_input(MetaDataset(source, name=name, digest=digest[:36], schema=schema), context=name)

    def log_files(self, paths: Mapping[str, Path]) -> None:
        """Files or folders as artifacts of the open run, by the folder they go to ("" is the top)."""
        import mlflow

        for folder, path in paths.items():
            if path.is_dir():
                mlflow.log_artifacts(str(path), folder or None)
            elif path.exists():
                mlflow.log_artifact(str(path), folder or None)

    def log_pipeline(self, pipeline: Pipeline, example: pd.DataFrame) -> str:
        """The fitted pipeline as a model of the open run (skops format: no pickle); returns its URI."""
        import mlflow
        import pandas as pd
        import sklearn
        from mlflow.models import infer_signature

        from closedloop.adapters.skops import TRUSTED_TYPES

        signature = infer_signature(example, pipeline.predict_proba(example))
        info = mlflow.sklearn.log_model(
            pipeline,
            name="model",
            signature=signature,
            input_example=example,
            serialization_format="skops",
            skops_trusted_types=TRUSTED_TYPES,
            pyfunc_predict_fn="predict_proba",
            pip_requirements=[f"scikit-learn=={sklearn.__version__}", f"pandas=={pd.__version__}", "closedloop"],
        )
        uri: str = info.model_uri
        return uri

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the open run."""
        import mlflow

        mlflow.set_tags(dict(tags))

    def find_run(self, value: str, tag: str = DIGEST_TAG, *, finished: bool = False) -> str | None:
        """The newest run with this tag: of a contract folder's digest, or of a check (``finished``: to its end)."""
        wanted = f"tags.`{tag}` = '{value}'" + (" and attributes.status = 'FINISHED'" if finished else "")
        with self._explain_errors():
            experiment = self.client.get_experiment_by_name(self.model_name)
            if experiment is None:
                return None
            runs = self.client.search_runs([experiment.experiment_id], wanted, max_results=1)
        return runs[0].info.run_id if runs else None

    def find_version(self, folder_sha256: str) -> ModelVersion | None:
        """The registered version whose contract folder has this digest."""
        wanted = f"name = '{self.model_name}' and tags.`{DIGEST_TAG}` = '{folder_sha256}'"
        with self._explain_errors():
            found = self.client.search_model_versions(wanted)
        return found[0] if found else None

    def register(self, model_uri: str, run_id: str, tags: Mapping[str, str]) -> ModelVersion:
        """Create a version of the data set's registered model."""
        from mlflow.exceptions import MlflowException

        # a server takes a logged model by its id alone
        model_id = model_uri.removeprefix("models:/") if model_uri.startswith("models:/m-") else None
        with self._explain_errors():
            self._open()
            try:
                self.client.create_registered_model(self.model_name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            return self.client.create_model_version(
                self.model_name, model_uri, run_id, tags=dict(tags), model_id=model_id
            )

    def read_alias(self, alias: str) -> ModelVersion | None:
        """The version that an alias names, or None."""
        return self._find_version("get_model_version_by_alias", alias)

    def read_champion_version(self) -> str | None:
        """The number of the version that ``champion`` names, or None."""
        found = self.read_alias(CHAMPION)
        return None if found is None else str(found.version)

    def read_champion_digest(self) -> str | None:
        """The digest of the contract folder of the version that ``champion`` names, or None."""
        found = self.read_alias(CHAMPION)
        return None if found is None else found.tags.get(DIGEST_TAG)

    def read_version(self, version: str) -> ModelVersion:
        """A registered version.

        Raises
        ------
        DataError
            If there is no such version.
        """
        found = self._find_version("get_model_version", version)
        if found is None:
            raise DataError(f"{self.model_name} has no version {version}")
        return found

    def _find_version(self, look_up: str, name: str) -> ModelVersion | None:
        from mlflow.exceptions import MlflowException

        with self._explain_errors():
            try:
                found: ModelVersion = getattr(self.client, look_up)(self.model_name, name)
            except MlflowException as error:
                if error.error_code in ABSENT:
                    return None
                raise
        return found

    def tag_version(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags of a version that differ from what it has."""
        with self._explain_errors():
            for name, value in tags.items():
                if version.tags.get(name) != value:
                    self.client.set_model_version_tag(self.model_name, version.version, name, value)

    def set_challenger(self, version: str) -> None:
        """Point the alias ``challenger`` at a version."""
        with self._explain_errors():
            self.client.set_registered_model_alias(self.model_name, CHALLENGER, version)

    def reject(self, version: str, reason: str) -> None:
        """Tag a version as rejected, which takes the alias ``challenger`` from it."""
        found = self.read_version(version)
        self.tag_version(found, {REJECTED_TAG: reason})
        if CHALLENGER in found.aliases:
            self.client.delete_registered_model_alias(self.model_name, CHALLENGER)

    def require_passed(self, version: str) -> ModelVersion:
        """A version that passed its gates.

        Raises
        ------
        DataError
            If that version carries no passed evaluation.
        """
        found = self.read_version(version)
        if found.tags.get(GATES_TAG) != "passed":
            raise DataError(
                f"{self.model_name} version {version}: no passed evaluation is recorded; it cannot be champion"
            )
        return found

    def move_champion(self, version: str) -> None:
        """Point the alias ``champion`` at a version that passed its gates: the one function that does.

        Raises
        ------
        DataError
            If that version carries no passed evaluation.
        """
        found = self.require_passed(version)
        if CHALLENGER in found.aliases:  # first, so that a version is never left with both
            self.client.delete_registered_model_alias(self.model_name, CHALLENGER)
        if CHAMPION not in found.aliases:
            self.client.set_registered_model_alias(self.model_name, CHAMPION, version)

    def read_journal_mark(self) -> str | None:
        """Place and hash of the journal's head, as the registered model's tag keeps it; None before the first."""
        with self._explain_errors():
            found = self.client.search_registered_models(f"name = '{self.model_name}'")
        return found[0].tags.get(JOURNAL_TAG) if found else None

    def mirror_release(self, champion: str, *, rejected: str | None, reason: str, mark: str | None) -> None:
        """Let aliases and tags say what was released; what they say already is not written again, nor a ``mark`` None.

        Raises
        ------
        ServiceUnavailable
            If the registry cannot be reached.
        DataError
            As `move_champion`.
        """
        with self._explain_errors():
            self.move_champion(champion)
            if rejected is not None:
                self.reject(rejected, reason)
            if mark is not None:
                self.client.set_registered_model_tag(self.model_name, JOURNAL_TAG, mark)

    def fetch_version(self, version: str, folder: Path) -> tuple[Path, str]:
        """Download a version's contract folder into ``folder``; returns where it is, and the digest that its tag says.

        Raises
        ------
        ServiceUnavailable
            If the registry or its artifacts cannot be reached.
        DataError
            If there is no such version, or it carries no digest.
        """
        from mlflow.exceptions import MlflowException

        found, name = self.read_version(version), f"{self.model_name} version {version}"
        if DIGEST_TAG not in found.tags:
            raise DataError(f"{name} carries no digest ({DIGEST_TAG})")
        try:
            uri = f"runs:/{found.run_id}/{CONTRACT_PATH}"
            place = self._open().artifacts.download_artifacts(uri, dst_path=str(folder))
        except (MlflowException, OSError) as error:
            raise ServiceUnavailable(f"{name}: artifacts are not there: {hide_passwords(str(error))}") from None
        return Path(place), found.tags[DIGEST_TAG]

    def read_gates(self, version: ModelVersion) -> dict[str, str] | None:
        """A sentence for each gate that judged a version, from its run; None where none is recorded."""
        from mlflow.exceptions import MlflowException

        try:
            found = self._open().artifacts.load_dict(f"runs:/{version.run_id}/gates/gates.json")
        except (MlflowException, OSError):
            return None
        return {name: gate["sentence"] for name, gate in found["gates"].items()}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
