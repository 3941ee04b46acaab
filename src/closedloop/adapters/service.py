"""A client of the HTTP service."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import NamedTuple

TIMEOUT_SECONDS = 2.0


class ServiceHealth(NamedTuple):
    """The model that a service says it has loaded: version "" is none, and None means that no service of ours answers.

    ``model_name`` and ``folder_sha256`` are "" where the service does not say.
    """

    model_version: str | None = None
    model_name: str = ""
    folder_sha256: str = ""


def read_health(address: str) -> ServiceHealth | None:
    """The health of the service at this address; None if nothing listens there."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310 - the operator's
            found = json.load(answer)
            known = [str(found.get(name) or "") for name in ("model_version", "model_name", "folder_sha256")]
            return ServiceHealth(*known) if "model_version" in found else ServiceHealth()
    except urllib.error.HTTPError:
        return ServiceHealth()
    except (http.client.HTTPException, ValueError, AttributeError, TypeError):
        return ServiceHealth()
    except OSError:
        return None
