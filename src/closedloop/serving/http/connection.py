"""One HTTP/1.1 connection: httptools parses it, this class bounds what a client may hold, and uvicorn runs the server.

Of one connection there is at most one request at a time, one read of the socket ahead of it, and one answer that the
client has not fetched. A client that lets the server wait is cut off, and while there are as many connections as there
may be, the one that let it wait longest makes room for the next. docs/decisions/0007-http-connections.md says which
servers were measured, and why none of them is used for this.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from typing import Any
from urllib.parse import unquote
from weakref import WeakKeyDictionary

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url

from closedloop.rules import RefusedRequest
from closedloop.serving.http.asgi import STATUS_LINES, Asgi, Exchange
from closedloop.serving.http.exchange import refuse
from closedloop.serving.http.order import Order

HEAD_BYTES_MAX, HEADERS_MAX = 65_536, 100
RIGHT = b"authorization"
READ_BYTES = 65_536
CONNECTIONS_MAX, OTHER_DESCRIPTORS = 1_000, 128
LINGER_SECONDS, LINGER_BYTES = 5.0, 8_000_000  # a client that still sends might lose a refusal that is closed at once
DRAIN_SECONDS = 1.0  # for a connection that is kept alive to ask once more, and be told that it closes

logger = logging.getLogger(__name__)


def raise_descriptor_limit() -> int:
    """Let this process have as many descriptors as it may, and return how many connections leave some for the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS_MAX + OTHER_DESCRIPTORS
    if 0 <= soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return CONNECTIONS_MAX if soft < 0 else max(min(CONNECTIONS_MAX, soft - OTHER_DESCRIPTORS), 16)


_ORDERS: WeakKeyDictionary[Any, Order] = WeakKeyDictionary()  # by the state of uvicorn's server


