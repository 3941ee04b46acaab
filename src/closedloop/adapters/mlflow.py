"""MLflow's registry: the versions of one data set's registered model, their tags and aliases."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from closedloop.adapters.mlflow_runs import MODEL_PATH, Runs
from closedloop.errors import DataError, ServiceUnavailable, hide_passwords

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from sklearn.pipeline import Pipeline

CHALLENGER, CHAMPION = "challenger", "champion"
DIGEST_TAG = "closedloop.folder_sha256"
GATES_TAG = "closedloop.gates"
FEATURES_TAG = "closedloop.feature_service"
VERDICT_TAG, COMPARED_TAG = "closedloop.comparison", "closedloop.compared_with"  # verdict, champion's digest
EXCUSED_TAG = "closedloop.excused"  # gates that stop nothing because that champion misses them too
REJECTED_TAG = "closedloop.rejected"
JOURNAL_TAG = "closedloop.journal_head"  # of the registered model
KIND_TAG = "closedloop.kind"  # a training, or a recalibration of which version
BENTO_TAG = "closedloop.bento_sha256"
MONITOR_TAG = "closedloop.monitor_check"  # of the run that keeps a check's report
NOTE_TAG = "mlflow.note.content"  # MLflow's own: the description of a run
CONTRACT_PATH = "contract"  # of the model folder among a run's artifacts
MODEL_NOTE = (
    "Each version's description says what it is, and where its model card is. Promotion goes through "
    "`closedloop release start VERSION`; an alias that is changed here by hand does not change what serves."
)
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class Tracking(Runs):
    """One data set's experiment and registered model: tracker and registry in one."""

    def find_experiment_page(self) -> str:
        """Where in MLflow's UI the runs of the data set's experiment are; empty before its first run."""
        with self.explain_errors():
            found = self.client.get_experiment_by_name(self.model_name)
        # without the type it opens the pages of generative AI, whatever kind the experiment is of
        return "" if found is None else f"/#/experiments/{found.experiment_id}/runs?workflowType=machine_learning"

    def find_run(self, value: str, tag: str = DIGEST_TAG, *, finished: bool = False) -> str | None:
        """The newest run with this tag value, or None; with ``finished`` only runs that ended well count."""
        wanted = f"tags.`{tag}` = '{value}'" + (" and attributes.status = 'FINISHED'" if finished else "")
        with self.explain_errors():
            experiment = self.client.get_experiment_by_name(self.model_name)
            if experiment is None:
                return None
            runs = self.client.search_runs([experiment.experiment_id], wanted, max_results=1)
        return runs[0].info.run_id if runs else None

    def find_version(self, folder_sha256: str) -> ModelVersion | None:
        """The registered version whose contract folder has this digest."""
        wanted = f"name = '{self.model_name}' and tags.`{DIGEST_TAG}` = '{folder_sha256}'"
        with self.explain_errors():
            found = self.client.search_model_versions(wanted)
        return found[0] if found else None

    def read_newest_version(self) -> int:
        """The highest number of the registered model's versions; 0 if there is none."""
        with self.explain_errors():
            found = self.client.search_model_versions(
                f"name = '{self.model_name}'", max_results=1, order_by=["version_number DESC"]
            )
        return int(found[0].version) if found else 0

    def register(self, model_uri: str, run_id: str, tags: Mapping[str, str]) -> ModelVersion:
        """Create a version of the data set's registered model, with the description of its run."""
        from mlflow.exceptions import MlflowException

        # a server accepts a logged model only by its id
        model_id = model_uri.removeprefix("models:/") if model_uri.startswith("models:/m-") else None
        with self.explain_errors():
            self.open()
            try:
                self.client.create_registered_model(self.model_name, description=MODEL_NOTE)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            note = self.client.get_run(run_id).data.tags.get(NOTE_TAG)
            return self.client.create_model_version(
                self.model_name, model_uri, run_id, tags=dict(tags), model_id=model_id, description=note
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

        with self.explain_errors():
            try:
                found: ModelVersion = getattr(self.client, look_up)(self.model_name, name)
            except MlflowException as error:
                if error.error_code in ABSENT:
                    return None
                raise
        return found

    def tag_version(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags of a version that differ from what it has."""
        with self.explain_errors():
            for name, value in tags.items():
                if version.tags.get(name) != value:
                    self.client.set_model_version_tag(self.model_name, version.version, name, value)

    def set_challenger(self, version: str) -> None:
        """Point the alias ``challenger`` at a version."""
        with self.explain_errors():
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
        """Position and hash of the journal's head, from the registered model's tag; None before the first entry."""
        with self.explain_errors():
            found = self.client.search_registered_models(f"name = '{self.model_name}'")
        return found[0].tags.get(JOURNAL_TAG) if found else None

    def mirror_release(self, champion: str, *, rejected: str | None, reason: str, mark: str | None) -> None:
        """Set aliases and tags to the released state; skip values that are already set, and a ``mark`` of None.

        Raises
        ------
        ServiceUnavailable
            If the registry cannot be reached.
        DataError
            As `move_champion`.
        """
        with self.explain_errors():
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
            place = self.open().artifacts.download_artifacts(uri, dst_path=str(folder))
        except (MlflowException, OSError) as error:
            raise ServiceUnavailable(f"{name}: artifacts are not there: {hide_passwords(str(error))}") from None
        return Path(place), found.tags[DIGEST_TAG]

    def load_pipeline(self, version: str, model_type: str) -> Pipeline:
        """A version's fitted pipeline, from its skops file; types that are not on the reviewed list are refused.

        MLflow's own loader would trust the types that the artifact lists, and the code that it carries.

        Raises
        ------
        ServiceUnavailable
            If the registry or its artifacts cannot be reached.
        DataError
            If the file is damaged, or holds a type that is not on the list.
        """
        from mlflow.exceptions import MlflowException

        from closedloop.adapters.skops import MLFLOW_FILE, load_pipeline

        found, name = self.read_version(version), f"{self.model_name} version {version}"
        try:
            with tempfile.TemporaryDirectory() as folder:
                # by the run: MLflow does not find a version's own address below a folder with % in its name
                uri = f"runs:/{found.run_id}/{MODEL_PATH}"
                place = self.open().artifacts.download_artifacts(uri, dst_path=folder)
                return load_pipeline(Path(place) / MLFLOW_FILE, model_type)
        except (MlflowException, OSError) as error:
            raise ServiceUnavailable(f"{name}: its pipeline is not there: {hide_passwords(str(error))}") from None

    def read_gates(self, version: ModelVersion) -> dict[str, str] | None:
        """The sentence of each gate that judged a version, from its run; None if none is recorded."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.open().artifacts.load_dict(f"runs:/{version.run_id}/gates/gates.json")
        except (MlflowException, OSError):
            return None
        return {name: gate["sentence"] for name, gate in found["gates"].items()}
