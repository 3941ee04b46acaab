"""A connection's limits, on a real server in this process that answers every request with its method and body."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import pytest
import uvicorn

from closedloop.serving.protocol import HEAD_BYTES_MAX, HEADERS_MAX, Connection

HASTY_SECONDS = 0.25


class Hasty(Connection):
    exchange_seconds = HASTY_SECONDS


class Watched(Connection):
    """Its timer runs out after each piece of data, however long that took."""

    exchange_seconds = 3600

    def data_received(self, data):
        super().data_received(data)
        self._watch.cancel()
        self._look()


class Whole(Connection):
    """Takes all that comes up to the last request in one piece, however the network cuts it."""

    kept = b""

    def data_received(self, data):
        self.kept += data
        if self.kept.endswith(LAST):
            data, self.kept = self.kept, b""
            super().data_received(data)


async def echo(scope, receive, send):
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
    content = scope["method"].encode() + b" " + body
    if scope["path"] == "/large":
        content = bytes(50_000_000)
    length = (b"content-length", str(len(content)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": content})


@contextlib.contextmanager
def run_server(protocol):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(echo, http=protocol, ws="none", lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname(), server
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address():
    with run_server(Connection) as (address, _):
        yield address


@pytest.fixture(scope="module")
def hasty():
    with run_server(Hasty) as found:
        yield found


def read_all(client):
    """What comes until the server closes."""
    content = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65_536):
            content += piece
    return content


def ask(address, *pieces):
    """Everything that is answered until the server closes; a last request asks it to."""
    with socket.create_connection(address, timeout=180) as client:
        with contextlib.suppress(ConnectionError):  # it may have closed already
            for piece in pieces:
                client.sendall(piece)
        return read_all(client)


LAST = b"GET /last HTTP/1.1\r\nConnection: close\r\n\r\n"


def test_requests_are_read_as_ever(address):
    post = b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"
    answers = ask(address, post[:10], post[10:40], post[40:] + post, LAST)
    assert answers.count(b"POST abc") == 2
    assert answers.endswith(b"GET ")


@pytest.mark.parametrize(
    ("pieces", "status", "code"),
    [
        ([b"\x16\x03\x01\x02\x00\x01"], 400, "invalid_http"),
        ([b"GET /\xc3\xa9 HTTP/1.1\r\n\r\n"], 400, "invalid_http"),
        ([b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (HEADERS_MAX + 1) + b"\r\n"], 400, "invalid_http"),
        ([b"GET / HTTP/1.1\r\na: ", *[b"x" * 60_000] * 20], 431, "head_too_large"),
        ([b"GET /", *[b"x" * 60_000] * 20], 431, "head_too_large"),
        ([b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"], 400, "invalid_http"),
        ([b"CONNECT a:443 HTTP/1.1\r\n\r\n"], 405, "method_not_allowed"),
    ],
)
def test_what_is_no_request_is_refused_in_the_documented_shape(address, pieces, status, code):
    head, _, body = ask(address, *pieces).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"connection: close" in head
    answer = json.loads(body)
    assert answer["error"]["code"] == code
    assert answer.keys() == {"error", "request_id"}


def test_a_head_and_a_body_that_are_within_limits_pass(address):
    head = b"POST / HTTP/1.1\r\n" + b"a: b\r\n" * (HEADERS_MAX - 2) + b"c: " + b"x" * (HEAD_BYTES_MAX - 2_000)
    body = b"x" * 10 * HEAD_BYTES_MAX
    answers = ask(address, head, b"\r\nContent-Length: %d\r\n\r\n" % len(body), body + LAST[:5], LAST[5:])
    assert b"POST " + body in answers
    assert answers.endswith(b"GET ")


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket"])
def test_a_wish_to_upgrade_is_not_granted_and_costs_nothing(address, upgrade):
    head = b"POST / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: " + upgrade + b"\r\nContent-Length: 3\r\n\r\n"
    answers = ask(address, head + b"abc" + head + b"ab", b"c" + LAST)
    assert answers.count(b"POST abc") == 2
    assert answers.endswith(b"GET ")


def test_any_number_of_wishes_to_upgrade_may_come_at_once():
    wish = b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    with run_server(Whole) as (address, _):
        answers = ask(address, wish * 1_500, LAST)
    assert answers.count(b"GET ") == 1_501


@pytest.mark.thorough
@pytest.mark.parametrize(
    "start", [b"", b"GET / HT", b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\na", LAST[:-2] + b"a: "]
)
def test_a_client_that_never_ends_is_cut_off(hasty, start):
    address, server = hasty
    with socket.create_connection(address, timeout=180) as client:
        client.sendall(start)
        assert read_all(client) == b""
    assert not server.server_state.connections


@pytest.mark.thorough
def test_a_client_that_drips_is_cut_off(hasty):
    address, _ = hasty
    with socket.create_connection(address, timeout=180) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")

        def drip():
            for _ in range(1_000):
                client.sendall(b"a: b\r\n")
                time.sleep(HASTY_SECONDS / 10)

        with pytest.raises(ConnectionError):
            drip()


@pytest.mark.thorough
def test_a_client_that_fetches_no_answer_is_cut_off(hasty):
    address, server = hasty
    with socket.create_connection(address, timeout=180) as client:
        client.sendall(b"GET /large HTTP/1.1\r\n\r\n")
        deadline = time.monotonic() + 20
        while not server.server_state.connections:
            assert time.monotonic() < deadline
        while server.server_state.connections:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_client_that_goes_on_asking_is_not_cut_off():
    with run_server(Watched) as (address, _), socket.create_connection(address, timeout=180) as client:
        for _ in range(20):
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            answer = b""
            while not answer.endswith(b"GET "):
                piece = client.recv(1000)
                assert piece, "cut off"
                answer += piece
