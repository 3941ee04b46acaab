"""Who talks to whom in a rendered overlay, by names that are answered, and by networks that let them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.manifests import CLIENTS, NAMESPACE, Resource, list_pods, read_map

NAME = "app.kubernetes.io/name"
METRICS_PORTS = {"serve": 8001, "stream": 8001, "exporter": 8002}  # the agent's, where there is one
# addresses that stand in Secrets: where the overlay brings the server itself, its pods must be reached
IN_SECRETS = {
    "closedloop-store": "postgres:5432",
    "closedloop-mlflow": "postgres:5432",
    "closedloop-features": "redis:6379",
}


@dataclass(frozen=True)
class Peer:
    """Pods with these labels, in one namespace."""

    labels: dict[str, str]
    namespace: str = NAMESPACE


def find_unreachable(resources: list[Resource]) -> list[str]:
    """Every address that a pod is given and does not get through to, and every way past a release's weights."""
    checks = (_check_hosts, _check_addresses, _check_scrapes, _check_counted, _check_clients)
    return [problem for check in checks for problem in check(resources)]


def _read_environment(resources: list[Resource]) -> dict[str, str]:
    return read_map("closedloop-environment", resources)


def _read_tracking(resources: list[Resource]) -> str:
    return str(yaml.safe_load(read_map("closedloop-settings", resources)["production.yaml"])["tracking"]["uri"])


def _read_prometheus(resources: list[Resource]) -> str:
    return urlsplit(_read_environment(resources).get("CLOSEDLOOP_RELEASE__PROMETHEUS", "")).netloc


def _check_hosts(resources: list[Resource]) -> Iterator[str]:
    """MLflow answers 403 to a Host header that it does not know."""
    (args,) = (pod["containers"][0]["args"] for name, _, pod in list_pods(resources) if name.endswith("-mlflow"))
    (allowed,) = (word.partition("=")[2].split(",") for word in args if word.startswith("--allowed-hosts="))
    environment = _read_environment(resources)
    pipelines = json.loads(environment.get("CLOSEDLOOP_RETRAINING__ENVIRONMENT", "{}"))
    given = [one["CLOSEDLOOP_TRACKING__URI"] for one in (environment, pipelines) if "CLOSEDLOOP_TRACKING__URI" in one]
    for address in (_read_tracking(resources), *given):
        if urlsplit(address).netloc not in allowed:
            yield f"MLflow does not let in who calls it {urlsplit(address).netloc}"


def _check_addresses(resources: list[Resource]) -> Iterator[str]:
    brought = {one["metadata"]["name"] for one in resources if one["kind"] == "Service"}
    prometheus = _read_prometheus(resources)
    tracking = urlsplit(_read_tracking(resources)).netloc
    for name, labels, pod in list_pods(resources):
        said = json.dumps(pod, sort_keys=True)
        secrets = set(re.findall(r'"secretKeyRef": {"key": "[^"]*", "name": "([^"]*)"', said))
        wanted = {IN_SECRETS[one] for one in secrets & IN_SECRETS.keys() if IN_SECRETS[one].split(":")[0] in brought}
        if "closedloop-tracking" in secrets:
            wanted.add(tracking)
        if re.search(r'closedloop release|"release", "step"', said):
            wanted.add(prometheus)
        for address in sorted(wanted):
            if not address:
                yield f"{name}: releases, and knows no Prometheus"
                continue
            if not may_reach(resources, Peer(labels), locate(resources, address), int(address.split(":")[1])):
                yield f"{name}: the network does not let it reach {address}"


def _check_scrapes(resources: list[Resource]) -> Iterator[str]:
    """Prometheus has to see each pod that shows figures: no alert would tell that it does not."""
    prometheus = locate(resources, _read_prometheus(resources))
    for name, labels, pod in list_pods(resources):
        for port in _list_metrics_ports(pod):
            if {"name": "metrics", "containerPort": port} not in pod["containers"][0].get("ports", []):
                yield f"{name}: its port {port} has no name"
            if not may_reach(resources, prometheus, Peer(labels), port):
                yield f"{name}: the network does not let Prometheus scrape it"
            if len(_list_jobs(resources, labels)) != 1:
                yield f"{name}: not one job of Prometheus scrapes it"


def _check_counted(resources: list[Resource]) -> Iterator[str]:
    """Behind a proxy the errors that a release counts are those of what the proxy deals out."""
    environment = _read_environment(resources)
    if environment.get("CLOSEDLOOP_RELEASE__TRAFFIC") not in ("istio", "gateway"):
        return
    wanted = dict(re.findall(r'(\w+)="([^"]*)"', environment["CLOSEDLOOP_RELEASE__PROMETHEUS_MATCHERS"]))
    for name, labels, pod in list_pods(resources):
        for job in _list_jobs(resources, labels) if _list_metrics_ports(pod) else []:
            counted = wanted.items() <= {"namespace": NAMESPACE, "job": job}.items()
            if counted != (labels[NAME] == "serving"):
                yield f"{name}: its errors are {'' if counted else 'not '}a release's"


