"""The weights of a VirtualService and of an HTTPRoute through a program called kubectl: no cluster can be had here."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from closedloop.adapters.kubectl import GatewaySplit, IstioSplit
from closedloop.config.settings import GatewaySettings, IstioSettings
from closedloop.errors import ConfigError, ServiceUnavailable

NOW = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
# get and replace as an API server answers them: a stale resourceVersion is a conflict, weights must be 100 in all
KUBECTL = """#!/bin/sh
cd "$(dirname "$0")"
echo "$@" >> calls
case "$1" in
  get) cat resource.json ;;
  replace) cat > new.json
    grep -q '"resourceVersion": "1"' new.json || { echo "Conflict: the object has been modified" >&2; exit 1; }
    mv new.json resource.json ;;
esac
"""


def describe(stable: int = 100, canary: int = 0, **changes: Any) -> dict[str, Any]:
    route = [
        {"destination": {"host": "churn", "subset": "stable"}, "weight": stable},
        {"destination": {"host": "churn", "subset": "canary"}, "weight": canary},
    ]
    other = {"match": [{"uri": {"prefix": "/docs"}}], "route": [{"destination": {"host": "docs"}}]}
    metadata = {"name": "churn", "resourceVersion": "1"} | changes
    return {"kind": "VirtualService", "metadata": metadata, "spec": {"http": [other, {"route": route}]}}


def describe_http_route(stable: int = 100, canary: int = 0) -> dict[str, Any]:
    both = [{"name": "serving-stable", "port": 3000}, {"name": "serving-canary", "port": 3000}]
    split = [one | {"weight": weight} for one, weight in zip(both, (stable, canary), strict=True)]
    forced = {"matches": [{"headers": [{"name": "x-model-version"}]}], "backendRefs": [both[0] | {"weight": 100}]}
    metadata = {"name": "churn", "resourceVersion": "1"}
    rules = [{"filters": []}, forced, {"backendRefs": split}]
    return {"kind": "HTTPRoute", "metadata": metadata, "spec": {"rules": rules}}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "kubectl").write_text(KUBECTL, encoding="utf-8")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "resource.json").write_text(json.dumps(describe()), encoding="utf-8")
    return tmp_path


SPLIT = IstioSplit(IstioSettings(virtual_service="churn", namespace="prod"))


def read(cluster: Path) -> Any:
    return json.loads((cluster / "resource.json").read_text(encoding="utf-8"))


def test_both_weights_are_set_in_one_write_and_nothing_else(cluster: Path) -> None:
    for canary, expected in ((5, (95, 5)), (25, (75, 25)), (50, (50, 50))):
        assert SPLIT.route(canary)
        assert read(cluster) == describe(*expected)
    SPLIT.route(0)
    assert read(cluster) == describe(100, 0)
    calls = (cluster / "calls").read_text(encoding="utf-8").splitlines()
    assert calls[:2] == [
        "get virtualservice.networking.istio.io churn --output=json --namespace=prod",
        "replace --filename=- --namespace=prod",
    ]
    assert len(calls) == 8


def test_an_http_routes_weights_are_set_likewise(cluster: Path) -> None:
    (cluster / "resource.json").write_text(json.dumps(describe_http_route()), encoding="utf-8")
    split = GatewaySplit(GatewaySettings(http_route="churn", namespace="prod"))
    assert not split.route(0)
    assert split.route(25)
    assert read(cluster) == describe_http_route(75, 25)
    calls = (cluster / "calls").read_text(encoding="utf-8").splitlines()
    assert calls[-2:] == [
        "get httproute.gateway.networking.k8s.io churn --output=json --namespace=prod",
        "replace --filename=- --namespace=prod",
    ]
    with pytest.raises(ConfigError, match="HTTPRoute closedloop has no rule for exactly the Services v1 and v2"):
        GatewaySplit(GatewaySettings(stable="v1", canary="v2")).route(5)


def test_what_is_so_already_is_not_written(cluster: Path) -> None:
    assert not SPLIT.route(0)
    assert "replace" not in (cluster / "calls").read_text(encoding="utf-8")


def test_one_who_was_overtaken_is_told(cluster: Path) -> None:
    (cluster / "resource.json").write_text(json.dumps(describe(resourceVersion="0")), encoding="utf-8")
    with pytest.raises(ServiceUnavailable, match="Conflict: the object has been modified"):
        SPLIT.route(5)


def test_a_service_without_such_a_route_is_refused(cluster: Path) -> None:
    with pytest.raises(ConfigError, match="no HTTP route to exactly the subsets v1 and v2"):
        IstioSplit(IstioSettings(stable="v1", canary="v2")).route(5)


def test_a_machine_without_kubectl_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServiceUnavailable, match="kubectl get virtualservice"):
        SPLIT.route(5)
