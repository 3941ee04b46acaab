"""What must hold between the resources of a rendered overlay, beyond each one's own schema."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

ROOT = Path(__file__).parents[1]
NAMESPACE = "closedloop"
Resource = dict[str, Any]
STANDARD = (
    "v1",
    "apps/v1",
    "batch/v1",
    "policy/v1",
    "autoscaling/v2",
    "networking.k8s.io/v1",
    "rbac.authorization.k8s.io/v1",
)

UNITS = {"Mi": 20, "Gi": 30}
CLIENTS = {"closedloop/client": "true"}  # the label of other people's pods that may call the service
# A node of the local overlay, less what Kubernetes itself requests there: API server, etcd, scheduler, network, DNS.
NODE_CPU_MILLIS, NODE_MEMORY_BYTES = 2_000 - 950, (8 << 30) - (512 << 20)
# Of a pod's grace time: open requests are answered, then the agent drains (closedloop.serving.process), then both end.
REQUESTS_SECONDS, LAST_DRAIN_SECONDS, MARGIN_SECONDS = 10, 35, 10
# other people's images by a version; ours by the Git tag or the commit that they were built from
PINNED = {
    False: re.compile(r":v?\d+\.\d+(\.\d+)?$|@sha256:[0-9a-f]{64}$"),
    True: re.compile(r":(v\d+\.\d+\.\d+|[0-9a-f]{12})$|@sha256:[0-9a-f]{64}$"),
}
# what has no name yet when it is asked for: a Job that a workflow makes, and its pods
CI_ROLE = "closedloop-ci"
CI_MAY = {
    "jobs": {"create", "get", "list", "watch"},
    "pods": {"get", "list", "watch"},
    "pods/log": {"get", "list", "watch"},
}


def render(overlay: str, root: Path = ROOT) -> list[Resource]:
    """The resources that `kubectl apply -k` would send."""
    command = [str(Path(sys.executable).parent / "kubectl"), "kustomize", str(root / "k8s/overlays" / overlay)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [resource for resource in yaml.safe_load_all(text) if resource]


def read_external() -> dict[str, list[str]]:
    """Secrets that the cluster brings along, with their keys."""
    found: dict[str, list[str]] = yaml.safe_load((ROOT / "k8s/external.yaml").read_text(encoding="utf-8"))["Secret"]
    return found


def find_problems(resources: list[Resource]) -> list[str]:
    """Every broken rule, named with the resource that breaks it."""
    checks = (
        _check_selectors, _check_owners, _check_jobs, _check_networks, _check_references, _check_observers,
        _check_containers, _check_room, _check_service, _check_spools, _check_autoscalers, _check_routes, _check_waits,
        _check_rights,
    )  # fmt: skip
    return [problem for check in checks for problem in check(resources)]


def list_outside(resources: list[Resource]) -> set[str]:
    """Names of what the manifests count on, and do not bring: servers, namespaces, addresses, groups of resources."""
    own = {resource["metadata"]["name"] for resource in _select("Service", resources)}
    spaces = {resource["metadata"].get("namespace", NAMESPACE) for resource in resources}
    found = {resource["apiVersion"].split("/")[0] for resource in resources if resource["apiVersion"] not in STANDARD}
    for resource in resources:
        spec = resource.get("spec", {})
        match resource["kind"]:
            case "VirtualService":
                found |= {*spec["gateways"], *spec["hosts"]}
            case "HTTPRoute":
                found |= {f"{one['namespace']}/{one['name']}" for one in spec["parentRefs"]} | set(spec["hostnames"])
            case "PersistentVolumeClaim":
                found |= {*spec["accessModes"], *filter(None, [spec.get("storageClassName")])}
            case "HorizontalPodAutoscaler":
                found |= {_name_metric(metric) for metric in spec["metrics"]}
            case "RoleBinding":
                found |= {one["name"] for one in resource["subjects"] if one["kind"] != "ServiceAccount"}
            case "NetworkPolicy":
                for rule in (*spec.get("ingress", []), *spec.get("egress", [])):
                    for peer in (*rule.get("from", []), *rule.get("to", [])):
                        found |= set(_name_peer(peer))
    for address in re.findall(r"[a-z][\w.-]*:\d+", str(read_map("closedloop-environment", resources))):
        if address.split(":")[0].removesuffix(f".{NAMESPACE}") not in own:
            found.add(address)
    boxes = [box for _, _, pod in list_pods(resources) for box in list_containers(pod)]
    found |= {box["image"].rpartition("/")[0] for box in boxes if "/" in box["image"]}
    return found | spaces - {NAMESPACE} | set(re.findall(r"s3://([\w-]+)", str(resources)))


def _name_metric(metric: dict[str, Any]) -> str:
    return str(metric["pods"]["metric"]["name"] if metric["type"] == "Pods" else metric["resource"]["name"])


def _name_peer(peer: dict[str, Any]) -> Iterator[str]:
    """A network's block, or another namespace and whom it lets in there."""
    if "ipBlock" in peer:
        yield peer["ipBlock"]["cidr"]
    if "namespaceSelector" in peer:
        yield peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for label, value in peer.get("podSelector", {}).get("matchLabels", {}).items():
            yield f"{label}: {value}"


