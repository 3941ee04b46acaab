"""kubectl: set the weights of an Istio VirtualService, which splits requests in place of the service."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from closedloop.config.settings import IstioSettings
from closedloop.errors import ConfigError, ServiceUnavailable
from closedloop.processes import run_process

TIMEOUT_SECONDS = 30


class IstioSplit:
    """Sets the weights of the route to the subsets ``stable`` and ``canary``."""

    def __init__(self, settings: IstioSettings) -> None:
        self._settings = settings

    def route(self, canary_percent: int) -> bool:
        """Set both weights in one write; return False if they already had these values.

        Raises
        ------
        ServiceUnavailable
            If kubectl fails, or another client wrote the resource between our read and write.
        ConfigError
            If no route has both subsets.
        """
        settings = self._settings
        wanted = {settings.stable: 100 - canary_percent, settings.canary: canary_percent}
        found = json.loads(self._run("get", "virtualservice", settings.virtual_service, "--output=json"))
        routes = [route["route"] for route in found["spec"].get("http", []) if find_subsets(route) == set(wanted)]
        if not routes:
            raise ConfigError(
                f"release.istio: VirtualService {settings.virtual_service} has no HTTP route to exactly the subsets "
                f"{settings.stable} and {settings.canary}"
            )
        if all(one.get("weight") == wanted[one["destination"]["subset"]] for route in routes for one in route):
            return False
        for route in routes:
            for one in route:
                one["weight"] = wanted[one["destination"]["subset"]]
        self._run("replace", "--filename=-", content=json.dumps(found))  # with the resourceVersion that was read
        return True

    def _run(self, *arguments: str, content: str | None = None) -> str:
        command = ["kubectl", *arguments, f"--namespace={self._settings.namespace}"]
        try:
            ran: subprocess.CompletedProcess[str] = run_process(
                command, input=content, capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS
            )
        except subprocess.CalledProcessError as error:
            raise ServiceUnavailable(f"{' '.join(command)}: {error.stderr.strip()}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ServiceUnavailable(f"{' '.join(command)}: {error}") from error
        return ran.stdout


def find_subsets(route: dict[str, Any]) -> set[str]:
    """The subsets that an HTTP route of a VirtualService sends requests to."""
    return {one.get("destination", {}).get("subset", "") for one in route.get("route", [])}
