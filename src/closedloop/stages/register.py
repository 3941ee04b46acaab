"""register: register a model that passed its gates as version and challenger; a winner may become champion."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from closedloop.adapters.mlflow import (
    CHALLENGER,
    CHAMPION,
    COMPARED_TAG,
    DIGEST_TAG,
    EXCUSED_TAG,
    FEATURES_TAG,
    GATES_TAG,
    KIND_TAG,
    REJECTED_TAG,
    VERDICT_TAG,
)
from closedloop.config.layout import Layout
from closedloop.contract import ModelContract, digest_folder, read_contract
from closedloop.core.evaluation.excuses import describe_excused
from closedloop.errors import ConfigError, DataError, GateFailed
from closedloop.files import read_json, write_json

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from closedloop.adapters.mlflow import Tracking
    from closedloop.release.moves import Releases

# MLflow's deprecated stages, for those used to them.
ALIAS_OF_STAGE = {"Staging": "challenger", "Production": "champion"}


def register(
    releases: Releases,
    layout: Layout,
    *,
    now: dt.datetime,
    auto_promote: bool,
    model_name: str | None = None,
    stage: str | None = None,
    cause: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Register the evaluated model; a second run registers nothing twice.

    Parameters
    ----------
    releases
        The journal of releases, through which the champion changes.
    now
        The time that a release is recorded with (UTC).
    auto_promote
        Make the first version, or one that won against the champion, champion at once.
    model_name
        Must be the contract's model name, or empty.
    stage
        ``Staging`` asks for the alias challenger. ``Production`` asks for the alias champion whatever ``auto_promote``
        says, and is refused unless the version is the first or won.
    cause
        Why the model was trained (``trigger_id``, ``check_id``), as tags of the version. The contract leaves them out:
        the same data and parameters give the same folder, whatever the cause.

    Raises
    ------
    GateFailed
        If the model did not pass its evaluation, or is asked to be champion without a win.
    DataError
        If the evaluation is of another model, or the champion has changed since.
    ConfigError
        If ``model_name`` or ``stage`` does not fit.
    """
    from closedloop.release.moves import deploy_champion

    tracking, contract = releases.tracking, read_contract(layout.model)
    verdict = read_json(layout.gates, made_by="closedloop evaluate")
    folder_sha256 = digest_folder(layout.model)
    check_request(contract.model_name, verdict, folder_sha256, model_name=model_name, stage=stage)
    version, created = find_or_create_version(tracking, contract, folder_sha256, layout, cause or {})
    tracking.tag_version(version, describe_comparison(verdict))
    row = releases.read_state(overrule=True).row
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
        reason = "; ".join(filter(None, [reason, describe_excused(verdict.get("excused", []))]))
        deploy_champion(releases, str(version.version), now=now, actor="register", reason=reason)
    alias = "champion" if is_champion or promoted else "challenger"
    report = {"model_name": contract.model_name, "version": int(version.version), "alias": alias}
    report |= {"folder_sha256": folder_sha256, "kind": version.tags.get(KIND_TAG, "training")}
    write_json(layout.registration, report)
    return {**report, "created": created}


def check_experiment(layout: Layout, *, model_name: str | None = None, stage: str | None = None) -> None:
    """Check all that a registration asks for, and register nothing: the report's version is None.

    Raises
    ------
    GateFailed, DataError, ConfigError
        As `check_request`.
    """
    name, folder_sha256 = read_contract(layout.model).model_name, digest_folder(layout.model)
    verdict = read_json(layout.gates, made_by="closedloop evaluate")
    check_request(name, verdict, folder_sha256, model_name=model_name, stage=stage)
    report = {"model_name": name, "version": None, "alias": None, "folder_sha256": folder_sha256, "kind": "experiment"}
    write_json(layout.registration, report)


def find_or_create_version(
    tracking: Tracking, contract: ModelContract, folder_sha256: str, layout: Layout, cause: Mapping[str, str]
) -> tuple[ModelVersion, bool]:
    """Return the version of this model folder, and whether this call registered it.

    Raises
    ------
    DataError
        If the training run on record is of another model.
    """
    version = tracking.find_version(folder_sha256)
    if version is not None:
        return version, False
    run = read_json(layout.run_file, made_by="closedloop train")
    if run.get("folder_sha256") != folder_sha256:
        raise DataError(f"{layout.run_file} is of another model than {layout.model}: run 'closedloop train' again")
    tags = contract.lineage.list_tags() | {f"closedloop.{name}": value for name, value in cause.items()}
    tags |= {DIGEST_TAG: folder_sha256, GATES_TAG: "passed", FEATURES_TAG: contract.feature_service}
    tags[KIND_TAG] = run.get("kind", "training")
    return tracking.register(run["model_uri"], run["run_id"], tags), True


def describe_comparison(verdict: dict[str, Any]) -> dict[str, str]:
    """Tags with a version's comparison with the champion of its evaluation; empty if there was no champion."""
    compared = (verdict["champion"] or {}).get("folder_sha256")
    if not verdict["comparison"] or not compared:
        return {}
    tags = {VERDICT_TAG: verdict["comparison"]["verdict"], COMPARED_TAG: compared}
    return tags | {EXCUSED_TAG: ", ".join(verdict.get("excused", [])) or "none"}


def is_interrupted(version: ModelVersion, *holders: ModelVersion | None) -> bool:
    """Whether a version is newer than all with an alias: its registration was interrupted before it got its alias."""
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
