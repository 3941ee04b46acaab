"""A request and its answer as ASGI has them, between a connection that reads and writes, and an application."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from closedloop.serving.http.connection import Connection

Asgi = Callable[[dict[str, Any], Any, Any], Awaitable[None]]
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class Exchange:
    """A request and its answer, as the application sees them."""

    def __init__(self, connection: Connection, scope: dict[str, Any], *, keep_alive: bool, expects: bool) -> None:
        self.scope, self.keep_alive = scope, keep_alive
        self.complete = self.answered = self.gone = self.succeeded = False
        self.parts: list[bytes] = []
        self._connection, self._expects, self._read = connection, expects, False
        self._head = b""
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Let `receive` look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def receive(self) -> dict[str, Any]:
        """The next piece of the body, or the client's end."""
        if self._expects:
            self._expects = False
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self._has_news():
            self._connection.advance()
        while not self._has_news():
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.gone:
            return {"type": "http.disconnect"}
        body = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        self.parts.clear()
        self._read = self.complete
        return {"type": "http.request", "body": body, "more_body": not self.complete}

    def _has_news(self) -> bool:
        return self.gone or (not self._read and bool(self.parts or self.complete))

    async def send(self, message: dict[str, Any]) -> None:
        """Write the answer; its head leaves together with the first piece of its body."""
        if self.gone:
            return
        if message["type"] == "http.response.start":
            fields = [b"%b: %b\r\n" % field for field in message["headers"]]
            self.succeeded = message["status"] < 400
            self._head = STATUS_LINES[message["status"]] + b"".join(fields)
            self._has_length = any(name.lower() == b"content-length" for name, _ in message["headers"])
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._head:
            if not self._has_length and not more:
                self._head += b"content-length: %d\r\n" % len(body)
            whole = self.complete or self._connection.rest_is_small
            if not (self.keep_alive and whole and (self._has_length or not more)):
                self.keep_alive = False
                self._head += b"connection: close\r\n"
            body, self._head = self._head + b"\r\n" + body, b""
        self._connection.write(body)
        if not more:
            self.answered = True
            self._connection.go_on()
