"""The overlays of k8s/: rendered by kubectl, checked against the schemas and against each other."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.parse
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from closedloop.adapters.kfp import compile_pipeline
from closedloop.adapters.kubectl import GatewaySplit
from closedloop.config.settings import Settings, load_settings
from closedloop.loop.status.release_verdict import ReleaseVerdict
from tests.docs.test_docs import list_commands, list_keys, read_commands, read_runbook
from tests.http_service import Load, run_service, wait_until
from tests.manifests import (
    ROOT,
    STANDARD,
    find_problems,
    is_ours,
    list_containers,
    list_outside,
    list_pods,
    read_external,
    read_map,
    render,
)
from tests.model_folders import ROWS, write_model_folder
from tests.programs import fetch, run_prometheus
from tests.reach import Peer, find_unreachable, locate, may_reach
from tests.services import require

OVERLAYS = ("local", "production")
NEWEST = ("1.35", "1.36", "1.37")
read_overlay = functools.cache(render)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_holds_together(overlay):
    assert find_problems(read_overlay(overlay)) == []


def add_components(root, overlay, *names):
    """A copy of the manifests whose overlay takes these components."""
    for name in ("k8s", "configs"):
        shutil.copytree(ROOT / name, root / name, dirs_exist_ok=True)
    with (root / "k8s/overlays" / overlay / "kustomization.yaml").open("a", encoding="utf-8") as file:
        file.write(f"components: [{', '.join(f'../../components/{name}' for name in names)}]\n" if names else "")
    return root / "k8s/overlays" / overlay


@pytest.fixture(scope="module")
def with_volumes(tmp_path_factory):
    """Both overlays with the component that puts spools on volumes of their own."""
    roots = {overlay: tmp_path_factory.mktemp("volumes") for overlay in OVERLAYS}
    for overlay, root in roots.items():
        add_components(root, overlay, "spool-volume")
    return {f"{overlay} with volumes": render(overlay, root) for overlay, root in roots.items()}


@pytest.fixture(scope="module")
def with_gateway(tmp_path_factory):
    """Production's overlay behind the Gateway API, watched by a Prometheus of the operator's."""
    root = tmp_path_factory.mktemp("gateway")
    place = add_components(root, "production", "gateway", "prometheus-operator") / "environment.env"
    text = place.read_text(encoding="utf-8").replace("TRAFFIC=istio", "TRAFFIC=gateway")
    place.write_text(text.replace("__ISTIO__", "__GATEWAY__"), encoding="utf-8")
    return render("production", root)


def test_the_gateway_api_takes_istios_place(with_gateway, monkeypatch, tmp_path):
    """The settings of the release's pods find the route that the manifests bring, and may change it."""
    assert find_problems(with_gateway) == []
    assert find_unreachable(with_gateway) == []
    assert {one["kind"] for one in with_gateway} & {"VirtualService", "DestinationRule"} == set()
    (route,) = (one for one in with_gateway if one["kind"] == "HTTPRoute")
    environment = read_map("closedloop-environment", with_gateway)
    for name in environment:
        if name.startswith("CLOSEDLOOP_RELEASE__"):
            monkeypatch.setenv(name, environment[name])
    settings = load_settings("local", folder=ROOT / "configs").release
    assert settings.gateway.namespace == route["metadata"]["namespace"]
    (tmp_path / "kubectl").write_text(
        '#!/bin/sh\ncd "$(dirname "$0")"\n[ "$1" = get ] && cat route.json || cat > new.json\n'
    )
    (tmp_path / "kubectl").chmod(0o755)
    (tmp_path / "route.json").write_text(json.dumps(route), encoding="utf-8")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert GatewaySplit(settings.gateway).route(5)
    forced, split = json.loads((tmp_path / "new.json").read_text(encoding="utf-8"))["spec"]["rules"]
    assert [one["weight"] for one in split["backendRefs"]] == [95, 5]
    assert forced == route["spec"]["rules"][0]


@pytest.mark.parametrize(
    ("problem", "path", "value"),
    [
        ("HTTPRoute closedloop, rule 1: the weights do not add up to 100", (1, "backendRefs", 1, "weight"), 5),
        ("HTTPRoute closedloop, rule 0: there is no serving-stable:80", (0, "backendRefs", 0, "port"), 80),
        ("HTTPRoute closedloop, rule 1: there is no serving-next:3000", (1, "backendRefs", 1, "name"), "serving-next"),
    ],
)
def test_a_route_of_the_gateway_api_that_leads_nowhere_is_found(with_gateway, problem, path, value):
    resources = copy.deepcopy(with_gateway)
    (target,) = (one["spec"]["rules"] for one in resources if one["kind"] == "HTTPRoute")
    *parents, last = path
    for step in parents:
        target = target[step]
    target[last] = value
    assert find_problems(resources) == [problem]


