"""package: build a Bento from the registered version, its contract and this source."""

from __future__ import annotations

import datetime as dt
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import closedloop
from closedloop.adapters.mlflow import BENTO_TAG
from closedloop.config.layout import Layout
from closedloop.contract import VERSION_FILE, check_digest, read_contract
from closedloop.errors import DataError
from closedloop.files import read_json, write_json

if TYPE_CHECKING:
    from closedloop.adapters.mlflow import Tracking


def package(tracking: Tracking, layout: Layout) -> dict[str, Any]:
    """Build the Bento of the registered version, and record its digest in the registry; an experiment has none.

    Raises
    ------
    DataError
        If the version's folder differs from the digest in its tag, or from the registered one.
    """
    from closedloop.adapters.bentoml import DIGEST_LABEL, MODEL_DIR, build_bento, digest_tree

    registration = read_json(layout.registration, made_by="closedloop register")
    name, version = registration["model_name"], str(registration["version"])
    if registration["version"] is None:
        layout.bento.mkdir(parents=True, exist_ok=True)
        (layout.bento / "README.txt").write_text("No Bento: an experiment registers no version.\n", encoding="utf-8")
        nothing: dict[str, Any] = {"model_name": name, "bento": None, "version": None}
        write_json(layout.package_metrics, nothing)
        return nothing
    with tempfile.TemporaryDirectory(prefix="closedloop-package-") as work:
        found, tagged = tracking.fetch_version(version, Path(work) / "download")
        check_digest(found, tagged)
        if tagged != registration["folder_sha256"]:
            raise DataError(
                f"{layout.registration}: {name} version {version} was {registration['folder_sha256'][:12]}…, "
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
        build_bento(context, layout.bento, name=name, version=bento_sha256[:16], labels=labels, created_at=created_at)
    tracking.tag_version(tracking.read_version(version), {BENTO_TAG: bento_sha256})
    report = {"model_name": name, "bento": f"{name}:{bento_sha256[:16]}", **labels}
    write_json(layout.package_metrics, report)
    return report
