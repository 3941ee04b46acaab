"""The same data, parameters and code give the same bytes, in another folder, process, hash seed and thread count."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from closedloop.contract import digest_folder

pytestmark = pytest.mark.thorough

SAME = (
    "data/raw",
    "data/daily",
    "data/features",
    "data/training",
    "models/candidate",
    "metrics/ingest.json",
    "metrics/training_set.json",
    "metrics/train_metrics.json",
    "metrics/eval_metrics.json",
    "metrics/registration.json",
    "metrics/package.json",
    "models/bento",
    "metrics/plots",
)


def read_bytes(root: Path, name: str) -> dict[str, str]:
    place = root / name
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", SAME)
def test_two_runs_give_the_same_bytes(name, small_shop, dvc_shop):
    first, second = read_bytes(small_shop.root, name), read_bytes(dvc_shop.root, name)
    assert first
    assert {path for path in first.keys() | second.keys() if first.get(path) != second.get(path)} == set()


def test_training_again_elsewhere_is_the_same_model_to_the_registry(small_shop, dvc_shop):
    digests = {digest_folder(shop.root / "models/candidate") for shop in (small_shop, dvc_shop)}
    assert digests == {small_shop.read_json("metrics/registration.json")["folder_sha256"]}


def test_the_two_runs_are_two_mlflow_runs(small_shop, dvc_shop):
    """What differs is kept out of the model's folder: the run's id stands in models/run.json only."""
    first, second = (shop.read_json("models/run.json") for shop in (small_shop, dvc_shop))
    assert first["run_id"] != second["run_id"]
    for shop, run in ((small_shop, first), (dvc_shop, second)):
        assert run["run_id"].encode() not in (shop.root / "models/candidate/contract.json").read_bytes()
