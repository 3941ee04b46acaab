"""MLflow's store and its server: where they are, and whether they answer."""

from __future__ import annotations

import datetime as dt
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from closedloop.errors import ConfigError, ServiceUnavailable, hide_passwords
from closedloop.files import find_sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from closedloop.config.settings import Settings


class MlflowStore:
    """The store of one data set's experiment and registered model.

    Raises
    ------
    ServiceUnavailable
        On first use, if the tracking store cannot be reached.
    """

    def __init__(self, settings: Settings, model_name: str) -> None:
        self.model_name = model_name
        self._uri = settings.locate_url(settings.tracking.uri)
        artifacts = settings.tracking.artifacts  # mlflow-artifacts:/ is an address too
        self.artifacts = artifacts if urlsplit(artifacts).scheme else settings.locate(artifacts).as_uri()
        self._prepared = False

    @property
    def client(self) -> MlflowClient:
        """MLflow's own client of this store."""
        import mlflow

        self._prepare_file()
        return mlflow.MlflowClient(self._uri, self._uri)

    def ask_server(self) -> tuple[str, float]:
        """The server's MLflow version, and the seconds that its clock is ahead of ours (0 without a server).

        Raises
        ------
        ServiceUnavailable
            If the server does not answer, or refuses our credentials.
        ConfigError
            If its major version differs from the client's.
        """
        import email.utils

        import mlflow
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        with self.explain_errors():
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
        """Return the address of the artifacts after listing them.

        Raises
        ------
        ServiceUnavailable
            If they cannot be listed.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        self.open()
        try:
            get_artifact_repository(self.artifacts).list_artifacts()
        except Exception as error:  # each kind of store raises its own error classes
            raise ServiceUnavailable(hide_passwords(f"artifacts at {self.artifacts}: {error}")) from None
        return hide_passwords(self.artifacts)

    def list_ui_command(self, port: int) -> tuple[str, list[str] | None]:
        """The address of MLflow's UI, and the command that starts it; None where a server has it."""
        if self._uri.startswith("http"):
            return hide_passwords(self._uri).rstrip("/"), None
        options = ["--backend-store-uri", self._uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        return f"http://127.0.0.1:{port}", [sys.executable, "-m", "mlflow", "ui", *options]

    @contextmanager
    def explain_errors(self, *, files: bool = True) -> Iterator[None]:
        """Turn errors of MLflow and its client into ours; ``files``: every OSError too, not only network errors."""
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        kinds = (MlflowException, SQLAlchemyError, OSError if files else RequestException)
        try:
            yield
        except kinds as error:
            raise ServiceUnavailable(hide_passwords(f"MLflow at {self._uri}: {error}")) from None

    def open(self) -> Any:
        """Point MLflow at this store and return it: many of its functions know only the process-wide address."""
        import mlflow

        self._prepare_file()
        mlflow.set_tracking_uri(self._uri)
        mlflow.set_registry_uri(self._uri)
        return mlflow

    def _prepare_file(self) -> None:
        """If the store is a local file, make it, or update its artifact paths after a move; once for this object."""
        path = find_sqlite_file(self._uri)
        if path is None or (self._prepared and path.exists()):
            return
        import mlflow

        from closedloop.adapters.mlflow_file import create_store, follow_artifacts

        if "%" in (installed := str(Path(mlflow.__file__).parent)):
            raise ConfigError(
                f"{installed}: MLflow cannot run from a folder with % in its path; rename this environment's folder, "
                "and install it again"
            )
        try:
            if not path.exists():
                create_store(path, self.artifacts)
            follow_artifacts(path, self.model_name, self.artifacts)
        except (OSError, sqlite3.Error) as error:
            raise ServiceUnavailable(f"MLflow at {self._uri}: {error}") from error
        self._prepared = True
