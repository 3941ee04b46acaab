"""Istio without Istio: Envoy configured as a VirtualService and a DestinationRule say, and a kubectl that does it.

Istio's control plane turns the two into Envoy's routes and clusters; here `tests.routes` does, for what the
manifests of this project use: header matches, subsets, weights and timeouts. Anything else is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.http_service import HttpService, wait_until
from tests.manifests import ROOT, Resource
from tests.programs import run_program
from tests.routes import ROUTES, write_routes
from tests.scripts import PYTHON_HEAD
from tests.services import find_free_port

FILTERS = "type.googleapis.com/envoy.extensions.filters"
DELAY_SECONDS = 5  # an API server, and proxies, that take their time
# get and replace as an API server answers them: whoever read an older version is told of a conflict
KUBECTL = f"""{PYTHON_HEAD}import json, pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.routes import RESOURCE, write_routes
folder = pathlib.Path(__file__).resolve().parent
old = json.loads((folder / RESOURCE).read_text())
if sys.argv[1] == "get":
    print(json.dumps(old))
elif sys.argv[1] == "replace":
    new = json.load(sys.stdin)
    if new["metadata"]["resourceVersion"] != old["metadata"]["resourceVersion"]:
        sys.exit("Conflict: the object has been modified")
    time.sleep({DELAY_SECONDS})
    write_routes(folder, new)
else:
    sys.exit("not understood: " + " ".join(sys.argv))
"""


def describe_envoy(folder: Path, rule: Resource, pods: dict[str, list[tuple[dict[str, str], int]]], port: int) -> Any:
    """Envoy with a cluster a subset: those pods of the rule's host, as labels and port, that have its labels."""
    clusters = []
    for subset in rule["spec"]["subsets"]:
        chosen = [port for labels, port in pods[rule["spec"]["host"]] if subset["labels"].items() <= labels.items()]
        ends = [{"endpoint": {"address": describe_address(one)}} for one in chosen]
        load = {"cluster_name": subset["name"], "endpoints": [{"lb_endpoints": ends}]}
        clusters.append({"name": subset["name"], "type": "STATIC", "load_assignment": load})
    manager = {
        "@type": f"{FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "rds": {
            "route_config_name": "istio",
            "config_source": {"path_config_source": {"path": str(folder / ROUTES)}, "resource_api_version": "V3"},
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{FILTERS}.http.router.v3.Router"},
            }
        ],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    listener = {"name": "http", "address": describe_address(port), "filter_chains": [{"filters": filters}]}
    node = {"id": "test", "cluster": "test"}
    return {"node": node, "static_resources": {"listeners": [listener], "clusters": clusters}}


def describe_address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


@contextmanager
def run_envoy(
    folder: Path, service: Resource, rule: Resource, pods: dict[str, list[tuple[dict[str, str], int]]]
) -> Iterator[HttpService]:
    """Envoy for the length of the block, with a program called kubectl in ``folder`` that changes its routes."""
    port = find_free_port()
    (folder / "kubectl").write_text(KUBECTL, encoding="utf-8")
    (folder / "kubectl").chmod(0o755)
    write_routes(folder, service)
    (folder / "envoy.json").write_text(json.dumps(describe_envoy(folder, rule, pods, port)), encoding="utf-8")
    options = ["-c", str(folder / "envoy.json"), "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "warn"]
    with run_program(folder / "envoy.log", "envoy", *options, cwd=folder) as process:
        proxy = HttpService(folder, port=port, headers={"host": service["spec"]["hosts"][0]})
        wait_until(lambda: process.poll() is not None or answers(proxy), "an answer through Envoy")
        assert process.poll() is None, (folder / "envoy.log").read_text(encoding="utf-8")
        yield proxy


def answers(proxy: HttpService) -> bool:
    try:
        return proxy.call("GET", "/health")[0] == 200
    except (OSError, ValueError):
        return False