def test_tools_that_follow_git_leave_a_releases_weights_alone(with_gateway, tmp_path):
    """Else each of their passes would send all requests to the champion."""
    argo, flux = (yaml.safe_load((ROOT / f"k8s/gitops/{name}.yaml").read_text("utf-8")) for name in ("argo-cd", "flux"))
    assert argo["spec"]["source"]["path"] == flux["spec"]["path"].removeprefix("./") == "k8s/overlays/production"
    place = add_components(tmp_path, "production") / "kustomization.yaml"
    place.write_text(place.read_text("utf-8") + yaml.safe_dump({"patches": flux["spec"]["patches"]}), encoding="utf-8")
    annotated = {
        one["kind"]: one["metadata"]["annotations"]
        for one in render("production", tmp_path)
        if "kustomize.toolkit.fluxcd.io/ssa" in one["metadata"].get("annotations", {})
    }
    assert annotated == {"VirtualService": {"kustomize.toolkit.fluxcd.io/ssa": "IfNotPresent"}}
    routes = {one["kind"]: one for one in (*read_overlay("production"), *with_gateway)}
    for ignored in argo["spec"]["ignoreDifferences"]:
        found = routes[ignored["kind"]]
        assert (found["apiVersion"].split("/")[0], found["metadata"]["name"]) == (ignored["group"], ignored["name"])
        (path,) = ignored["jqPathExpressions"]
        weights = [found]
        for step in path.strip(".").split("."):
            weights = [one[step.removesuffix("[]")] for one in weights]
            weights = [one for each in weights for one in each] if step.endswith("[]") else weights
        assert weights == [100, 100, 0]


def test_the_operators_rules_are_those_of_prometheus(with_gateway):
    (rule,) = (one for one in with_gateway if one["kind"] == "PrometheusRule")
    rules = (ROOT / "k8s/base/observability/rules.yaml").read_text(encoding="utf-8")
    assert rule["spec"] == yaml.safe_load(rules), "run python k8s/components/prometheus-operator/generate.py"


def test_argo_rollouts_reads_a_verdict_where_the_network_lets_it(tmp_path):
    """The template asks a Service that is there, for a verdict that there is; without the component it asks nobody."""
    add_components(tmp_path, "production", "argo-rollouts")
    resources = render("production", tmp_path)
    assert find_problems(resources) == []
    assert find_unreachable(resources) == []
    (template,) = (one for one in resources if one["kind"] == "AnalysisTemplate")
    (metric,) = template["spec"]["metrics"]
    conditions = [metric[f"{name}Condition"] for name in ("success", "failure")]
    words = [re.fullmatch(r'result == "(\w+)"', one)[1] for one in conditions]
    assert words == ["promote", "rollback"]
    assert set(words) | {"hold"} == set(get_args(get_type_hints(ReleaseVerdict)["verdict"]))
    assert metric["provider"]["web"]["jsonPath"].strip("{}$.") in ReleaseVerdict.__struct_fields__
    address = urllib.parse.urlsplit(metric["provider"]["web"]["url"].replace("{{args.version}}", "4"))
    assert (address.path, address.query) == ("/release", "version=4")
    assert [one["name"] for one in template["spec"]["args"]] == ["version"]
    argo = Peer({"app.kubernetes.io/name": "argo-rollouts"}, "argo-rollouts")
    exporter = locate(resources, address.netloc.replace(".svc", ""))
    assert exporter == Peer({"app.kubernetes.io/name": "exporter"})
    assert may_reach(resources, argo, exporter, address.port)
    assert not may_reach(read_overlay("production"), argo, exporter, address.port)


def test_spools_lie_on_volumes_that_outlive_their_pods_where_an_overlay_wants_it(with_volumes):
    """No Deployment is left that loses its spool, and no pod refuses requests because the store is slow."""
    for overlay, tracks in (("local", ["stable"]), ("production", ["canary", "stable", "stream"])):
        resources = with_volumes[f"{overlay} with volumes"]
        assert find_problems(resources) == []
        assert find_unreachable(resources) == []
        owners = {f"StatefulSet closedloop-{track}" for track in tracks}
        keeping = {name for name, _, pod in list_pods(resources) if {"name": "state", "ownClaim": {}} in pod["volumes"]}
        assert keeping == owners
        assert "DRAIN_SECONDS_MAX" not in json.dumps(resources)


