"""A model folder that does not hold what its contract says is refused, by evaluation and registration alike."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest

FOLDER = "models/candidate"


@pytest.fixture(scope="module")
def module_shop(small_shop, tmp_path_factory):
    return small_shop.copy(tmp_path_factory.mktemp("folder") / "project")


@pytest.fixture
def shop(module_shop, tmp_path):
    shutil.copytree(module_shop.root / FOLDER, tmp_path / "kept")
    yield module_shop
    shutil.rmtree(module_shop.root / FOLDER)
    shutil.copytree(tmp_path / "kept", module_shop.root / FOLDER)


def change_contract(shop, **values):
    path = shop.root / FOLDER / "contract.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def flip_a_byte(shop):
    path = shop.root / FOLDER / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut_the_model(shop):
    path = shop.root / FOLDER / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])


def remove_the_model(shop):
    (shop.root / FOLDER / "model.onnx").unlink()


def remove_the_contract(shop):
    (shop.root / FOLDER / "contract.json").unlink()


def raise_the_version(shop):
    change_contract(shop, contract_version="2.0")


def name_another_model(shop):
    change_contract(shop, model_sha256="0" * 64)


def add_a_key(shop):
    change_contract(shop, colour="blue")


def break_the_json(shop):
    (shop.root / FOLDER / "contract.json").write_text("{", encoding="utf-8")


FAULTS = {
    flip_a_byte: ["model.onnx: its SHA-256 is", "the contract says"],
    cut_the_model: ["model.onnx: its SHA-256 is", "the contract says"],
    remove_the_model: ["model.onnx: cannot be read (No such file or directory)"],
    remove_the_contract: ["contract.json: the model contract cannot be read (No such file or directory)"],
    raise_the_version: ["contract.json: contract_version is 2.0, this code reads 1.x"],
    name_another_model: ["model.onnx: its SHA-256 is", "the contract says 000000000000"],
    add_a_key: ["contract.json: colour: Extra inputs are not permitted"],
    break_the_json: ["contract.json: ", "Invalid JSON"],
}


@pytest.mark.parametrize("stage", ["evaluate", "register"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_tampered_folder_is_refused(shop, fault, stage):
    fault(shop)
    before = {path: path.read_bytes() for path in (shop.root / "metrics").rglob("*.json")}
    output = " ".join(shop.run(stage, status=1).output.split())
    assert f"DataError: {FOLDER}/" in output
    for word in FAULTS[fault]:
        assert word in output
    assert "Traceback" not in output
    assert {path: path.read_bytes() for path in (shop.root / "metrics").rglob("*.json")} == before


def test_reference_rows_that_were_changed_make_it_another_model(shop):
    path = shop.root / FOLDER / "reference.parquet"
    path.write_bytes(path.read_bytes() + b"\0")
    output = shop.run("register", status=1).output
    assert "DataError: the evaluation is of another model than this one" in output


def test_reference_rows_name_no_customer(shop):
    """A registered model stays when a customer is erased."""
    test = pd.read_parquet(shop.root / "data/training/test.parquet")
    reference = pd.read_parquet(shop.root / FOLDER / "reference.parquet")
    assert [*reference.columns] == [*test.columns.drop("customer_id"), "score"]
    assert len(reference) == len(test)


def test_the_untouched_folder_is_taken(shop):
    shop.run("register")
