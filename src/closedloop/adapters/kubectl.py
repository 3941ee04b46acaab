"""kubectl: set the weights of a VirtualService or an HTTPRoute, which splits requests in place of the service."""

from __future__ import annotations

import json
import subprocess
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from closedloop.config.settings import GatewaySettings, IstioSettings
from closedloop.errors import ConfigError, ServiceUnavailable
from closedloop.processes import run_process

TIMEOUT_SECONDS = 30


Routes = list[list[tuple[str, dict[str, Any]]]]  # of each route the targets, by name


class TrafficSplit(ABC):
    """Sets the weights of the routes to two targets, the stable and the canary one."""

    kind: ClassVar[str]
    rule: ClassVar[str]  # what a resource must have

    def __init__(self, name: str, namespace: str, stable: str, canary: str) -> None:
        self._name, self._namespace, self._stable, self._canary = name, namespace, stable, canary

    @abstractmethod
    def list_routes(self, spec: dict[str, Any]) -> Routes:
        """Of each HTTP route the targets: each one's name, and the object that holds its weight."""

    def route(self, canary_percent: int) -> bool:
        """Set both weights in one write; return False if they already had these values.

        Raises
        ------
        ServiceUnavailable
            If kubectl fails, or another client wrote the resource between our read and write.
        ConfigError
            If no route has both targets.
        """
        wanted = {self._stable: 100 - canary_percent, self._canary: canary_percent}
        found = json.loads(self._run("get", self.kind, self._name, "--output=json"))
        routes = [route for route in self.list_routes(found["spec"]) if {name for name, _ in route} == set(wanted)]
        if not routes:
            raise ConfigError(f"{self.rule.format(self._name)} {self._stable} and {self._canary}")
        if all(target.get("weight") == wanted[name] for route in routes for name, target in route):
            return False
        for route in routes:
            for name, target in route:
                target["weight"] = wanted[name]
        self._run("replace", "--filename=-", content=json.dumps(found))  # with the resourceVersion that was read
        return True

    def _run(self, *arguments: str, content: str | None = None) -> str:
        command = ["kubectl", *arguments, f"--namespace={self._namespace}"]
        try:
            ran: subprocess.CompletedProcess[str] = run_process(
                command, input=content, capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS
            )
        except subprocess.CalledProcessError as error:
            raise ServiceUnavailable(f"{' '.join(command)}: {error.stderr.strip()}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ServiceUnavailable(f"{' '.join(command)}: {error}") from error
        return ran.stdout


class IstioSplit(TrafficSplit):
    """The weights of a VirtualService's subsets."""

    kind = "virtualservice.networking.istio.io"
    rule = "release.istio: VirtualService {} has no HTTP route to exactly the subsets"

    def __init__(self, settings: IstioSettings) -> None:
        super().__init__(settings.virtual_service, settings.namespace, settings.stable, settings.canary)

    def list_routes(self, spec: dict[str, Any]) -> Routes:
        """Of each route the destinations, by subset."""
        routes = [route.get("route", []) for route in spec.get("http", [])]
        return [[(one.get("destination", {}).get("subset", ""), one) for one in route] for route in routes]


class GatewaySplit(TrafficSplit):
    """The weights of an HTTPRoute's Services (Gateway API)."""

    kind = "httproute.gateway.networking.k8s.io"
    rule = "release.gateway: HTTPRoute {} has no rule for exactly the Services"

    def __init__(self, settings: GatewaySettings) -> None:
        super().__init__(settings.http_route, settings.namespace, settings.stable, settings.canary)

    def list_routes(self, spec: dict[str, Any]) -> Routes:
        """Of each rule the Services, by name."""
        return [[(one["name"], one) for one in rule.get("backendRefs", [])] for rule in spec.get("rules", [])]