@pytest.mark.thorough
@pytest.mark.parametrize("version", NEWEST)
@pytest.mark.parametrize("overlay", [*OVERLAYS, "local with volumes", "production with volumes"])
def test_every_resource_fits_its_schema(overlay, version, with_volumes):
    import kubernetes_validate

    resources = with_volumes[overlay] if overlay in with_volumes else read_overlay(overlay)
    standard = [one for one in resources if one["apiVersion"] in STANDARD]
    assert {one["apiVersion"] for one in resources} - set(STANDARD) <= {"networking.istio.io/v1"}
    for resource in standard:
        kubernetes_validate.validate(resource, version, strict=True)
    broken = copy.deepcopy(next(one for one in standard if one["kind"] == "Deployment"))
    broken["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_the_schemas_are_the_newest():
    import kubernetes_validate

    newest = int(kubernetes_validate.latest_version().split(".")[1])
    assert [f"1.{newest - back}" for back in (2, 1, 0)] == list(NEWEST)


def test_one_resource_a_file():
    for file in (ROOT / "k8s").rglob("*.yaml"):
        assert len(list(yaml.safe_load_all(file.read_text(encoding="utf-8")))) == 1, file


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_grafanas_sidecar_finds_every_dashboard(overlay):
    (found,) = (one for one in read_overlay(overlay) if one["metadata"]["name"] == "closedloop-dashboards")
    assert (found["kind"], found["metadata"]["labels"]["grafana_dashboard"]) == ("ConfigMap", "1")
    folder = ROOT / "k8s/base/observability/dashboards"
    assert found["data"] == {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}


def change(kind, name, path, value, overlay="production"):
    """An overlay's resources with one value replaced; None deletes it."""
    resources = copy.deepcopy(read_overlay(overlay))
    named = re.compile(rf"{name}(-[a-z0-9]{{10}})?")  # with the hash of what kustomize made
    target = next(one for one in resources if one["kind"] == kind and named.fullmatch(one["metadata"]["name"]))
    *parents, last = path
    for step in parents:
        target = target[step]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return resources


BOX = ("spec", "template", "spec", "containers", 0)
JOB_BOX = ("spec", "jobTemplate", *BOX)
CHANGES = {
    "its selector does not match": ("Deployment", "closedloop-stable", ("spec", "selector", "matchLabels"), {"a": "b"}),
    "Deployment closedloop-release: selects the pods of CronJob closedloop-release-start": (
        "CronJob", "closedloop-release-start", ("spec", "jobTemplate", "spec", "template", "metadata", "labels"),
        {"app.kubernetes.io/name": "release"},
    ),
    "Job closedloop-erase: the next apply cannot change it": ("CronJob", "closedloop-erase", ("kind",), "Job"),
    "cpu: all pods and a Job request 1250, a node of the local overlay has 1050": (
        "CronJob", "closedloop-retrain", (*JOB_BOX, "resources", "requests", "cpu"), "500m", "local",
    ),
    "memory: all pods and a Job request": (
        "Deployment", "closedloop-mlflow", (*BOX, "resources", "requests", "memory"), "4Gi", "local",
    ),
    "StatefulSet redis, container redis: its livenessProbe may end it before it has started": (
        "StatefulSet", "redis", (*BOX, "startupProbe"), None, "local",
    ),
    "Deployment closedloop-stable: it answers more than its last drain can store: DRAIN_SECONDS_MAX is 30": (
        "Deployment", "closedloop-stable", (*BOX, "env", 0, "value"), "30",
    ),
    "Deployment closedloop-stream: it answers more than its last drain can store: DRAIN_SECONDS_MAX is inf": (
        "Deployment", "closedloop-stream", (*BOX, "env", 0), {"name": "OTHER", "value": "1"},
    ),
    "Service mlflow: selects no pod": ("Service", "mlflow", ("spec", "selector"), {"a": "b"}),
    "no container has a port named web": ("Service", "serving", ("spec", "ports", 0, "targetPort"), "web"),
    "PodDisruptionBudget closedloop-stable: selects no pod": (
        "PodDisruptionBudget", "closedloop-stable", ("spec", "selector", "matchLabels"), {"a": "b"},
    ),
    "no NetworkPolicy denies": ("NetworkPolicy", "default-deny", ("spec", "ingress"), [{}]),
    "open to others than Prometheus": (
        "NetworkPolicy", "exporter", ("spec", "ingress", 0, "from"), [{"podSelector": {}}],
    ),
    "NetworkPolicy exporter: a rule without ports or sources lets everything in": (
        "NetworkPolicy", "exporter", ("spec", "ingress", 0, "ports"), None,
    ),
    "NetworkPolicy serving: a rule without ports or sources lets everything in": (
        "NetworkPolicy", "serving", ("spec", "ingress", 1, "from"), None,
    ),
    "NetworkPolicy serving-clients: a metrics port is open": (
        "NetworkPolicy", "serving-clients", ("spec", "ingress", 0, "ports", 0, "port"), 8001,
    ),
    "not held to the restricted profile": (
        "Namespace", "closedloop", ("metadata", "labels", "pod-security.kubernetes.io/enforce"), "baseline",
    ),
    "takes pods away before others are ready": (
        "Deployment", "closedloop-stable", ("spec", "strategy", "rollingUpdate", "maxUnavailable"), 1,
    ),
    "no PodDisruptionBudget is about it": (
        "PodDisruptionBudget", "closedloop-stable", ("spec", "selector", "matchLabels"),
        {"closedloop/track": "canary"},
    ),
    "may all lie on one node": (
        "Deployment", "closedloop-stable", ("spec", "template", "spec", "topologySpreadConstraints"), None,
    ),
    "no readinessProbe": ("Deployment", "closedloop-stable", (*BOX, "readinessProbe"), None),
    "no livenessProbe": ("Deployment", "closedloop-canary", (*BOX, "livenessProbe"), None),
    "no time to drain": (
        "Deployment", "closedloop-stable", ("spec", "template", "spec", "terminationGracePeriodSeconds"), 20,
    ),
    "its spool lies on no volume": ("Deployment", "closedloop-stable", (*BOX, "volumeMounts", 2, "mountPath"), "/x"),
    "Deployment closedloop-stable: serving.spool_bytes_max is more than half of its volume of 1Gi": (
        "Deployment", "closedloop-stable", ("spec", "template", "spec", "volumes", 2, "emptyDir", "sizeLimit"), "1Gi",
    ),
    "Deployment closedloop-stream: serving.spool_bytes_max is more than half of its volume of 1900Mi": (
        "Deployment", "closedloop-stream", ("spec", "template", "spec", "volumes", 2, "emptyDir", "sizeLimit"),
        "1900Mi",
    ),
    "prometheus-adapter gives no latency": (
        "HorizontalPodAutoscaler", "closedloop-stable", ("spec", "metrics", 1, "pods", "metric", "name"), "latency",
    ),
    "there is no ServiceAccount nobody": (
        "Deployment", "closedloop-exporter", ("spec", "template", "spec", "serviceAccountName"), "nobody",
    ),
    "there is no ConfigMap gone": (
        "Deployment", "closedloop-exporter", (*BOX, "envFrom", 0, "configMapRef", "name"), "gone",
    ),
    "there is no ConfigMap closedloop-prometheus": (
        "ConfigMap", "closedloop-prometheus", ("metadata", "namespace"), "monitoring", "local",
    ),
    "closedloop-prometheus: nothing here mounts it, and nothing in monitoring can": (
        "ConfigMap", "closedloop-prometheus", ("metadata", "namespace"), "closedloop",
    ),
    "it ends before retraining.timeout_seconds": (
        "CronJob", "closedloop-retrain", ("spec", "jobTemplate", "spec", "activeDeadlineSeconds"), 12600,
    ),
    "route forced: what was answered late is asked": (
        "VirtualService", "closedloop", ("spec", "http", 0, "retries"), None,
    ),
    "there is no PersistentVolumeClaim gone": (
        "CronJob", "closedloop-refresh", ("spec", "jobTemplate", "spec", "template", "spec", "volumes"),
        [{"name": "tmp"}, {"name": "settings"}, {"name": "state", "persistentVolumeClaim": {"claimName": "gone"}}],
    ),
    "no key gone of a Secret closedloop-store": (
        "Deployment", "closedloop-exporter", (*BOX, "env"),
        [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "closedloop-store", "key": "gone"}}}],
    ),
    "there is no volume gone": ("Deployment", "closedloop-exporter", (*BOX, "volumeMounts", 0, "name"), "gone"),
    "may run as root": ("Deployment", "closedloop-stable", ("spec", "template", "spec", "securityContext"), {}),
    "file system may be written": (
        "Deployment", "closedloop-stable", (*BOX, "securityContext", "readOnlyRootFilesystem"), False,
    ),
    "keeps capabilities": ("Deployment", "closedloop-stable", (*BOX, "securityContext", "capabilities"), None),
    "no limits of cpu and memory": ("Deployment", "closedloop-stable", (*BOX, "resources", "limits"), {"cpu": "1"}),
    "is not pinned": ("Deployment", "closedloop-stable", (*BOX, "image"), "closedloop-serving:latest"),
    "closedloop-jobs:0.1.0 is not pinned": (
        "Deployment", "closedloop-mlflow", ("spec", "template", "spec", "initContainers", 0, "image"),
        "closedloop-jobs:0.1.0",
    ),
    "its readinessProbe asks a port": (
        "Deployment", "closedloop-stable", (*BOX, "readinessProbe", "httpGet", "port"), "web",
    ),
    "holds a secret": ("Deployment", "closedloop-stable", (*BOX, "env", 0), {"name": "DB_PASSWORD", "value": "x"}),
    "there is no Deployment gone": (
        "HorizontalPodAutoscaler", "closedloop-stable", ("spec", "scaleTargetRef", "name"), "gone",
    ),
    "how many replicas there are too": ("Deployment", "closedloop-stable", ("spec", "replicas"), 3),
    "2 to 11 replicas": ("HorizontalPodAutoscaler", "closedloop-stable", ("spec", "maxReplicas"), 11),
    "release.traffic is not istio, which splits the requests": (
        "ConfigMap", "closedloop-environment", ("data", "CLOSEDLOOP_RELEASE__TRAFFIC"), "gateway",
    ),
    "do not add up to 100": ("VirtualService", "closedloop", ("spec", "http", 1, "route", 1, "weight"), 5),
    "subset next of serving has no pods": (
        "VirtualService", "closedloop", ("spec", "http", 1, "route", 1, "destination", "subset"), "next",
    ),
    "has no port 80": (
        "VirtualService", "closedloop", ("spec", "http", 0, "route", 0, "destination", "port", "number"), 80,
    ),
    "closedloop-release: more than to read objects by name": (
        "Role", "closedloop-release", ("rules", 0, "resourceNames"), None,
    ),
    "more than to read objects by name, and to change the weights": (
        "Role", "closedloop-release", ("rules", 0, "resources"), ["deployments"],
    ),
    "closedloop-ci: more than to read": ("Role", "closedloop-ci", ("rules", 0, "verbs"), ["get", "patch"]),
    "there is no other among cronjobs": ("Role", "closedloop-ci", ("rules", 0, "resourceNames"), ["other"]),
    "delete of jobs": ("Role", "closedloop-ci", ("rules", 1, "verbs"), ["create", "delete"]),
    "mounts a token that opens nothing": (
        "Deployment", "closedloop-exporter", ("spec", "template", "spec", "automountServiceAccountToken"), True,
    ),
    "a secret stands in the manifests": ("ConfigMap", "closedloop-prometheus", ("kind",), "Secret"),
    "needs rights in the whole cluster": ("Role", "closedloop-release", ("kind",), "ClusterRole"),
}  # fmt: skip


