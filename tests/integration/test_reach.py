"""Who talks to whom in the overlays of k8s/: addresses that answer, and networks that let them be asked."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.integration.test_manifests import BOX, OVERLAYS, change, read_overlay
from tests.manifests import ROOT, list_pods
from tests.reach import find_unreachable
from tests.services import require


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_reaches_what_it_is_told_to_call(overlay):
    assert find_unreachable(read_overlay(overlay)) == []


SCRAPE = (ROOT / "k8s/base/observability/scrape.yaml").read_text(encoding="utf-8")
ENVIRONMENT = ("ConfigMap", "closedloop-environment")
UNREACHABLE = {
    "MLflow does not let in who calls it mlflow.closedloop:5000": (
        "Deployment", "closedloop-mlflow", (*BOX, "args", 5), "--allowed-hosts=mlflow:5000",
    ),
    "Deployment closedloop-release: releases, and knows no Prometheus": (
        *ENVIRONMENT, ("data", "CLOSEDLOOP_RELEASE__PROMETHEUS"), None,
    ),
    "CronJob closedloop-release-check: the network does not let it reach prometheus.other:9090": (
        *ENVIRONMENT, ("data", "CLOSEDLOOP_RELEASE__PROMETHEUS"), "http://prometheus.other:9090",
    ),
    "CronJob closedloop-release-start: the network does not let it reach prometheus:9090": (
        "NetworkPolicy", "prometheus", ("spec", "ingress", 0, "from", 0, "podSelector", "matchLabels"),
        {"app.kubernetes.io/name": "jobs"}, "local",
    ),
    "Deployment closedloop-stable: the network does not let Prometheus scrape it": (
        "NetworkPolicy", "metrics", ("spec", "ingress"), [], "local",
    ),
    "Deployment closedloop-stream: its port 8001 has no name": ("Deployment", "closedloop-stream", (*BOX, "ports"), []),
    "Deployment closedloop-stream: the network does not let Prometheus scrape it": (
        "NetworkPolicy", "stream", ("spec", "ingress"), [],
    ),
    "Deployment closedloop-stream: not one job of Prometheus scrapes it": (
        "ConfigMap", "closedloop-prometheus", ("data", "scrape.yaml"), SCRAPE.replace("regex: stream", "regex: other"),
    ),
    "Deployment closedloop-stable: not one job of Prometheus scrapes it": (
        "Service", "serving-metrics", ("spec", "selector"), {"app.kubernetes.io/name": "other"}, "local",
    ),
    "Deployment closedloop-stream: its errors are a release's": (
        *ENVIRONMENT, ("data", "CLOSEDLOOP_RELEASE__PROMETHEUS_MATCHERS"), 'namespace="closedloop"',
    ),
    "Deployment closedloop-canary: its errors are not a release's": (
        *ENVIRONMENT, ("data", "CLOSEDLOOP_RELEASE__PROMETHEUS_MATCHERS"), 'job="closedloop-stream"',
    ),
    "Deployment closedloop-exporter: the network does not let it reach postgres:5432": (
        "NetworkPolicy", "servers", ("spec", "egress", 0, "to"), [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "local",
    ),
    "Deployment closedloop-stable: the network does not let it reach redis:6379": (
        "NetworkPolicy", "servers", ("spec", "egress", 1, "to"), [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "local",
    ),
    "pods of clients: the network does not let them reach serving-stable:3000": (
        "NetworkPolicy", "client-egress", ("spec", "egress", 0, "ports", 0, "port"), 8001,
    ),
    "Deployment closedloop-canary: clients in the cluster reach it past the weights": (
        "NetworkPolicy", "serving-clients", ("spec", "podSelector", "matchLabels"),
        {"app.kubernetes.io/name": "serving"},
    ),
    "no Service serving-stable is for the stable pods alone": (
        "Service", "serving-stable", ("spec", "selector"), {"app.kubernetes.io/name": "serving"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", UNREACHABLE)
def test_an_address_that_nobody_answers_is_found_out(problem):
    assert problem in find_unreachable(change(*UNREACHABLE[problem]))


@pytest.mark.thorough
def test_the_local_prometheus_is_given_a_file_that_it_takes(tmp_path):
    require(shutil.which("promtool"), "promtool")
    (pod,) = (pod for name, _, pod in list_pods(read_overlay("local")) if name == "StatefulSet prometheus")
    mounts = {mount["mountPath"]: mount.get("subPath") for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume}
    texts = {
        key: text
        for one in read_overlay("local")
        if one["metadata"]["name"] in volumes
        for key, text in one["data"].items()
    }
    for place, key in mounts.items():
        if key:
            file = tmp_path / place.removeprefix("/etc/prometheus/")
            file.write_text(texts[key].replace("/etc/prometheus/", ""), encoding="utf-8")
    (config,) = (word.split("=")[1] for word in pod["containers"][0]["args"] if word.startswith("--config.file="))
    ran = subprocess.run(
        ["promtool", "check", "config", Path(config).name], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "rules found" in ran.stdout
    jobs = {one["job_name"] for one in yaml.safe_load(texts[mounts[config]])["scrape_configs"]}
    assert jobs == set(re.findall('job="([^"]+)"', texts["rules.yaml"]))