def read_map(name: str, resources: list[Resource]) -> dict[str, str]:
    """What a ConfigMap says, whatever kustomize has hung on its name."""
    named = re.compile(rf"{name}(-[a-z0-9]{{10}})?")
    (found,) = (one["data"] for one in _select("ConfigMap", resources) if named.fullmatch(one["metadata"]["name"]))
    return dict(found)


def list_pods(resources: list[Resource]) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Name, labels and specification of every pod template; a StatefulSet's own claims are volumes of its pods."""
    for resource in resources:
        spec = resource.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
        if template:
            claims = [{"name": one["metadata"]["name"], "ownClaim": {}} for one in spec.get("volumeClaimTemplates", [])]
            pod = template["spec"] | {"volumes": [*template["spec"].get("volumes", []), *claims]}
            yield name_of(resource), template["metadata"].get("labels", {}), pod


def list_secrets(said: Any) -> Iterator[tuple[str, str]]:
    """Secrets that a pod is given in whatever way, with the keys; "*" is all of them."""
    if isinstance(said, list):
        for one in said:
            yield from list_secrets(one)
    if not isinstance(said, dict):
        return
    for kind, found in said.items():
        if kind == "secretKeyRef":
            yield found["name"], found["key"]
        elif kind in ("secretRef", "secret"):
            name = found.get("secretName") or found["name"]
            yield from ((name, item["key"]) for item in found.get("items") or [{"key": "*"}])
        else:
            yield from list_secrets(found)


def list_containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that come first, too."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def is_ours(box: dict[str, Any]) -> bool:
    """Does a container run an image of this project?"""
    return "closedloop-" in box["image"]


def name_of(resource: Resource) -> str:
    return f"{resource['kind']} {resource['metadata']['name']}"


def _select(kind: str, resources: list[Resource]) -> list[Resource]:
    return [resource for resource in resources if resource["kind"] == kind]


def _matches(wanted: dict[str, str], labels: dict[str, str]) -> bool:
    return bool(wanted) and wanted.items() <= labels.items()


def _check_selectors(resources: list[Resource]) -> Iterator[str]:
    pods = list(list_pods(resources))
    for resource in resources:
        spec, name = resource.get("spec", {}), name_of(resource)
        if resource["kind"] in ("Deployment", "StatefulSet"):
            if not _matches(spec["selector"]["matchLabels"], spec["template"]["metadata"]["labels"]):
                yield f"{name}: its selector does not match its own pods"
        elif resource["kind"] == "Service":
            chosen = [pod for _, labels, pod in pods if _matches(spec["selector"], labels)]
            if not chosen:
                yield f"{name}: selects no pod"
            for port in spec["ports"]:
                named = {one["name"] for pod in chosen for box in pod["containers"] for one in box.get("ports", [])}
                if port["targetPort"] not in named:
                    yield f"{name}: no container has a port named {port['targetPort']}"
        elif resource["kind"] in ("PodDisruptionBudget", "NetworkPolicy"):
            wanted = spec.get("selector", spec.get("podSelector", {})).get("matchLabels", {})
            if wanted not in ({}, CLIENTS) and not any(_matches(wanted, labels) for _, labels, _ in pods):
                yield f"{name}: selects no pod"


