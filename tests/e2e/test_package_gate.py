"""`package` takes the registered version as its tag says, or nothing."""

from __future__ import annotations

import json

import pytest
import yaml

from closedloop.adapters.bentoml import MODEL_DIR, digest_tree
from closedloop.adapters.mlflow import BENTO_TAG, DIGEST_TAG
from closedloop.bootstrap import build_tracking, load_run
from closedloop.contract import digest_folder

BENTO = "models/bento"


def open_version(shop):
    tracking = build_tracking(load_run(shop.root / "params.yaml", root=shop.root))
    return tracking, tracking.client.get_model_version("shop_churn", "1")


def test_the_bento_holds_the_registered_version_and_the_registry_knows_its_digest(small_shop):
    report = small_shop.read_json("metrics/package.json")
    registered = small_shop.read_json("metrics/registration.json")
    bento = small_shop.root / BENTO
    assert digest_folder(bento / "src" / MODEL_DIR) == report["folder_sha256"] == registered["folder_sha256"]
    packaged = json.loads((bento / "src/models/version.json").read_text(encoding="utf-8"))
    assert packaged == {"version": "1", "folder_sha256": registered["folder_sha256"]}
    assert digest_tree(bento / "src") == report["bento_sha256"]
    assert open_version(small_shop)[1].tags[BENTO_TAG] == report["bento_sha256"]
    info = yaml.safe_load((bento / "bento.yaml").read_text(encoding="utf-8"))
    assert report["bento"] == f"shop_churn:{info['version']}"
    assert info["labels"] == {name: report[name] for name in ("version", "folder_sha256", "bento_sha256")}
    assert not list(bento.rglob("__pycache__"))
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (bento, *bento.rglob("*")))  # whoever serves it


def damage_artifact(shop):
    _, version = open_version(shop)
    path = shop.root / "state/mlflow/shop_churn" / version.run_id / "artifacts/contract/model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def change_tag(shop):
    tracking, version = open_version(shop)
    tracking.tag_version(version, {DIGEST_TAG: "f" * 64})


def change_registration(shop):
    path = shop.root / "metrics/registration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "folder_sha256": "f" * 64}), encoding="utf-8")


def name_no_version(shop):
    path = shop.root / "metrics/registration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 9}), encoding="utf-8")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (damage_artifact, "digest: "),
        (change_tag, "the registry says ffffffffffff"),
        (change_registration, "version 1 was ffffffffffff…, the registry says "),
        (name_no_version, "shop_churn has no version 9"),
    ],
)
def test_a_version_that_is_not_what_the_registry_says_is_not_packaged(shop_copy, fault, words):
    before = (shop_copy.root / "metrics/package.json").read_bytes(), digest_tree(shop_copy.root / BENTO)
    fault(shop_copy)
    output = shop_copy.run("package", status=1).output
    assert "DataError: " in output
    assert words in output
    assert ((shop_copy.root / "metrics/package.json").read_bytes(), digest_tree(shop_copy.root / BENTO)) == before
    assert not list((shop_copy.root / "models").glob(".*"))


def test_packaging_without_a_registration_says_what_makes_one(project):
    assert "'closedloop register' writes it" in project.run("package", status=1).output
