"""A connection's limits, on a real server in this process that answers every request with its method and body."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest
import uvicorn

from closedloop.serving.http.connection import HEAD_BYTES_MAX, HEADERS_MAX, Connection

HASTY_SECONDS = 0.25


class Hasty(Connection):
    exchange_seconds = HASTY_SECONDS


async def echo(scope, receive, send):
    body, more = b"", scope["path"] != "/early"
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
    content = scope["method"].encode() + b" " + body
    if scope["path"] == "/fields":
        content = json.dumps([[part.decode() for part in field] for field in scope["headers"]]).encode()
    if scope["path"] == "/early":
        content = b"early"
    if scope["path"] == "/large":
        content = bytes(50_000_000)
    length = (b"content-length", str(len(content)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": content})


@contextlib.contextmanager
def run_server(protocol, app=echo):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_level="critical"))
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
        ([b"GET / HTTP/1.1\r\nAuthorization: Bearer a\r\nauthorization: Bearer b\r\n\r\n"], 400, "invalid_http"),
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
    with run_server(Connection) as (address, _):
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


@pytest.mark.thorough
def test_a_client_that_goes_on_asking_is_not_cut_off(hasty):
    address, _ = hasty
    with socket.create_connection(address, timeout=180) as client:
        for _ in range(20):
            assert ask_once(client).endswith(b"GET ")
            time.sleep(HASTY_SECONDS / 5)


def ask_once(client):
    client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    answer = b""
    while not answer.endswith(b"GET "):
        piece = client.recv(1000)
        assert piece, "cut off"
        answer += piece
    return answer


TRAILERS = b"GET /fields HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n1\r\na\r\n0\r\n"


def test_a_trailer_is_no_header(address):
    fields = json.loads(ask(address, TRAILERS + b"Authorization: Bearer x\r\n\r\n").partition(b"\r\n\r\n")[2])
    assert [name for name, _ in fields] == ["transfer-encoding", "connection"]


@pytest.mark.parametrize(
    "endless",
    [
        TRAILERS + b"a: b\r\n" * 30_000,
        TRAILERS + b"a: " + b"b" * 200_000,
        TRAILERS[:-3] + b"1;" + b"x" * 200_000,
    ],
)
def test_trailers_and_extensions_of_chunks_that_do_not_end_are_refused(address, endless):
    assert ask(address, endless).startswith(b"HTTP/1.1 431 ")


def test_what_is_sent_after_a_refusal_is_read_for_a_while_and_no_longer(address):
    with socket.create_connection(address, timeout=180) as client:
        client.sendall(TRAILERS)
        with pytest.raises(ConnectionError):  # noqa: PT012 - it depends on the network which piece is the last
            while True:
                client.sendall(b"a: b\r\n" * 100_000)


def test_of_requests_in_a_row_one_is_begun_at_a_time():
    """The rest waits unread: it is the client's memory, and not the server's."""
    begun, answer = [], asyncio.Event()

    async def wait(scope, receive, send):
        begun.append(scope["path"])
        await answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    with run_server(Connection, wait) as (address, server), socket.create_connection(address, timeout=60) as client:
        client.setblocking(False)
        requests, stalled = b"GET /1 HTTP/1.1\r\n\r\n" * 1_000, 0
        while stalled < 20:  # until no more is taken
            try:
                client.send(requests)
                stalled = 0
            except BlockingIOError:
                stalled += 1
                time.sleep(0.02)
        assert begun == ["/1"]
        server.servers[0].get_loop().call_soon_threadsafe(answer.set)
        client.setblocking(True)
        client.settimeout(60)
        found = b""
        while found.count(b"/1") < 500:
            found += client.recv(65_536)


def test_while_a_client_does_not_fetch_its_answer_no_other_request_of_it_is_begun():
    """Else the answers of all its requests would lie in the server's memory."""
    begun, answered, size = [], threading.Event(), 20_000_000

    async def answer(scope, receive, send):
        begun.append(scope["path"])
        body = bytes(size if scope["path"] != "/other" else 0)
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})
        answered.set()

    with run_server(Connection, answer) as (address, _), socket.create_connection(address, timeout=60) as client:
        client.sendall(b"GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert answered.wait(60)
        ask(address, b"GET /other HTTP/1.1\r\nConnection: close\r\n\r\n")  # the loop has gone on since
        assert begun == ["/1", "/other"]
        assert sum(map(len, iter(lambda: client.recv(1_000_000), b""))) > 2 * size
        assert begun == ["/1", "/other", "/2"]


@pytest.mark.parametrize(("number", "stays"), [(3, True), (200_000, False)])
def test_a_body_that_nobody_reads_ends_the_connection_only_where_it_is_large(address, number, stays):
    post = b"POST /early HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % number
    answers = ask(address, post, b"x" * number, LAST)
    assert answers.startswith(b"HTTP/1.1 200 ")
    assert b"early" in answers
    assert answers.endswith(b"GET ") is stays


def test_a_client_that_waits_to_be_told_to_go_on_is_told(address):
    with socket.create_connection(address, timeout=60) as client:
        head = b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: 3\r\n\r\n"
        client.sendall(head)
        assert client.recv(1_000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc")
        assert read_all(client).endswith(b"POST abc")


def test_a_client_that_has_sent_all_it_wants_to_is_answered(address):
    with socket.create_connection(address, timeout=60) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client).endswith(b"GET ")


class Few(Connection):
    connections_max, accepted = 8, 0

    def connection_made(self, transport):
        super().connection_made(transport)
        Few.accepted += 1


@pytest.mark.parametrize("start", [b"", b"GET / HT", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\na"])
def test_half_requests_shut_nobody_out(start):
    """Neither a new connection nor one that is kept alive and has been answered, however rarely it asks."""
    Few.accepted = 0
    with run_server(Few) as (address, server), contextlib.ExitStack() as held:
        asking = held.enter_context(socket.create_connection(address, timeout=60))
        for number in range(100):
            client = held.enter_context(socket.create_connection(address, timeout=60))
            client.sendall(start)
            while Few.accepted < number + 2:
                time.sleep(0.001)
            if number % 20 == 0:
                assert ask_once(asking).endswith(b"GET ")
            assert len(server.server_state.connections) <= Few.connections_max
        assert ask(address, LAST).endswith(b"GET ")


def test_connections_that_were_answered_make_room_for_new_ones_where_there_are_no_others():
    Few.accepted = 0
    with run_server(Few) as (address, server), contextlib.ExitStack() as held:
        for number in range(30):
            client = held.enter_context(socket.create_connection(address, timeout=60))
            assert ask_once(client).endswith(b"GET ")
            while Few.accepted < number + 1:
                time.sleep(0.001)
        assert len(server.server_state.connections) <= Few.connections_max


def test_a_server_that_ends_says_so_in_its_last_answer():
    with run_server(Connection) as (address, server), socket.create_connection(address, timeout=60) as client:
        assert b"connection: close" not in ask_once(client)
        server.should_exit = True
        while server.servers[0].is_serving():
            time.sleep(0.01)
        assert b"connection: close" in ask_once(client)
        assert client.recv(1) == b""