@pytest.mark.parametrize("problem", CHANGES)
def test_a_manifest_that_is_broken_is_found_out(problem):
    found = find_problems(change(*CHANGES[problem]))
    assert any(problem in one for one in found), found


def find_undocumented(resources):
    """What the cluster has to bring, and no row of the runbook's table names with a file that sets it."""
    section = read_runbook().split("## Deploy\n")[1].split("\n## ")[0]
    rows = {
        row: re.findall("`([^`]+)`", row.split(" | ")[-1]) for row in re.findall(r"^\| .* \|$", section, re.MULTILINE)
    }

    def is_set(name, patterns):
        return any(name in path.read_text(encoding="utf-8") for one in patterns for path in ROOT.glob(one))

    named = {name for name in list_outside(resources) for row in rows if f"`{name}`" in row and is_set(name, rows[row])}
    return sorted(list_outside(resources) - named)


OUTSIDE = {
    "istio-system/other": ("VirtualService", "closedloop", ("spec", "gateways", 0), "istio-system/other"),
    "churn.example.com": ("VirtualService", "closedloop", ("spec", "hosts", 0), "churn.example.com"),
    "fast": ("PersistentVolumeClaim", "closedloop-jobs", ("spec", "storageClassName"), "fast"),
    "ReadWriteOncePod": ("PersistentVolumeClaim", "closedloop-jobs", ("spec", "accessModes", 0), "ReadWriteOncePod"),
    "172.16.0.0/12": ("NetworkPolicy", "exporter", ("spec", "egress", 0, "to", 0, "ipBlock", "cidr"), "172.16.0.0/12"),
    "app.kubernetes.io/name: agent": (
        "NetworkPolicy", "exporter",
        ("spec", "ingress", 0, "from", 0, "podSelector", "matchLabels", "app.kubernetes.io/name"), "agent",
    ),
    "metrics": ("ConfigMap", "closedloop-prometheus", ("metadata", "namespace"), "metrics"),
    "minio.example.com:9000": (
        "ConfigMap", "closedloop-environment", ("data", "AWS_ENDPOINT_URL"), "http://minio.example.com:9000",
    ),
    "other-bucket": ("Deployment", "closedloop-mlflow", (*BOX, "env", 4, "value"), "s3://other-bucket/mlflow"),
    "images.example.com": (
        "Deployment", "closedloop-mlflow", (*BOX, "image"), "images.example.com/closedloop-jobs:v0.1.0",
    ),
    "deployers": ("RoleBinding", "closedloop-ci", ("subjects", 0, "name"), "deployers"),
    "memory": ("HorizontalPodAutoscaler", "closedloop-stable", ("spec", "metrics", 0, "resource", "name"), "memory"),
    "monitoring.coreos.com": ("ConfigMap", "closedloop-prometheus", ("apiVersion",), "monitoring.coreos.com/v1"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_the_cluster_has_to_bring_is_in_the_runbook(name):
    assert find_undocumented(read_overlay("production")) == []
    assert find_undocumented(change(*OUTSIDE[name])) == [name]


def test_the_runbook_names_the_databases_that_its_secrets_lead_to():
    databases = set(re.findall(r"\$\(url (\w+)\)", read_commands("Deploy")["make the Secrets"]))
    (row,) = re.findall(r"^\| PostgreSQL .*", read_runbook(), re.MULTILINE)
    assert databases == set(re.findall(r"`(\w+)`", row))


def test_the_service_scales_on_cpu_and_on_the_latency_of_a_pod():
    scalers = [one["spec"]["metrics"] for one in read_overlay("production") if one["kind"] == "HorizontalPodAutoscaler"]
    metric = {"metric": {"name": "closedloop_prediction_request_latency_seconds"}}
    cpu = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}
    latency = metric | {"target": {"type": "AverageValue", "averageValue": "200m"}}
    assert scalers == [[{"type": "Resource", "resource": cpu}, {"type": "Pods", "pods": latency}]] * 2


def test_the_runbook_names_every_deployment_that_has_the_tokens_or_the_services_image():
    text = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.+)\n((?:(?!^#).*\n)*)", text, re.MULTILINE))
    having = {"Rotate tokens": '"key": "tokens", "name": "closedloop-serving"', "Roll back": "/closedloop-serving:"}
    for section, part in having.items():
        (command,) = re.findall(r"`(kubectl rollout [^`]+)`", sections[section])
        named = set(re.findall(r"deployment/(\S+)", command))
        pods = list_pods(read_overlay("production"))
        assert named == {name.split()[1] for name, _, pod in pods if part in json.dumps(pod, sort_keys=True)}


@pytest.mark.parametrize("tag", ["v1.2.3", "0123456789ab"])
def test_images_are_rolled_out_as_the_runbook_says_by_every_name_that_they_are_given(tag, tmp_path):
    """With a program called kubectl: what it is told to apply is looked at."""
    for name in ("k8s", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "kubectl").write_text('#!/bin/sh\necho "$@" > called\n', encoding="utf-8")
    (tmp_path / "kubectl").chmod(0o755)
    commands = read_commands("Roll out images")["roll out"].replace("tag=v0.1.0", f"tag={tag}")
    assert f"tag={tag}" in commands
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", "-euc", commands], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "called").read_text(encoding="utf-8") == "apply -k k8s/overlays/production\n"
    resources = render("production", tmp_path)
    assert find_problems(resources) == []
    named = re.findall(r"registry\.example\.com/closedloop-(?:jobs|serving):(\S+?)[\\\s\"]", json.dumps(resources))
    assert len(named) > 10
    assert set(named) == {tag}


def test_the_overlays_and_the_workflows_call_images_by_what_they_were_built_from():
    """Under the Git tag by `release.yml`; under the commit, the Makefile's default, by `mlops-pipeline.yml`."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    tags = {
        box["image"].partition(":")[2]
        for overlay in OVERLAYS
        for _, _, pod in list_pods(read_overlay(overlay))
        for box in list_containers(pod)
        if is_ours(box)
    }
    assert tags == {f"v{version}"}
    workflows = {
        name: (ROOT / f".github/workflows/{name}.yml").read_text("utf-8") for name in ("release", "mlops-pipeline")
    }
    assert 'tags: ["v*"]' in workflows["release"]
    for name, option in (("release", ' TAG="$GITHUB_REF_NAME"'), ("mlops-pipeline", "")):
        for target in ("make images", "make registry-login push-images"):
            assert f"run: {target}{option}\n" in workflows[name], name


def test_secrets_are_declared_and_used():
    used = {
        reference["name"]
        for overlay in OVERLAYS
        for _, _, pod in list_pods(read_overlay(overlay))
        for box in list_containers(pod)
        for variable in box.get("env", [])
        if (reference := variable.get("valueFrom", {}).get("secretKeyRef"))
    }
    assert used | {read_cluster_settings()["SECRET"]} == set(read_external())


def read_cluster_settings():
    """What production's pods know of Kubeflow's, by the setting's name."""
    resources = read_overlay("production")
    (said,) = (one["data"] for one in resources if one["metadata"]["name"].startswith("closedloop-environment-"))
    prefix = "CLOSEDLOOP_RETRAINING__"
    return {name.removeprefix(prefix): value for name, value in said.items() if name.startswith(prefix)}


def test_kubeflows_pods_run_the_image_of_the_jobs_with_the_passwords_of_the_jobs(monkeypatch):
    said, resources = read_cluster_settings(), read_overlay("production")
    images = {box["image"] for _, _, pod in list_pods(resources) for box in list_containers(pod)}
    (image,) = (image for image in images if "closedloop-jobs" in image)
    (job,) = (one for one in resources if one["metadata"]["name"] == "closedloop-retrain")
    (box,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    own = {"CLOSEDLOOP_RETRAINING__TOKEN"}  # which opens Kubeflow itself
    secrets = {variable["name"] for variable in box["env"] if "valueFrom" in variable} - own
    for name, value in said.items():
        monkeypatch.setenv(f"CLOSEDLOOP_RETRAINING__{name}", value)
    text = compile_pipeline(ROOT / "pipelines/retrain.py", load_settings(folder=ROOT / "configs").retraining)
    pipeline, platform = yaml.safe_load_all(text)
    executors = pipeline["deploymentSpec"]["executors"]
    kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(kubernetes) == set(executors)
    for name, executor in executors.items():
        container = executor["container"]
        assert container["image"] == image
        # they run in another namespace than MLflow
        assert {"name": "CLOSEDLOOP_TRACKING__URI", "value": "http://mlflow.closedloop:5000"} in container["env"]
        (secret,) = kubernetes[name]["secretAsEnv"]
        assert secret["secretName"] == said["SECRET"]
        given = {one["secretKey"]: one["envVar"] for one in secret["keyToEnv"]}
        assert given == {key: key for key in read_external()[said["SECRET"]]}
        assert set(given) == secrets


def test_containers_run_commands_that_exist_with_settings_that_exist():
    commands = {command.split()[0] for command in list_commands()}
    keys = {key.upper().replace(".", "__") for key in list_keys(Settings)} | {"PROFILE"}
    for overlay in OVERLAYS:
        maps = {one["metadata"]["name"]: one["data"] for one in read_overlay(overlay) if one["kind"] == "ConfigMap"}
        for name, _, pod in list_pods(read_overlay(overlay)):
            for box in list_containers(pod):
                if not is_ours(box):
                    continue
                given = [variable["name"] for variable in box.get("env", [])]
                given += [key for one in box.get("envFrom", []) for key in maps[one["configMapRef"]["name"]]]
                assert {key.removeprefix("CLOSEDLOOP_") for key in given if key.startswith("CLOSEDLOOP_")} <= keys, name
                if box.get("command") == ["mlflow"]:
                    continue
                for command in box["args"][0].split("; "):
                    words = command.removeprefix("exec ").removeprefix("closedloop ").split()
                    assert words[0] in commands, name


def test_a_daily_job_lets_the_store_keep_no_more_than_its_days():
    (job,) = (one for one in read_overlay("production") if one["metadata"]["name"] == "closedloop-outcomes")
    (box,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert box["args"][0].startswith("closedloop store purge --as-of ")


@pytest.mark.parametrize(("failing", "status"), [("store", 1), ("outcomes", 1), ("none", 0)])
def test_a_purge_that_fails_keeps_no_outcomes_from_being_stored(tmp_path, failing, status):
    (job,) = (one for one in read_overlay("production") if one["metadata"]["name"] == "closedloop-outcomes")
    (box,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    program = tmp_path / "closedloop"
    program.write_text(f'#!/bin/sh\necho "$1" >>{tmp_path}/ran\ntest "$1" != {failing}\n', encoding="utf-8")
    program.chmod(0o755)
    ran = subprocess.run([*box["command"], *box["args"]], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False)
    assert (ran.returncode, (tmp_path / "ran").read_text().split()) == (status, ["store", "outcomes"])


@pytest.mark.thorough
def test_checkov_finds_a_fault_and_else_only_what_has_a_reason(tmp_path):
    checkov = Path(sys.prefix) / "checkov/bin/checkov"
    require(checkov.exists(), "checkov (make scan)")

    def scan(resources):
        (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(resources), encoding="utf-8")
        command = [checkov, "--config-file", ROOT / "k8s/checkov.yaml", "--file", tmp_path / "all.yaml"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    clean = scan(read_overlay("production") + read_overlay("local"))
    assert clean.returncode == 0, clean.stdout
    path = (*BOX, "securityContext", "readOnlyRootFilesystem")
    broken = scan(change("Deployment", "closedloop-stable", path, False))
    assert broken.returncode == 1
    assert "CKV_K8S_22" in broken.stdout


def read_adapter():
    """What prometheus-adapter looks for, and what it asks of the pods that it found."""
    rule = yaml.safe_load((ROOT / "k8s/base/observability/adapter.yaml").read_text(encoding="utf-8"))["rules"][0]
    query = rule["metricsQuery"].replace("<<.GroupBy>>", "namespace, pod")
    query = query.replace("<<.LabelMatchers>>", 'namespace="closedloop",pod=~"busy|idle|new"')
    assert "<<" not in query
    return rule["seriesQuery"], query


@pytest.mark.thorough
def test_the_autoscalers_metric_on_a_real_prometheus_that_scrapes_real_services(project, tmp_path):
    write_model_folder(tmp_path / "model", model_name="shop_churn")
    series, query = read_adapter()

    def ask(place, **parameters):
        return json.loads(fetch(f"{prometheus}/api/v1/{place}?{urllib.parse.urlencode(parameters)}"))["data"]

    def read():
        return {one["metric"]["pod"]: float(one["value"][1]) for one in ask("query", query=query)["result"]}

    with contextlib.ExitStack() as stack:
        start = ("--model", str(tmp_path / "model"))
        pods = {
            name: stack.enter_context(run_service(project.root, *start, CLOSEDLOOP_SERVING__STATE=f"state/{name}"))
            for name in ("busy", "idle")
        }
        for pod in pods.values():  # what was answered before it was scraped is no traffic
            assert pod.call("POST", "/predict", {"features": ROWS[0]})[0] == 200
            pod.read_metric("prediction_request_latency_seconds_count")
        targets = {name: f"127.0.0.1:{pod.metrics_port}" for name, pod in pods.items()}
        prometheus = stack.enter_context(run_prometheus(tmp_path, targets, namespace="closedloop"))
        wait_until(lambda: read() == {"busy": 0.0, "idle": 0.0}, "both pods at 0")
        with Load(pods["busy"], clients=1) as load:
            found = wait_until(lambda: (now := read()).get("busy") and now, "a mean of the busy pod")
        assert load.failures == []
        assert found["idle"] == 0.0
        assert 0 < found["busy"] < 30
        assert {one["pod"] for one in ask("series", **{"match[]": series})} == {"busy", "idle"}


@pytest.mark.thorough
def test_the_autoscalers_metric_is_each_pods_mean_and_never_nan(tmp_path):
    require(shutil.which("promtool"), "promtool")
    _, query = read_adapter()
    series = 'closedloop_prediction_request_latency_seconds_{}{{namespace="closedloop",pod="{}"}}'
    values = {
        ("sum", "busy"): "0+1.25x20",
        ("count", "busy"): "0+10x20",
        ("sum", "idle"): "7+0x20",
        ("count", "idle"): "9+0x20",
    }
    case = {
        "interval": "15s",
        "input_series": [{"series": series.format(*key), "values": value} for key, value in values.items()],
        "promql_expr_test": [
            {
                "expr": query,
                "eval_time": "5m",
                "exp_samples": [
                    {"labels": '{namespace="closedloop",pod="busy"}', "value": 0.125},
                    {"labels": '{namespace="closedloop",pod="idle"}', "value": 0},
                ],
            }
        ],
    }
    (tmp_path / "test.json").write_text(json.dumps({"tests": [case]}), encoding="utf-8")
    ran = subprocess.run(
        ["promtool", "test", "rules", "test.json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