def _list_metrics_ports(pod: dict[str, Any]) -> list[int]:
    return [METRICS_PORTS[one] for one in pod["containers"][0].get("args", [])[:1] if one in METRICS_PORTS]


def _list_jobs(resources: list[Resource], labels: dict[str, str]) -> list[str]:
    """The scrape jobs that keep a pod's port called metrics: by its labels, or by a Service's name."""
    monitors = [one["spec"] for one in resources if one["kind"] == "PodMonitor"]
    if monitors:
        return [
            end["relabelings"][0]["replacement"]
            for one in monitors if _selects(one["selector"], labels)
            for end in one["podMetricsEndpoints"] if end["port"] == "metrics"
        ]  # fmt: skip
    own = [one for one in resources if one["metadata"]["name"].startswith("prometheus-config-")]
    text = (
        own[0]["data"]["prometheus-config.yaml"] if own else read_map("closedloop-prometheus", resources)["scrape.yaml"]
    )
    meta = {f"__meta_kubernetes_pod_label_{re.sub('[./-]', '_', key)}": value for key, value in labels.items()}
    meta["__meta_kubernetes_pod_container_port_name"] = "metrics"
    return [
        job["job_name"]
        for job in yaml.safe_load(text)["scrape_configs"]
        if (
            all(re.fullmatch(rule["regex"], meta[rule["source_labels"][0]])
                for rule in job["relabel_configs"] if rule.get("action") == "keep")
            if "relabel_configs" in job
            else any(_selects({"matchLabels": locate(resources, host).labels}, labels) for host in _list_hosts(job))
        )
    ]  # fmt: skip


def _list_hosts(job: dict[str, Any]) -> list[str]:
    return [host for one in job.get("dns_sd_configs", []) for host in one["names"]] + [
        host for one in job.get("static_configs", []) for host in one["targets"]
    ]


def _check_clients(resources: list[Resource]) -> Iterator[str]:
    """They take no part in Istio's split: a challenger in shadow must not be what answers them."""
    client = Peer(CLIENTS)
    if not may_reach(resources, client, locate(resources, "serving-stable"), 3000):
        yield "pods of clients: the network does not let them reach serving-stable:3000"
    for name, labels, _ in list_pods(resources):
        if labels.get("closedloop/track") == "canary" and _admits(resources, client, Peer(labels), 3000, "ingress"):
            yield f"{name}: clients in the cluster reach it past the weights"
    if locate(resources, "serving-stable").labels.get("closedloop/track") != "stable":
        yield "no Service serving-stable is for the stable pods alone"


def locate(resources: list[Resource], address: str) -> Peer:
    """The pods behind a Service; outside of the overlay those that are called as it is."""
    host, _, namespace = address.split(":")[0].partition(".")
    for one in resources:
        if one["kind"] == "Service" and one["metadata"]["name"] == host and namespace in ("", NAMESPACE):
            return Peer(one["spec"]["selector"])
    return Peer({NAME: host}, namespace or NAMESPACE)


def may_reach(resources: list[Resource], source: Peer, target: Peer, port: int) -> bool:
    """Do the policies of both ends let a connection through? Blocks of addresses do not count: pods may have any."""
    leaves = source.namespace != NAMESPACE or _admits(resources, target, source, port, "egress")
    return leaves and (target.namespace != NAMESPACE or _admits(resources, source, target, port, "ingress"))


def _admits(resources: list[Resource], other: Peer, own: Peer, port: int, direction: str) -> bool:
    """Does a policy about ``own`` let ``other`` in (ingress), or ``own`` out to it (egress)?"""
    place = {"ingress": "from", "egress": "to"}[direction]
    for policy in (one["spec"] for one in resources if one["kind"] == "NetworkPolicy"):
        if not _selects(policy["podSelector"], own.labels):
            continue
        for rule in policy.get(direction, []):
            if port in [one["port"] for one in rule["ports"]] and any(_is_peer(one, other) for one in rule[place]):
                return True
    return False


def _is_peer(said: dict[str, Any], other: Peer) -> bool:
    if "ipBlock" in said:
        return False
    spaces = said.get("namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}})
    there = {"kubernetes.io/metadata.name": other.namespace}
    return _selects(spaces, there) and _selects(said.get("podSelector", {}), other.labels)


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """An empty selector means all; expressions are not understood here."""
    assert set(selector) <= {"matchLabels"}, selector
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