def _check_owners(resources: list[Resource]) -> Iterator[str]:
    """What a Deployment selects is its own: kubectl shows the logs of all, and a budget counts them."""
    pods = list(list_pods(resources))
    for resource in resources:
        if resource["kind"] in ("Deployment", "StatefulSet"):
            wanted = resource["spec"]["selector"]["matchLabels"]
            for name, labels, _ in pods:
                if name != name_of(resource) and _matches(wanted, labels):
                    yield f"{name_of(resource)}: selects the pods of {name}"


def _check_jobs(resources: list[Resource]) -> Iterator[str]:
    """A Job cannot be changed: the next release's, or one with other settings, is refused while it is there."""
    for job in _select("Job", resources):
        yield f"{name_of(job)}: the next apply cannot change it"


def _check_networks(resources: list[Resource]) -> Iterator[str]:
    for space in _select("Namespace", resources):
        if space["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"{name_of(space)}: pods are not held to the restricted profile"
    if not any(policy["spec"]["podSelector"] == {} and len(policy["spec"]["policyTypes"]) == 2
               and not policy["spec"].get("ingress") and not policy["spec"].get("egress")
               for policy in _select("NetworkPolicy", resources)):  # fmt: skip
        yield "no NetworkPolicy denies what is not allowed"
    readers = [[{"matchLabels": {"app.kubernetes.io/name": name}}] for name in ("prometheus", "argo-rollouts")]
    for policy in _select("NetworkPolicy", resources):
        for rule in policy["spec"].get("ingress", []):
            if not rule.get("ports") or not rule.get("from"):
                yield f"{name_of(policy)}: a rule without ports or sources lets everything in"
            metrics = {8001, 8002, "metrics"} & {port.get("port") for port in rule.get("ports", [])}
            known = readers if metrics == {8002} else readers[:1]  # the exporter's port has a release's verdict too
            if metrics and [one.get("podSelector") for one in rule.get("from", [])] not in known:
                yield f"{name_of(policy)}: a metrics port is open to others than Prometheus"


def _check_references(resources: list[Resource]) -> Iterator[str]:
    own = [one for one in _select("ConfigMap", resources) if one["metadata"].get("namespace") == NAMESPACE]
    maps = {one["metadata"]["name"] for one in own}
    claims = {one["metadata"]["name"] for one in _select("PersistentVolumeClaim", resources)}
    accounts = {one["metadata"]["name"] for one in _select("ServiceAccount", resources)}
    external = read_external()
    for resource in _select("Secret", resources):
        yield f"{name_of(resource)}: a secret stands in the manifests"
    for name, _, pod in list_pods(resources):
        if pod.get("serviceAccountName", next(iter(accounts), "")) not in accounts:
            yield f"{name}: there is no ServiceAccount {pod['serviceAccountName']}"
        for kind, found in _list_references(pod):
            if kind == "configMap" and found[0] not in maps:
                yield f"{name}: there is no ConfigMap {found[0]}"
            if kind == "claim" and found[0] not in claims:
                yield f"{name}: there is no PersistentVolumeClaim {found[0]}"
            if kind == "secret" and found[1] not in external.get(found[0], []):
                yield f"{name}: k8s/external.yaml has no key {found[1]} of a Secret {found[0]}"
        volumes = {volume["name"] for volume in pod["volumes"]}
        for box in list_containers(pod):
            for mount in box.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{name}: there is no volume {mount['name']}"


def _check_observers(resources: list[Resource]) -> Iterator[str]:
    """What no pod of these mounts is for those of Prometheus' namespace: a pod mounts no other namespace's."""
    used = {
        found[0] for _, _, pod in list_pods(resources) for kind, found in _list_references(pod) if kind == "configMap"
    }
    address = read_map("closedloop-environment", resources).get("CLOSEDLOOP_RELEASE__PROMETHEUS", "")
    namespace = [*(urlsplit(address).hostname or "").split("."), NAMESPACE][1]
    for one in _select("ConfigMap", resources):
        if one["metadata"]["name"] not in used and one["metadata"].get("namespace") != namespace:
            yield f"{name_of(one)}: nothing here mounts it, and nothing in {namespace} can"


def _list_references(pod: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for volume in pod.get("volumes", []):
        if "configMap" in volume:
            yield "configMap", (volume["configMap"]["name"],)
        if "persistentVolumeClaim" in volume:
            yield "claim", (volume["persistentVolumeClaim"]["claimName"],)
        for item in volume.get("secret", {}).get("items", []):
            yield "secret", (volume["secret"]["secretName"], item["key"])
    for box in list_containers(pod):
        for source in box.get("envFrom", []):
            yield "configMap", (source["configMapRef"]["name"],)
        for variable in box.get("env", []):
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                yield "secret", (reference["name"], reference["key"])


def _check_containers(resources: list[Resource]) -> Iterator[str]:
    for name, _, pod in list_pods(resources):
        security = pod.get("securityContext", {})
        if not security.get("runAsNonRoot") or security.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name}: may run as root, or without a seccomp profile"
        for box in list_containers(pod):
            where = f"{name}, container {box['name']}"
            own = box.get("securityContext", {})
            if not own.get("readOnlyRootFilesystem") or own.get("allowPrivilegeEscalation") is not False:
                yield f"{where}: its root file system may be written to, or privileges may grow"
            if own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{where}: keeps capabilities"
            for kind in ("requests", "limits"):
                if not {"cpu", "memory"} <= box.get("resources", {}).get(kind, {}).keys():
                    yield f"{where}: no {kind} of cpu and memory"
            if not PINNED[is_ours(box)].search(box["image"]):
                yield f"{where}: image {box['image']} is not pinned"
            if "livenessProbe" in box and "startupProbe" not in box:
                yield f"{where}: its livenessProbe may end it before it has started: no startupProbe"
            ports = {port["name"] for port in box.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                target = box.get(probe, {}).get("httpGet", box.get(probe, {}).get("tcpSocket", {})).get("port")
                if target is not None and target not in ports:
                    yield f"{where}: its {probe} asks a port named {target}"
            for variable in box.get("env", []):
                if "value" in variable and re.search(r"PASSWORD|TOKEN|SECRET|ID_KEY|://[^/]*:[^/]*@", str(variable)):
                    yield f"{where}: {variable['name']} holds a secret"


def _check_room(resources: list[Resource]) -> Iterator[str]:
    """An overlay that brings its own database is for one node, which has room for all pods and one Job."""
    if not any(one["metadata"]["name"] == "postgres" for one in _select("StatefulSet", resources)):
        return
    scaled = {
        one["spec"]["scaleTargetRef"]["name"]: one["spec"] for one in _select("HorizontalPodAutoscaler", resources)
    }
    for kind, parse, most in (("cpu", _parse_cpu, NODE_CPU_MILLIS), ("memory", _parse_bytes, NODE_MEMORY_BYTES)):
        total, jobs = 0, [0]
        for resource in resources:
            for _, _, pod in list_pods([resource]):
                needs = [parse(box["resources"]["requests"][kind]) for box in list_containers(pod)]
                first = len(pod.get("initContainers", []))
                size = max(sum(needs[first:]), *needs)  # those that come first run one at a time
                if resource["kind"] == "CronJob":
                    jobs.append(size)
                else:
                    total += size * _count_pods(resource, scaled)
        if total + max(jobs) > most:
            yield f"{kind}: all pods and a Job request {total + max(jobs)}, a node of the local overlay has {most}"


def _count_pods(resource: Resource, scaled: dict[str, Any]) -> int:
    """As many as there may be at once: when the autoscaler has done its most, and in a rolling update."""
    spec = resource["spec"]
    count = scaled.get(resource["metadata"]["name"], {}).get("maxReplicas", spec.get("replicas", 1))
    return int(count + spec.get("strategy", {}).get("rollingUpdate", {}).get("maxSurge", 0))


def _parse_cpu(text: str) -> int:
    """Thousandths of a CPU."""
    return int(text.removesuffix("m")) * (1 if text.endswith("m") else 1000)


def _parse_bytes(text: str) -> int:
    return int(text.removesuffix("Mi").removesuffix("Gi")) << UNITS[text[-2:]]


def _check_service(resources: list[Resource]) -> Iterator[str]:
    """What lets a pod of the service come and go without a failed request."""
    budgets = [one["spec"]["selector"]["matchLabels"] for one in _select("PodDisruptionBudget", resources)]
    for one in _select("Deployment", resources) + _select("StatefulSet", resources):
        spec, name = one["spec"], name_of(one)
        ((_, labels, pod),) = list_pods([one])
        if labels.get("app.kubernetes.io/name") != "serving":
            continue
        (box,) = pod["containers"]
        if one["kind"] == "Deployment" and spec["strategy"].get("rollingUpdate", {}).get("maxUnavailable") != 0:
            yield f"{name}: a rolling update takes pods away before others are ready"
        if not any(_matches(budget, labels) for budget in budgets):
            yield f"{name}: no PodDisruptionBudget is about it"
        if not any(_matches(rule["labelSelector"]["matchLabels"], labels)
                   for rule in pod.get("topologySpreadConstraints", [])):  # fmt: skip
            yield f"{name}: its pods may all lie on one node"
        for probe in {"startupProbe", "readinessProbe", "livenessProbe"} - box.keys():
            yield f"{name}: no {probe}"
        waits = _read_wait(box)
        needed = waits + REQUESTS_SECONDS + LAST_DRAIN_SECONDS + MARGIN_SECONDS
        if not waits or pod.get("terminationGracePeriodSeconds", 30) < needed:
            yield f"{name}: no time to drain when it ends"
        kept = {volume["name"] for volume in pod["volumes"]}
        if not any(mount["mountPath"] == "/state" and mount["name"] in kept for mount in box["volumeMounts"]):
            yield f"{name}: its spool lies on no volume"


def _read_wait(box: dict[str, Any]) -> int:
    """Seconds of preStop: endpoints forget the pod before it stops taking connections."""
    return int(box.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [0])[-1])


def _check_spools(resources: list[Resource]) -> Iterator[str]:
    """What waits in a spool goes with its pod: it must be drained in the grace time, and must not fill the volume."""
    (text,) = (found for one in _select("ConfigMap", resources) if (found := one["data"].get("production.yaml")))
    waiting_max = yaml.safe_load(text)["serving"]["spool_bytes_max"]
    for name, _, pod in list_pods(resources):
        limits = {one["name"]: one["emptyDir"]["sizeLimit"] for one in pod.get("volumes", []) if "emptyDir" in one}
        for box in pod["containers"]:
            for mount in box.get("volumeMounts", []):
                limit = limits.get(mount["name"]) if mount["mountPath"] == "/state" else None
                # the other half is for models, and for what a second brings
                if limit and 2 * waiting_max > _parse_bytes(limit):
                    yield f"{name}: serving.spool_bytes_max is more than half of its volume of {limit}"
                said = {one["name"]: one.get("value") for one in box.get("env", [])}
                bound = said.get("CLOSEDLOOP_SERVING__DRAIN_SECONDS_MAX", "inf")
                drains = pod.get("terminationGracePeriodSeconds", 30) - _read_wait(box) - REQUESTS_SECONDS
                if limit and float(bound) + MARGIN_SECONDS > min(LAST_DRAIN_SECONDS, drains):
                    yield f"{name}: it answers more than its last drain can store: DRAIN_SECONDS_MAX is {bound}"


def _check_autoscalers(resources: list[Resource]) -> Iterator[str]:
    targets = {name_of(one): one for one in resources}
    adapted = _list_adapted(resources)
    for scaler in _select("HorizontalPodAutoscaler", resources):
        spec, name = scaler["spec"], name_of(scaler)
        wanted = f"{spec['scaleTargetRef']['kind']} {spec['scaleTargetRef']['name']}"
        target = targets.get(wanted)
        if target is None:
            yield f"{name}: there is no {wanted}"
        elif "replicas" in target["spec"]:
            yield f"{name}: its target says how many replicas there are too"
        if not 2 <= spec["minReplicas"] <= spec["maxReplicas"] <= 10:
            yield f"{name}: {spec['minReplicas']} to {spec['maxReplicas']} replicas, allowed are 2 to 10"
        for metric in spec["metrics"]:
            if metric["type"] == "Pods" and metric["pods"]["metric"]["name"] not in adapted:
                yield f"{name}: prometheus-adapter gives no {metric['pods']['metric']['name']}"


def _list_adapted(resources: list[Resource]) -> set[str]:
    """What prometheus-adapter makes of the series that it is told of."""
    rules = yaml.safe_load(read_map("closedloop-prometheus-adapter", resources)["adapter.yaml"])["rules"]
    return {
        re.sub(rule["name"]["matches"], rule["name"]["as"].replace("$", "\\"), rule["seriesQuery"].split("{")[0])
        for rule in rules
    }


def _check_routes(resources: list[Resource]) -> Iterator[str]:
    rules = _select("DestinationRule", resources)
    subsets = {(rule["spec"]["host"], one["name"]): one["labels"] for rule in rules for one in rule["spec"]["subsets"]}
    pods = [labels for _, labels, _ in list_pods(resources)]
    services = {one["metadata"]["name"]: one["spec"]["ports"] for one in _select("Service", resources)}
    for service in _select("VirtualService", resources):
        for route in service["spec"]["http"]:
            where = f"{name_of(service)}, route {route['name']}"
            if sum(one["weight"] for one in route["route"]) != 100:
                yield f"{where}: the weights do not add up to 100"
            if route.get("retries") != {"attempts": 0}:
                yield f"{where}: what was answered late is asked, and logged, again"
            for one in route["route"]:
                aim = one["destination"]
                wanted = subsets.get((aim["host"], aim["subset"]))
                if wanted is None or not any(_matches(wanted, labels) for labels in pods):
                    yield f"{where}: subset {aim['subset']} of {aim['host']} has no pods"
                if aim["port"]["number"] not in [port["port"] for port in services.get(aim["host"], [])]:
                    yield f"{where}: {aim['host']} has no port {aim['port']['number']}"
    for route in _select("HTTPRoute", resources):
        for number, rule in enumerate(route["spec"]["rules"]):
            where = f"{name_of(route)}, rule {number}"
            if sum(one["weight"] for one in rule["backendRefs"]) != 100:
                yield f"{where}: the weights do not add up to 100"
            for one in rule["backendRefs"]:
                if one["port"] not in [port["port"] for port in services.get(one["name"], [])]:
                    yield f"{where}: there is no {one['name']}:{one['port']}"
    split = {"VirtualService": "istio", "HTTPRoute": "gateway"}
    found = {split[one["kind"]] for one in resources if one["kind"] in split}
    if found and {read_map("closedloop-environment", resources).get("CLOSEDLOOP_RELEASE__TRAFFIC", "row")} != found:
        yield f"release.traffic is not {' and '.join(sorted(found))}, which splits the requests"


def _check_waits(resources: list[Resource]) -> Iterator[str]:
    """A Job that waits for a retraining lives to tell how it ended; the check of a monitor comes before it."""
    from closedloop.config.settings import (
        RetrainingSettings,  # not for the stand-ins for programs, which must start at once
    )

    said = yaml.safe_load(read_map("closedloop-settings", resources)["production.yaml"])
    waits = RetrainingSettings(**said["retraining"]).timeout_seconds
    for job in _select("CronJob", resources):
        spec = job["spec"]["jobTemplate"]["spec"]
        (box,) = spec["template"]["spec"]["containers"]
        if re.search("closedloop (retrain|monitor)", box["args"][0]) and spec["activeDeadlineSeconds"] < waits + 1800:
            yield f"{name_of(job)}: it ends before retraining.timeout_seconds have passed"


def _check_rights(resources: list[Resource]) -> Iterator[str]:
    names = {(one["kind"].lower() + "s", one["metadata"]["name"]) for one in resources}
    for role in resources:
        if role["kind"].startswith("Cluster"):
            yield f"{name_of(role)}: nothing here needs rights in the whole cluster"
        if role["kind"] != "Role":
            continue
        for rule in role["rules"]:
            if role["metadata"]["name"] == CI_ROLE and set(rule["resources"]) <= CI_MAY.keys():
                extra = set(rule["verbs"]) - set.intersection(*(CI_MAY[kind] for kind in rule["resources"]))
                if extra:
                    yield f"{name_of(role)}: {', '.join(sorted(extra))} of {', '.join(rule['resources'])}"
                continue
            # to change a Deployment is to run any image with all that its pods may do
            changed = {"update"} if rule["resources"] in (["virtualservices"], ["httproutes"]) else set()
            if not rule.get("resourceNames") or set(rule["verbs"]) - {"get"} - changed:
                yield f"{name_of(role)}: more than to read objects by name, and to change the weights"
            for kind in rule["resources"]:
                for name in rule.get("resourceNames", []):
                    # without Istio the right leads nowhere
                    if (kind, name) not in names and kind != "virtualservices":
                        yield f"{name_of(role)}: there is no {name} among {kind}"
    bound = {subject["name"] for one in _select("RoleBinding", resources) for subject in one["subjects"]}
    for name, _, pod in list_pods(resources):
        if pod.get("automountServiceAccountToken", True) and pod.get("serviceAccountName") not in bound:
            yield f"{name}: mounts a token that opens nothing"
