"""package: the registered version becomes a Bento, with its contract and this source inside."""

from __future__ import annotations

import datetime as dt
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import closedloop
from closedloop.contract import VERSION_FILE, check_digest, read_contract
from closedloop.errors import DataError
from closedloop.files import read_json, write_json

if TYPE_CHECKING:
    from closedloop.adapters.mlflow import Tracking


def package(tracking: Tracking, *, registration_path: Path, bento_dir: Path, metrics_path: Path) -> dict[str, Any]:
    """Build the Bento of the registered version, and let the registry know its digest.

    Raises
    ------
    DataError
        If the version's folder is not what its tag says, or not the one that was registered.
    """
    from closedloop.adapters.bentoml import DIGEST_LABEL, MODEL_DIR, build_bento, digest_tree
    from closedloop.adapters.mlflow import BENTO_TAG

    registration = read_json(registration_path, made_by="closedloop register")
    name, version = registration["model_name"], str(registration["version"])
    with tempfile.TemporaryDirectory(prefix="closedloop-package-") as work:
        found, tagged = tracking.fetch_version(version, Path(work) / "download")
        check_digest(found, tagged)
        if tagged != registration["folder_sha256"]:
            raise DataError(
                f"{registration_path}: {name} version {version} was {registration['folder_sha256'][:12]}…, "
                f"the registry says {tagged[:12]}…: run 'closedloop register' again"
            )
        context = Path(work) / "context"
        shutil.copytree(found, context / MODEL_DIR)
        write_json((context / MODEL_DIR).with_name(VERSION_FILE), {"version": version, "folder_sha256": tagged})
        source = Path(closedloop.__file__).parent
        shutil.copytree(source, context / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        bento_sha256 = digest_tree(context)
        labels = {"version": version, DIGEST_LABEL: tagged, "bento_sha256": bento_sha256}
        created_at = dt.datetime.combine(read_contract(found).lineage.as_of, dt.time(), dt.UTC)
        build_bento(context, bento_dir, name=name, version=bento_sha256[:16], labels=labels, created_at=created_at)
    tracking.tag_version(tracking.read_version(version), {BENTO_TAG: bento_sha256})
    report = {"model_name": name, "bento": f"{name}:{bento_sha256[:16]}", **labels}
    write_json(metrics_path, report)
    return report
