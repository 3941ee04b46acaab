"""Signed messages about verdicts, gates and releases to an address of the user's, as Standard Webhooks 1.0 has them."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import http.client
import json
import logging
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Literal

from closedloop.errors import hide_passwords

TIMEOUT_SECONDS = 5.0
Kind = Literal["monitor.verdict", "gate.failed", "release.moved"]
logger = logging.getLogger(__name__)


class Webhook:
    """Where messages go; without an address nothing is sent.

    A message is sent once. That it does not arrive is logged and stops nothing: checks and journal are the record.

    Parameters
    ----------
    url
        An http or https address, or "".
    secret
        ``whsec_`` and a key in base64; see the settings.
    clock
        The time of sending in seconds since 1970; receivers refuse old messages by it.
    """

    def __init__(self, url: str, secret: str, clock: Callable[[], float] = time.time) -> None:
        self._url, self._key, self._clock = url, base64.b64decode(secret.removeprefix("whsec_")), clock

    def tell(self, kind: Kind, identity: str, data: Mapping[str, Any], *, now: dt.datetime) -> None:
        """Send what happened at ``now``; one ``kind`` and ``identity`` have one id, by which receivers know repeats."""
        if not self._url:
            return
        identifier = f"msg_{hashlib.sha256(f'{kind} {identity}'.encode()).hexdigest()[:32]}"
        body = json.dumps({"type": kind, "timestamp": now.isoformat(), "data": dict(data)}).encode()
        sent_at = int(self._clock())
        signed = hmac.digest(self._key, b"%b.%d.%b" % (identifier.encode(), sent_at, body), "sha256")
        headers = {
            "content-type": "application/json",
            "user-agent": "closedloop",
            "webhook-id": identifier,
            "webhook-timestamp": str(sent_at),
            "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
        }
        request = urllib.request.Request(self._url, body, headers, method="POST")  # noqa: S310 - the operator's
        try:
            urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()  # noqa: S310
        except (OSError, http.client.HTTPException) as error:
            logger.error("webhook.url %s did not take %s: %s", hide_passwords(self._url), kind, error)
