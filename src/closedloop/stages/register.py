"""register: a model that passed its gates becomes a version, and challenger; a winner may become champion."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from closedloop.contract import digest_folder, read_contract
from closedloop.errors import ConfigError, DataError, GateFailed
from closedloop.files import read_json, write_json

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from closedloop.stages.deploy import Releases

# MLflow's deprecated stages, for those used to them.
ALIAS_OF_STAGE = {"Staging": "challenger", "Production": "champion"}


def register(
    releases: Releases,
    *,
    now: dt.datetime,
    model_dir: Path,
    gates_path: Path,
    run_path: Path,
    registration_path: Path,
    auto_promote: bool,
    model_name: str | None = None,
    stage: str | None = None,
    cause: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Register the evaluated model; running it again registers nothing twice.

    Parameters
    ----------
    releases
        What moves the champion.
    now
        The time that a release is recorded with (UTC).
    auto_promote
        Make the first version, or one that won against the champion, champion at once.
    model_name
        Must be the contract's, where it is given.
    stage
        ``Staging`` or ``Production``: the alias of that meaning; ``Production`` asks for the promotion of a winner
        whatever ``auto_promote`` says, and is refused to anything else.
    cause
        Why the model was trained (``trigger_id``, ``check_id``): tags of the version. They are not in the contract,
        since the same data and parameters give the same folder whoever asked.

    Raises
    ------
    GateFailed
        If the model did not pass its evaluation, or is asked to be champion without a win.
    DataError
        If the evaluation is of another model, or the champion has changed since.
    ConfigError
        If ``model_name`` or ``stage`` does not fit.
    """
    from closedloop.adapters.mlflow import CHALLENGER, CHAMPION, DIGEST_TAG, FEATURES_TAG, GATES_TAG, REJECTED_TAG
    from closedloop.stages.deploy import deploy_champion

    tracking, contract = releases.tracking, read_contract(model_dir)
    folder_sha256 = digest_folder(model_dir)
    verdict = read_json(gates_path, made_by="closedloop evaluate")
    check_request(contract.model_name, verdict, folder_sha256, model_name=model_name, stage=stage)
    version = tracking.find_version(folder_sha256)
    created = version is None
    if version is None:
        run = read_json(run_path, made_by="closedloop train")
        if run.get("folder_sha256") != folder_sha256:
            raise DataError(f"{run_path} is of another model than {model_dir}: run 'closedloop train' again")
        tags = contract.lineage.list_tags() | {f"closedloop.{name}": value for name, value in (cause or {}).items()}
        tags |= {DIGEST_TAG: folder_sha256, GATES_TAG: "passed", FEATURES_TAG: contract.feature_service}
        version = tracking.register(run["model_uri"], run["run_id"], tags)
    tracking.tag_version(version, describe_comparison(verdict))
    row = releases.settle(overrule=True).row  # what a killed registration left half done is done first
    champion = tracking.read_alias(CHAMPION)
    is_champion = champion is not None and champion.version == version.version
    promoted = False
    if not is_champion:
        rejected = stage is None and REJECTED_TAG in version.tags
        wanted = ALIAS_OF_STAGE.get(stage or "") == CHAMPION or (stage is None and auto_promote and not rejected)
        interrupted = not rejected and is_interrupted(version, champion, tracking.read_alias(CHALLENGER))
        if created or wanted or interrupted:
            tracking.set_challenger(version.version)
        if wanted:
            promoted = may_be_champion(verdict, version.version, champion, required=stage is not None)
    if promoted or (is_champion and row is None):
        reason = "the first version" if champion is None else "won against the champion offline"
        deploy_champion(releases, str(version.version), now=now, actor="register", reason=reason)
    report = {
        "model_name": contract.model_name,
        "version": int(version.version),
        "alias": "champion" if is_champion or promoted else "challenger",
        "folder_sha256": folder_sha256,
    }
    write_json(registration_path, report)
    return {**report, "created": created}


def describe_comparison(verdict: dict[str, Any]) -> dict[str, str]:
    """Tags that say how a version did against the champion of its evaluation; nothing where there was none."""
    from closedloop.adapters.mlflow import COMPARED_TAG, VERDICT_TAG

    compared = (verdict["champion"] or {}).get("folder_sha256")
    if not verdict["comparison"] or not compared:
        return {}
    return {VERDICT_TAG: verdict["comparison"]["verdict"], COMPARED_TAG: compared}


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
