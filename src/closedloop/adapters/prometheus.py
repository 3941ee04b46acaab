"""Prometheus, or the service's own page where there is none: how many requests a model failed to answer."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request

from closedloop.errors import ServiceUnavailable

ERRORS = "model_errors_total"
TIMEOUT_SECONDS = 5.0
Counts = dict[str, float]


class ErrorCounts:
    """Errors by "version/variant".

    Parameters
    ----------
    prometheus
        The server's address; empty: ``page`` is read, which shows this host's service alone.
    """

    def __init__(self, prometheus: str, page: str) -> None:
        self._prometheus, self._page = prometheus.rstrip("/"), page

    def read_totals(self) -> Counts:
        """What has been counted so far; of Prometheus nothing, since `read_since` asks it for the difference."""
        if self._prometheus:
            return {}
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(_fetch(self._page).decode())
        return {
            f"{sample.labels['model_version']}/{sample.labels['variant']}": sample.value
            for family in families
            for sample in family.samples
            if sample.name == ERRORS
        }

    def read_since(self, before: Counts, seconds: float) -> Counts:
        """What was counted since the totals ``before``, which were read so many seconds ago."""
        if not self._prometheus:
            return {name: max(now - before.get(name, 0.0), 0.0) for name, now in self.read_totals().items()}
        query = f"sum by (model_version, variant) (increase({ERRORS}[{max(int(seconds), 60)}s]))"
        address = f"{self._prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            series = json.loads(_fetch(address))["data"]["result"]
            return {
                f"{one['metric']['model_version']}/{one['metric']['variant']}": float(one["value"][1]) for one in series
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ServiceUnavailable(f"{self._prometheus}: its answer is not Prometheus' ({error})") from error


def _fetch(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310 - from the settings
            content: bytes = answer.read()
            return content
    except (OSError, ValueError) as error:
        raise ServiceUnavailable(f"metrics at {address.split('?')[0]}: {error}") from error
