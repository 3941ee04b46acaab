"""register: a model that passed its gates becomes a version, and challenger; a winner may become champion."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from closedloop.contract import digest_folder, read_contract
from closedloop.errors import ConfigError, DataError, GateFailed
from closedloop.files import read_json, write_json

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from closedloop.adapters.mlflow import Tracking
    from closedloop.adapters.store import Store

# MLflow's deprecated stages, for those used to them.
ALIAS_OF_STAGE = {"Staging": "challenger", "Production": "champion"}


def register(
    tracking: Tracking,
    store: Store,
    *,
    now: dt.datetime,
    model_dir: Path,
    gates_path: Path,
    run_path: Path,
    registration_path: Path,
    auto_promote: bool,
    model_name: str | None = None,
    stage: str | None = None,
) -> dict[str, Any]:
    """Register the evaluated model; running it again registers nothing twice.

    Parameters
    ----------
    store
        Whose deployment row says what serves.
    now
        The time that a release is recorded with (UTC).
    auto_promote
        Make the first version, or one that won against the champion, champion at once.
    model_name
        Must be the contract's, where it is given.
    stage
        ``Staging`` or ``Production``: the alias of that meaning; ``Production`` asks for the promotion of a winner
        whatever ``auto_promote`` says, and is refused to anything else.

    Raises
    ------
    GateFailed
        If the model did not pass its evaluation, or is asked to be champion without a win.
    DataError
        If the evaluation is of another model, or the champion has changed since.
    ConfigError
        If ``model_name`` or ``stage`` does not fit.
    """
    from closedloop.adapters.mlflow import CHALLENGER, CHAMPION, DIGEST_TAG, GATES_TAG

    contract = read_contract(model_dir)
    folder_sha256 = digest_folder(model_dir)
    verdict = read_json(gates_path, made_by="closedloop evaluate")
    check_request(contract.model_name, verdict, folder_sha256, model_name=model_name, stage=stage)
    version = tracking.find_version(folder_sha256)
    created = version is None
    if version is None:
        run = read_json(run_path, made_by="closedloop train")
        if run.get("folder_sha256") != folder_sha256:
            raise DataError(f"{run_path} is of another model than {model_dir}: run 'closedloop train' again")
        tags = contract.lineage.list_tags() | {
            DIGEST_TAG: folder_sha256,
            GATES_TAG: "passed",
            "closedloop.feature_service": contract.feature_service,
        }
        version = tracking.register(run["model_uri"], run["run_id"], tags)
    champion = tracking.read_alias(CHAMPION)
    is_champion = champion is not None and champion.version == version.version
    promoted = False
    if not is_champion:
        wanted = ALIAS_OF_STAGE.get(stage or "") == CHAMPION or (stage is None and auto_promote)
        if created or wanted or is_interrupted(version, champion, tracking.read_alias(CHALLENGER)):
            tracking.set_challenger(version.version)
        if wanted:
            promoted = may_be_champion(verdict, version.version, champion, required=stage is not None)
    store.upgrade()
    if promoted or (is_champion and store.read_deployment(contract.model_name) is None):
        deploy_champion(tracking, store, str(version.version), now=now)
    report = {
        "model_name": contract.model_name,
        "version": int(version.version),
        "alias": "champion" if is_champion or promoted else "challenger",
        "folder_sha256": folder_sha256,
    }
    write_json(registration_path, report)
    return {**report, "created": created}


def is_interrupted(version: ModelVersion, *holders: ModelVersion | None) -> bool:
    """Whether a version is newer than all that hold an alias: its registration ended before it was given one."""
    return all(holder is None or int(holder.version) < int(version.version) for holder in holders)


def check_request(
    name: str, verdict: dict[str, Any], folder_sha256: str, *, model_name: str | None, stage: str | None
) -> None:
    """Refuse a wrong name or stage, an evaluation of another model, and a failed one."""
    if model_name is not None and model_name != name:
        raise ConfigError(f"--model-name is {model_name!r}, but this model's contract says {name!r}")
    if stage is not None and stage not in ALIAS_OF_STAGE:
        raise ConfigError(f"--stage is {stage!r}; allowed: {', '.join(ALIAS_OF_STAGE)}")
    if verdict["folder_sha256"] != folder_sha256:
        raise DataError("the evaluation is of another model than this one: run 'closedloop evaluate' again")
    if not verdict["passed"]:
        failed = [
            result["sentence"] for result in verdict["gates"].values() if result["blocking"] and not result["passed"]
        ]
        raise GateFailed("the model did not pass its evaluation and is not registered:\n  " + "\n  ".join(failed))


def may_be_champion(verdict: dict[str, Any], version: str, champion: Any, *, required: bool) -> bool:
    """Whether a version is the first or a winner; anything else stays challenger, or is refused if ``required``."""
    from closedloop.adapters.mlflow import DIGEST_TAG

    compared = (verdict["champion"] or {}).get("folder_sha256")
    now = champion.tags.get(DIGEST_TAG) if champion is not None else None
    if compared != now:
        raise DataError(
            f"the evaluation compared with champion {compared and compared[:12]}, but the champion is now "
            f"{now and now[:12]}: run 'closedloop evaluate' again"
        )
    won = champion is None or (verdict["comparison"] or {}).get("verdict") == "win"
    if not won and required:
        reason = (verdict["comparison"] or verdict["champion"] or {}).get("reason", "it was not compared")
        raise GateFailed(f"version {version} did not win against the champion and cannot be Production: {reason}")
    return won


def deploy_champion(tracking: Tracking, store: Store, version: str, *, now: dt.datetime) -> None:
    """Let a version serve all customers, and its alias say so; nothing changes where it does already.

    The row is what serves; killed between the two writes, the next registration mends the alias.
    """
    from closedloop.adapters.mlflow import CHAMPION
    from closedloop.adapters.store import Deployment

    name = tracking.model_name
    row = store.read_deployment(name)
    if row is None or row.champion_version != version:
        revision = row.revision if row else 0
        salt = f"{name}-{revision + 1}"
        store.write_deployment(Deployment(name, revision, version, salt, now), expected_revision=revision)
    alias = tracking.read_alias(CHAMPION)
    if alias is None or str(alias.version) != version:  # MLflow's local stores give a number, its server text
        tracking.move_champion(version)
