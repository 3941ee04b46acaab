"""A model serves only after its digest, its contract and its golden rows have held."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from closedloop.contract import CONTRACT_FILE, MODEL_FILE, NumericFeature, digest_folder
from closedloop.errors import DataError
from closedloop.serving.models import check_compatible, load_model
from tests.model_folders import FEATURES, ROWS, expected_score, write_model_folder


def test_a_whole_folder_scores_as_worked_out_by_hand(tmp_path):
    folder = write_model_folder(tmp_path / "model", bias=0.3)
    model = load_model(folder, version="7", folder_sha256=digest_folder(folder))
    packed = model.pack([tuple(row.values()) for row in ROWS])
    np.testing.assert_allclose(model.scorer.score(packed), [expected_score(row, 0.3) for row in ROWS], atol=1e-6)


def truncate(folder):
    path = folder / MODEL_FILE
    path.write_bytes(path.read_bytes()[:-40])


def edit_contract(old, new):
    def edit(folder):
        path = folder / CONTRACT_FILE
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return edit


@pytest.mark.parametrize(
    ("options", "damage", "words"),
    [
        ({}, truncate, "its SHA-256 is"),
        ({}, edit_contract('"threshold":0.5', '"threshold":5'), "threshold"),
        ({"contract_version": "2.0"}, None, "contract_version is 2.0, this code reads 1.x"),
        ({"golden_shift": 2e-6}, None, "golden rows: row 0 scores"),
        ({}, lambda folder: (folder / CONTRACT_FILE).unlink(), "cannot be read"),
        ({"missing": math.nan}, None, "features may be missing, but the model has no score"),
    ],
    ids=["truncated", "contract", "major version", "golden rows", "no contract", "no score"],
)
def test_what_does_not_hold_is_refused(tmp_path, options, damage, words):
    folder = write_model_folder(tmp_path / "model", **options)
    if damage:
        damage(folder)
    with pytest.raises(DataError, match=words):
        load_model(folder, version="1", folder_sha256=None)


def test_a_digest_that_differs_from_the_registrys_is_refused(tmp_path):
    folder = write_model_folder(tmp_path / "model")
    digest = digest_folder(folder)
    edit_contract('"threshold":0.5', '"threshold":0.6')(folder)
    with pytest.raises(DataError, match=f"the registry says {digest[:12]}"):
        load_model(folder, version="1", folder_sha256=digest)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": (*FEATURES[:2], NumericFeature(name="plan_code"))}, "features differ.*: plan, plan_code"),
        ({"features": (FEATURES[1], FEATURES[0], FEATURES[2])}, "in another order"),
        ({"model_name": "other_churn"}, "a model of other_churn cannot take the place of test_churn"),
        ({"feature_service": "test_churn_1"}, "features are of test_churn_1, those being served of test_churn_0"),
    ],
    ids=["another feature", "another order", "another data set", "another definition"],
)
def test_a_model_for_other_requests_is_refused(tmp_path, options, words):
    serving = load_model(write_model_folder(tmp_path / "serving"), version="1", folder_sha256=None)
    if "features" in options:
        changed = serving.contract.model_copy(update=options)
        other = dataclasses.replace(serving, version="2", contract=changed)
    else:
        other = load_model(write_model_folder(tmp_path / "other", **options), version="2", folder_sha256=None)
    with pytest.raises(DataError, match=words):
        check_compatible(other, serving.contract)


def test_another_version_of_the_same_contract_is_compatible(tmp_path):
    serving = load_model(write_model_folder(tmp_path / "serving"), version="1", folder_sha256=None)
    other = load_model(write_model_folder(tmp_path / "other", bias=1.0), version="2", folder_sha256=None)
    check_compatible(other, serving.contract)
