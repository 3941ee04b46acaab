"""A VirtualService as Envoy's routes: what the stand-in for kubectl needs, which must start at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Resource = dict[str, Any]
RESOURCE, ROUTES = "virtualservice.json", "routes.json"


def describe_routes(service: Resource) -> dict[str, Any]:
    """Envoy's routes of a VirtualService."""
    routes = []
    for http in service["spec"]["http"]:
        if set(http) - {"name", "match", "route", "timeout", "retries"} or http.get("retries", {}).get("attempts", 0):
            raise ValueError(f"route {http['name']}: {sorted(http)} cannot be said to Envoy here")
        clusters = [{"name": one["destination"]["subset"], "weight": one["weight"]} for one in http["route"]]
        action = {"weighted_clusters": {"clusters": clusters}, "timeout": http["timeout"]}
        for match in http.get("match", [{"headers": {}}]):
            headers = [
                {"name": name, "string_match": {"safe_regex": {"regex": rule["regex"]}}}
                for name, rule in match["headers"].items()
            ]
            routes.append({"match": {"prefix": "/", "headers": headers}, "route": action})
    host = {"name": service["metadata"]["name"], "domains": service["spec"]["hosts"], "routes": routes}
    return {
        "version_info": str(service["metadata"]["resourceVersion"]),
        "resources": [
            {
                "@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
                "name": "istio",
                "virtual_hosts": [host],
            }
        ],
    }


def write_routes(folder: Path, service: Resource) -> None:
    """Store the resource under its next version, and let Envoy have it."""
    service["metadata"]["resourceVersion"] = str(int(service["metadata"].get("resourceVersion", 0)) + 1)
    for name, content in ((RESOURCE, service), (ROUTES, describe_routes(service))):
        (folder / f"{name}.new").write_text(json.dumps(content), encoding="utf-8")
        (folder / f"{name}.new").replace(folder / name)  # Envoy sees a file that was moved there