class Connection(asyncio.BufferedProtocol):
    """One connection, as uvicorn makes it (its setting ``http``); see the module for its limits."""

    exchange_seconds = 30.0  # cut off after once to twice as long
    connections_max = CONNECTIONS_MAX
    _view = memoryview(bytearray(READ_BYTES))  # of all: a piece is copied before the loop reads the next

    def __init__(self, config: Any, server_state: Any, **_: Any) -> None:
        self._app: Asgi = config.loaded_app
        self._state = server_state
        self._order = _ORDERS.setdefault(server_state, Order())
        self._loop = asyncio.get_running_loop()
        self._unread = self._tail = b""
        self._exchange: Exchange | None = None
        self._body_left: int | None = None  # None: chunks
        self._bytes_since_body = self._dropped_bytes = self._begun = 0
        self._surplus = self._lingering = self._draining = self._paused = False
        self._can_write = True

    def connection_made(self, transport: Any) -> None:
        """Begin to watch; where there are too many, end the one that let the server wait longest."""
        self._transport: asyncio.Transport = transport
        self._client, self._server = (transport.get_extra_info(name) for name in ("peername", "sockname"))
        self._parser: Any = HttpRequestParser(self)
        self._state.connections.add(self)
        self._order.add(self)
        if len(self._state.connections) > self.connections_max:
            self._order.find_next(self.connections_max).abort()
        self._seen = -1
        self._look()

    def connection_lost(self, _: Exception | None) -> None:
        """Stop watching, and tell the application that the client has gone."""
        self._watch.cancel()
        self._leave()
        self._parser = None  # it knows this object, and the collector would find the two late
        self._drop()

    def shutdown(self) -> None:
        """The server is about to end: answer what was asked, and say in the answer that the connection closes."""
        self._draining = True
        if self._exchange is not None:
            self._exchange.keep_alive = False
        self._loop.call_later(DRAIN_SECONDS, self._close_idle)

    def abort(self) -> None:
        """End at once, whatever is unanswered."""
        self._leave()
        self._drop()
        self._transport.abort()

    def pause_writing(self) -> None:
        """The client does not fetch its answers: begin no other request."""
        self._can_write = False

    def resume_writing(self) -> None:
        """It did."""
        self._can_write = True
        self.advance()

    def eof_received(self) -> bool:
        """Answer a client that has sent all it wants to; a half request is dropped."""
        if self._exchange is None or not self._exchange.complete:
            return False
        self._exchange.keep_alive = False
        return True

    def get_buffer(self, _: int) -> memoryview:
        """Where the loop puts what it reads."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Parse what was read, as far as it is of one request."""
        if self._lingering:
            self._dropped_bytes += nbytes
            if self._dropped_bytes > LINGER_BYTES:
                self._transport.abort()
        else:
            data = bytes(self._view[:nbytes])
            self._unread = self._unread + data if self._unread else data
            self.advance()

    def write(self, data: bytes) -> None:
        """Hand bytes to the client."""
        self._transport.write(data)

    @property
    def rest_is_small(self) -> bool:
        """Whether the rest of an unread body can be dropped, so that the connection stays."""
        return self._body_left is not None and self._body_left <= READ_BYTES

    def go_on(self) -> None:
        """The application has answered: close, or take the next request."""
        exchange = self._exchange
        if exchange is not None and exchange.keep_alive:
            if exchange.succeeded:
                self._order.trust(self)
            exchange.parts.clear()
            if exchange.complete:
                self._exchange = None
            self.advance()
        elif exchange is not None and exchange.complete and not self._unread:
            self._leave()
            self._transport.close()
        else:
            self._linger()

    # --- what the parser calls

    def on_message_begin(self) -> None:
        """A request begins; one in the same piece after chunks is not read, and its connection closes."""
        if self._exchange is not None:
            self._surplus, self._exchange.keep_alive = True, False
            return
        self._url, self._in_head = b"", True
        self._fields: list[tuple[bytes, bytes]] = []
        self._begun += 1

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        if not self._surplus:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head; a trailer counts for nothing."""
        if self._in_head and not self._surplus:
            name = name.lower()
            if name == RIGHT and any(known == RIGHT for known, _ in self._fields):
                raise ValueError("two tokens: a proxy may have judged the other one")
            self._fields.append((name, value))
            if len(self._fields) > HEADERS_MAX:
                raise ValueError(f"more than {HEADERS_MAX} header fields")

    def on_headers_complete(self) -> None:
        """Let the application answer; what it does not read of the body waits in the socket."""
        if self._surplus:
            return
        self._in_head, parser = False, self._parser
        if parser.should_upgrade():
            return  # the parser takes what follows for another protocol: see `advance`
        url = parse_url(self._url)
        path = (url.path or b"/").decode("ascii")
        fields = dict(self._fields)
        chunked = b"transfer-encoding" in fields
        self._body_left = None if chunked else int(fields.get(b"content-length", b"0"))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": parser.get_http_version(),
            "method": parser.get_method().decode("ascii"),
            "scheme": "http",
            "path": unquote(path) if "%" in path else path,
            "raw_path": url.path or b"/",
            "query_string": url.query or b"",
            "root_path": "",
            "headers": self._fields,
            "client": self._client,
            "server": self._server,
        }
        keep_alive = parser.should_keep_alive() and not self._draining
        expects = fields.get(b"expect", b"").lower() == b"100-continue"
        self._exchange = Exchange(self, scope, keep_alive=keep_alive, expects=expects)
        task = self._loop.create_task(self._run(self._exchange))
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._bytes_since_body = 0
        exchange = self._exchange
        if exchange is not None and not (exchange.answered or self._surplus):
            exchange.parts.append(body)
            exchange.wake()

    def on_message_complete(self) -> None:
        """The request is whole: its connection is the last to make room for others."""
        self._bytes_since_body = 0
        exchange = self._exchange
        if exchange is not None and not self._surplus:
            exchange.complete = True
            exchange.wake()
            if exchange.answered:
                self._exchange = None

    # --- inside

    async def _run(self, exchange: Exchange) -> None:
        try:
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except Exception:
            logger.exception("the application failed")
        if not exchange.answered and not exchange.gone:
            self.abort()

    def advance(self) -> None:
        """Feed the parser what belongs to one request; the rest waits until that is answered, and is fetched."""
        while self._unread and not self._lingering:
            exchange = self._exchange
            if (exchange is not None and (exchange.complete or exchange.parts)) or not self._can_write:
                if not self._paused:
                    self._paused = True
                    self._transport.pause_reading()
                return
            piece = self._cut()
            self._bytes_since_body += len(piece)
            try:
                self._parser.feed_data(piece)
            except HttpParserUpgrade:
                self._ignore_upgrade()
            except HttpParserError:
                self._refuse(400, "invalid_http", "the request is not HTTP/1.1")
            if self._bytes_since_body > HEAD_BYTES_MAX:
                self._refuse(431, "head_too_large", f"a head, or trailers, may have {HEAD_BYTES_MAX} bytes")
        self._read_on()

    def _read_on(self) -> None:
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    def _cut(self) -> bytes:
        """Take from the unread bytes what is of the head or body at hand."""
        unread, size = self._unread, len(self._unread)
        if self._exchange is None:
            end = (self._tail + unread).find(b"\r\n\r\n")
            if end >= 0:
                size, self._tail = end + 4 - len(self._tail), b""
            else:
                self._tail = (self._tail + unread)[-3:]
        elif self._body_left is not None:
            size = min(size, self._body_left)
            self._body_left -= size
        self._unread = unread[size:]
        return unread[:size]

    def _ignore_upgrade(self) -> None:
        """Read the request again as one that did not ask for another protocol, as Java's client does with its first."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._refuse(405, "method_not_allowed", "this is no proxy")
            return
        fields = [b"%b: %b\r\n" % field for field in self._fields if field[0] not in (b"connection", b"upgrade")]
        self._parser = HttpRequestParser(self)
        self._parser.feed_data(b"%b %b HTTP/1.1\r\n%b\r\n" % (method, self._url, b"".join(fields)))

    def _look(self) -> None:
        """Cut off where no other request has begun since the last look."""
        if self._begun == self._seen:
            self.abort()
            return
        self._seen = self._begun
        self._watch = self._loop.call_later(self.exchange_seconds, self._look)

    def _refuse(self, status: int, code: str, message: str) -> None:
        if self._lingering:
            return
        answer = refuse(RefusedRequest(code, message, status=status), os.urandom(8).hex())
        head = b"content-type: %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % (answer.kind, len(answer.body))
        self.write(STATUS_LINES[status] + head + answer.body)
        self._linger()

    def _linger(self) -> None:
        """Close once the client does, or after a while; what it still sends is dropped."""
        self._leave()
        self._lingering, self._unread = True, b""
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()
        self._read_on()
        self._loop.call_later(LINGER_SECONDS, self._transport.abort)

    def _close_idle(self) -> None:
        if self._exchange is None and not self._transport.is_closing():
            self._leave()
            self._transport.close()

    def _drop(self) -> None:
        self._state.connections.discard(self)
        self._order.remove(self)

    def _leave(self) -> None:
        """Tell the application that the client no longer waits for its answer."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None and not exchange.answered:
            exchange.gone = True
            exchange.wake()
