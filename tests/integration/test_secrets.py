"""The Secrets that the cluster must have, as the runbook makes them: by the real kubectl, for the real settings."""

from __future__ import annotations

import base64
import configparser
import json
import os
import subprocess
import sys
from pathlib import Path
from shlex import quote

import pytest

from closedloop.config.settings import load_settings
from tests.docs.test_docs import read_commands
from tests.integration.test_manifests import OVERLAYS, read_cluster_settings, read_overlay
from tests.manifests import ROOT, list_containers, list_pods, list_secrets, read_external

# what of the secrets the settings and MLflow are given, by the names that the runbook has for it
GIVEN = {
    "POSTGRES": "postgres.example.com:5432", "POSTGRES_PASSWORD": "pg1", "OPTIONS": "?sslmode=require",
    "REDIS": "redis.example.com:6379,ssl=true", "REDIS_PASSWORD": "rd1", "KUBEFLOW_TOKEN": "kf1",
    "KAFKA": '{"sasl.password": "kk1"}',
}  # fmt: skip


STORE, FEATURES = {("closedloop-store", "url")}, {("closedloop-features", "overrides")}
TRACKING = {("closedloop-tracking", "username"), ("closedloop-tracking", "password")}
ID_KEY = {("closedloop-serving", "id-key")}
JOURNAL = {("closedloop-release", "journal-key")}
RETRAINING = STORE | FEATURES | TRACKING | {("closedloop-retraining", "token")}
SERVING = STORE | FEATURES | TRACKING | ID_KEY | JOURNAL | {("closedloop-serving", "tokens")}
# What the command of each pod uses; tests/e2e/test_job_secrets.py runs those that have the fewest. The monitor and a
# retraining have what one in the same process (retraining.runner local) uses, though Kubeflow's pods have a Secret of
# their own. Going back may be to another definition of the features, which Feast's registry must still have.
NEEDS = {
    "CronJob closedloop-refresh": FEATURES,
    "CronJob closedloop-score": STORE | FEATURES | TRACKING | JOURNAL | ID_KEY,
    "CronJob closedloop-outcomes": STORE,
    "CronJob closedloop-monitor": RETRAINING,
    "CronJob closedloop-retrain": RETRAINING,
    "CronJob closedloop-erase": STORE | FEATURES,
    "CronJob closedloop-release-start": STORE | TRACKING | JOURNAL,
    "CronJob closedloop-release-check": STORE | TRACKING | JOURNAL,
    "CronJob closedloop-release-stop": STORE | TRACKING | JOURNAL,
    "CronJob closedloop-release-rollback": STORE | TRACKING | JOURNAL | FEATURES,
    "CronJob closedloop-release-promote": STORE | TRACKING | JOURNAL | FEATURES,
    "Deployment closedloop-release": STORE | TRACKING | JOURNAL,
    "Deployment closedloop-exporter": STORE | JOURNAL,
    "Deployment closedloop-stable": SERVING,
    "Deployment closedloop-canary": SERVING,
    "Deployment closedloop-stream": STORE
    | FEATURES
    | TRACKING
    | ID_KEY
    | JOURNAL
    | {("closedloop-stream", "properties")},
    "Deployment closedloop-mlflow": {
        ("closedloop-mlflow", key) for key in ("backend-store-uri", "flask-secret-key", "auth.ini")
    },
    "StatefulSet postgres": {("closedloop-postgres", "password")},
    "StatefulSet redis": {("closedloop-redis", "password")},
    "StatefulSet prometheus": set(),
}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_has_the_secrets_that_its_command_uses_and_no_other(overlay):
    found = {name: set(list_secrets(pod)) for name, _, pod in list_pods(read_overlay(overlay))}
    assert found == {name: NEEDS[name] for name in found}


def test_a_secret_is_seen_in_whatever_way_a_pod_is_given_it():
    ways = (
        {"containers": [{"env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]}]},
        {"initContainers": [{"envFrom": [{"secretRef": {"name": "a"}}]}]},
        {"volumes": [{"name": "v", "secret": {"secretName": "a"}}]},
        {"volumes": [{"name": "v", "projected": {"sources": [{"secret": {"name": "a", "items": [{"key": "b"}]}}]}}]},
    )
    assert [list(list_secrets(way)) for way in ways] == [[("a", "b")], [("a", "*")], [("a", "*")], [("a", "b")]]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """What the runbook's commands make with the real kubectl, but for the cluster that takes it."""
    folder = tmp_path_factory.mktemp("secrets")
    real = Path(sys.executable).parent / "kubectl"
    written = '"$@" --dry-run=client --output=json'
    program = f'#!/bin/sh\ntest "$1" = apply || exec {quote(str(real))} {written} >> {folder}/made\n'
    (folder / "kubectl").write_text(program, encoding="utf-8")
    (folder / "kubectl").chmod(0o755)
    commands = read_commands("Deploy")["make the Secrets"]
    subprocess.run(["bash", "-euc", commands], env=GIVEN | {"PATH": f"{folder}:/usr/bin:/bin"}, check=True)
    text, found = (folder / "made").read_text(encoding="utf-8"), {}
    while text.strip():
        one, end = json.JSONDecoder().raw_decode(text.lstrip())
        text = text.lstrip()[end:]
        data = {key: base64.b64decode(value).decode() for key, value in one["data"].items()}
        found[one["metadata"]["name"], one["metadata"]["namespace"]] = data
    return found


def test_the_runbook_makes_every_secret_where_it_is_looked_for(secrets):
    made = {name: list(data) for (name, _), data in secrets.items()}
    assert {name: sorted(keys) for name, keys in made.items()} == {
        name: sorted(keys) for name, keys in read_external().items()
    }
    elsewhere = {name: namespace for name, namespace in secrets if namespace != "closedloop"}
    assert elsewhere == {read_cluster_settings()["SECRET"]: "kubeflow"}


def test_what_the_secrets_say_is_taken(secrets, monkeypatch):
    known = {name: data for (name, _), data in secrets.items()}
    boxes = [box for _, _, pod in list_pods(read_overlay("production")) for box in list_containers(pod)]
    for variable in [variable for box in boxes for variable in box.get("env", [])]:
        if "secretKeyRef" in variable.get("valueFrom", {}):
            key = variable["valueFrom"]["secretKeyRef"]
            monkeypatch.setenv(variable["name"], known[key["name"]][key["key"]])
    settings = load_settings("production", folder=ROOT / "configs")
    server = "postgresql+psycopg://closedloop:pg1@postgres.example.com:5432/{}?sslmode=require"
    assert settings.operations.url == server.format("closedloop")
    assert settings.features.overrides["registry"]["path"] == server.format("feast")
    assert settings.features.overrides["online_store"]["connection_string"].endswith("6379,ssl=true,password=rd1")
    assert list(settings.serving.tokens.values()) == [("predict",), ("outcomes",)]
    assert len(settings.serving.id_key) == 64
    assert [len(key) for key in settings.release.list_journal_keys()] == [64]
    assert settings.stream.properties == {"sasl.password": "kk1"}
    assert os.environ["MLFLOW_BACKEND_STORE_URI"] == server.format("mlflow")
    accounts = configparser.ConfigParser()
    accounts.read_string(known["closedloop-mlflow"]["auth.ini"])
    assert accounts["mlflow"]["database_uri"] == server.format("mlflow_accounts")
    assert accounts["mlflow"]["admin_password"] == known["closedloop-tracking"]["password"]
    pipeline = known["closedloop-pipeline"]
    assert {key: os.environ[key] for key in pipeline} == pipeline
