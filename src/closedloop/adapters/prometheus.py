"""Prometheus, or the service's own page where there is none: how many requests a model failed to answer."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request

from closedloop.errors import ServiceUnavailable

ERRORS = "model_errors_total"
TIMEOUT_SECONDS = 5.0
SCRAPED_AFTER_SECONDS = 180.0  # a rate takes two scrapes of a service that has taken up the version
Counts = dict[str, float]


class ErrorCounts:
    """Errors by "version/variant".

    Parameters
    ----------
    prometheus
        The server's address; empty: ``page`` is read, which shows this host's service alone.
    matchers
        Of the service's series on that server, as they stand between braces: it may know other services too.
    """

    def __init__(self, prometheus: str, page: str, matchers: str = "") -> None:
        self._prometheus, self._page = prometheus.rstrip("/"), page
        self._series = f"{ERRORS}{{{matchers}}}"

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

    def read_since(self, before: Counts, seconds: float, *, version: str) -> Counts:
        """What was counted since the totals ``before``, which were read so many seconds ago.

        Raises
        ------
        ServiceUnavailable
            If it cannot be read; or if Prometheus knows nothing of ``version``, whose workers show their errors from
            the first on: what is not scraped looks like a version without errors.
        """
        if not self._prometheus:
            totals = self.read_totals()
            # a count that is below what it was has begun anew
            return {name: now - was if now >= (was := before.get(name, 0.0)) else now for name, now in totals.items()}
        query = f"sum by (model_version, variant) (increase({self._series}[{max(int(seconds), 60)}s]))"
        address = f"{self._prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            series = json.loads(_fetch(address))["data"]["result"]
            found = {
                f"{one['metric']['model_version']}/{one['metric']['variant']}": float(one["value"][1]) for one in series
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ServiceUnavailable(f"{self._prometheus}: its answer is not Prometheus' ({error})") from error
        if seconds > SCRAPED_AFTER_SECONDS and not any(name.startswith(f"{version}/") for name in found):
            raise ServiceUnavailable(
                f"{self._prometheus}: it knows no {self._series} of version {version}; is the service scraped, and are "
                "release.prometheus_matchers right?"
            )
        return found


def _fetch(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310 - from the settings
            content: bytes = answer.read()
            return content
    except (OSError, ValueError) as error:
        raise ServiceUnavailable(f"metrics at {address.split('?')[0]}: {error}") from error
