"""Count the customers that a model failed to answer, from Prometheus or, without one, the service's metrics page."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request

from closedloop.errors import ServiceUnavailable

ERRORS = (
    "closedloop_model_failed_customers_total"  # counts customers, not rows: one customer may send a thousand requests
)
TIMEOUT_SECONDS = 5.0
SCRAPED_AFTER_SECONDS = 180.0  # a rate needs two scrapes after the service has loaded the version
RequestCounts = dict[str, float]


class ErrorCounts:
    """Errors by "version/variant".

    Parameters
    ----------
    prometheus
        The server's address; if it is empty, ``page`` is read, which shows only this host's service.
    matchers
        PromQL label matchers (the text between the braces) that select the service's series on that server.
    """

    def __init__(self, prometheus: str, page: str, matchers: str = "") -> None:
        self._prometheus, self._page = prometheus.rstrip("/"), page
        self._series = f"{ERRORS}{{{matchers}}}"

    def read_totals(self) -> RequestCounts:
        """Read the counts so far; empty with Prometheus, which gives `read_since` the difference directly."""
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

    def read_since(self, before: RequestCounts, seconds: float, *, version: str) -> RequestCounts:
        """Return the counts since the totals ``before``, which were read ``seconds`` ago.

        Raises
        ------
        ServiceUnavailable
            If the counts cannot be read, or if Prometheus has no series of ``version``. Workers export the series from
            their start, so it is missing only if the service is not scraped: that must not pass for "no errors".
        """
        if not self._prometheus:
            totals = self.read_totals()
            # a count below the earlier one was reset: it restarted from 0
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
