"""The HTTP service, asked from outside."""

from __future__ import annotations

import http.client
import json
import urllib.request

TIMEOUT_SECONDS = 2.0


def read_health(address: str) -> str | None:
    """Which version the service at this address answers with ("" for none); None if it does not answer."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310 - the operator's
            return str(json.load(answer)["model_version"] or "")
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
