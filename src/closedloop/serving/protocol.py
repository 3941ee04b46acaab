"""One connection, as uvicorn reads HTTP from it, with the limits that uvicorn lacks: a head's size, and time.

A request that does not end within seconds, an answer that is not fetched and a connection without any request all
hold memory and a descriptor: they are cut off. It costs one timer a connection and one look-up a piece of data.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from closedloop.serving.exchange import refuse
from closedloop.serving.requests import RefusedRequest

HEAD_BYTES_MAX, HEADERS_MAX = 65_536, 100


class Connection(HttpToolsProtocol):
    """See the module; refusals before there is a request have the documented shape too."""

    exchange_seconds = 30.0  # cut off after once to twice as long
    _seen: Any = ()
    _watch: asyncio.TimerHandle | None = None
    _running: Any = None
    _open_head: Any = None
    _open_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch."""
        super().connection_made(transport)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """End to watch."""
        if self._watch is not None:
            self._watch.cancel()
        self._forget()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Cut off where no other request has begun since the last look; each has a list of headers of its own."""
        if self.headers is self._seen:
            self._forget()
            self.transport.abort()
            return
        self._seen = self.headers
        self._watch = self.loop.call_later(self.exchange_seconds, self._look)

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse a head that does not end; its first piece is limited by the size of a read."""
        self._unset_keepalive_if_required()
        while True:
            try:
                self.parser.feed_data(data)
                break
            except HttpParserError:
                self._refuse(400, "invalid_http", "the request is not HTTP/1.1")
                return
            except HttpParserUpgrade as upgrade:
                rest = data[upgrade.args[0] :]
            if self.parser.get_method() == b"CONNECT":
                self._refuse(405, "method_not_allowed", "this is no proxy")
                return
            data = self._ignore_upgrade(rest)
        scope: Any = self.scope
        if scope is None or "path" in scope:
            return
        if scope is not self._open_head:
            self._open_head, self._open_bytes = scope, 0
        else:
            self._open_bytes += len(data)
        if self._open_bytes > HEAD_BYTES_MAX:
            self._refuse(431, "head_too_large", f"a request's head may have {HEAD_BYTES_MAX} bytes")

    def on_headers_complete(self) -> None:
        """Refuse a head of too many fields: what is raised here makes it an invalid request."""
        if len(self.headers) > HEADERS_MAX:
            raise ValueError(f"{len(self.headers)} header fields")
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Remember which of several requests in a row is being answered."""
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _forget(self) -> None:
        """Let nobody answer any more: uvicorn tells only the last request in a row, and the others would fail."""
        self.pipeline.clear()
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()

    def _should_upgrade(self) -> bool:
        """Let uvicorn put off a request that asks for an upgrade, as Java's client does with every first one."""
        return True

    def _ignore_upgrade(self, rest: bytes) -> bytes:
        """The request as one that did not ask, for a new parser: the old one takes ``rest`` for another protocol."""
        method = self.parser.get_method()
        fields = [b"%b: %b\r\n" % field for field in self.headers if field[0] not in (b"connection", b"upgrade")]
        self.parser = HttpRequestParser(self)
        return b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method, self.url, b"".join(fields), rest)

    def _refuse(self, status: int, code: str, message: str) -> None:
        answer = refuse(RefusedRequest(code, message, status=status), os.urandom(8).hex())
        head = b"content-type: %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % (answer.kind, len(answer.body))
        self._forget()
        self.transport.write(STATUS_LINE[status] + head + answer.body)
        self.transport.close()
