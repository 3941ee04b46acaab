"""One HTTP exchange: what came, read within limits, and what goes back, refusals in one documented shape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from closedloop.rules import Breach, RefusedRequest, shorten
from closedloop.serving.http.answers import Refusal, encode, error_of

BODY_SECONDS = 10.0
TOO_SLOW = "too slow"
JSON = b"application/json"
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Call(msgspec.Struct):
    """One HTTP request: lower-case headers, when all of it had come, its own id until it names one, and its client."""

    headers: Mapping[bytes, bytes]
    receive: Receive
    arrived: float
    request_id: str
    client: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """The answer; the ids of a prediction are for the access log."""

    body: bytes
    status: int = 200
    kind: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()
    request_id: str = ""
    prediction_id: str = ""


class ClientGone(Exception):
    """The client has closed its connection before it sent all of its request."""


async def read_body(call: Call, bytes_max: int) -> bytes:
    """The whole body, or a refusal when it is something else than JSON, too large, or comes too slowly.

    Only now has the request come: how long a client takes to send it says nothing of this service.
    """
    kind = call.headers.get(b"content-type", JSON)
    if kind != JSON and kind.partition(b";")[0].strip().lower() != JSON:
        rule = Breach("content-type", shorten(kind.decode("latin-1")), "application/json")
        raise RefusedRequest("unsupported_type", "a body is JSON, and says so", (rule,), status=415)
    declared = call.headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared[:20]) > bytes_max:
        raise refuse_length(bytes_max)
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - narrows the type
    # a third of what asyncio.timeout costs, which every request would pay
    timer = asyncio.get_running_loop().call_later(BODY_SECONDS, task.cancel, TOO_SLOW)
    parts, size = [], 0
    try:
        while True:
            message = await call.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > bytes_max:
                raise refuse_length(bytes_max)
            if not message.get("more_body"):
                call.arrived = time.perf_counter()
                return parts[0] if len(parts) == 1 else b"".join(parts)
    except asyncio.CancelledError as cancelled:
        if cancelled.args != (TOO_SLOW,):
            raise
        task.uncancel()
        raise RefusedRequest("timeout", f"the body did not come in {BODY_SECONDS:g} s", status=408) from None
    finally:
        timer.cancel()


def refuse_length(bytes_max: int) -> RefusedRequest:
    """The refusal of a body that is too large."""
    return RefusedRequest("too_large", f"a body may have {bytes_max} bytes", status=413)


def refuse(refused: RefusedRequest, request_id: str) -> Answer:
    """A refusal as an answer."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if refused.retry_after:
        headers = ((b"retry-after", str(refused.retry_after).encode()),)
    if refused.status == 401:
        headers = (*headers, (b"www-authenticate", b"Bearer"))
    return Answer(encode(Refusal(error_of(refused), request_id)), refused.status, headers=headers)


async def send_answer(answer: Answer, send: Send, *, method: str) -> None:
    """Send an answer by ASGI; HEAD gets no body."""
    head = [(b"content-type", answer.kind), (b"content-length", b"%d" % len(answer.body)), *answer.headers]
    await send({"type": "http.response.start", "status": answer.status, "headers": head})
    await send({"type": "http.response.body", "body": answer.body if method != "HEAD" else b""})
