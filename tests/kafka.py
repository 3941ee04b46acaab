"""A Kafka cluster for tests: librdkafka's mock cluster, and before it the transactions that the mock lacks.

The mock speaks the real protocol between processes: topics, logs, consumer groups, rebalances. Transactions it only
nods at: what was aborted is shown to readers of committed messages, offsets sent in a transaction are forgotten, and an
older producer of a transactional id is not fenced. So clients connect to a gateway that forwards requests to the mock
and gives the transactional ones their meaning. Unlike a real broker, it writes no control records into the logs (it
marks an aborted batch in the answer that carries it), and forgets everything when it is closed.
"""

from __future__ import annotations

import asyncio
import ctypes
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import confluent_kafka

PRODUCE, FETCH, OFFSET_FETCH, JOIN_GROUP, HEARTBEAT, INIT_PRODUCER = 0, 1, 9, 11, 12, 22
ADD_PARTITIONS, ADD_OFFSETS, END, SEND_OFFSETS = 24, 25, 26, 28
NEWEST_VERSIONS = {PRODUCE: 7, FETCH: 5, OFFSET_FETCH: 5, INIT_PRODUCER: 4, ADD_PARTITIONS: 0, ADD_OFFSETS: 0, END: 1}
FLEXIBLE_SINCE = {INIT_PRODUCER: 2, SEND_OFFSETS: 3}  # versions with compact lengths and tagged fields
ILLEGAL_GENERATION, UNKNOWN_MEMBER, NOT_AUTHORISED, INVALID_EPOCH, INVALID_STATE, UNSTABLE_OFFSET = (
    22,
    25,
    30,
    47,
    48,
    88,
)
Partition = tuple[str, int]
Forward = Callable[[bytes], Awaitable[bytes]]


class Reader:
    """Reads a message of the protocol field by field."""

    def __init__(self, data: bytes, *, flexible: bool = False) -> None:
        self.data, self.place, self.flexible = data, 0, flexible

    def number(self, kind: str) -> int:
        """A number in the notation of `struct`: b, h, i or q."""
        (value,) = struct.unpack_from(f">{kind}", self.data, self.place)
        self.place += struct.calcsize(f">{kind}")
        return int(value)

    def length(self, kind: str) -> int:
        """The length before a text or an array; -1 stands for null."""
        if not self.flexible:
            return self.number(kind)
        value = shift = 0
        while (byte := self.number("B")) & 0x80:
            value, shift = value | (byte & 0x7F) << shift, shift + 7
        return (value | byte << shift) - 1

    def text(self) -> str | None:
        """A text, or None."""
        return None if (length := self.length("h")) < 0 else self.take(length).decode()

    def take(self, length: int) -> bytes:
        """The next bytes."""
        self.place += length
        return self.data[self.place - length : self.place]

    def array(self, read: Callable[[], Any]) -> list[Any]:
        """An array whose items ``read`` reads, tags skipped."""
        return [self.tagged(read()) for _ in range(self.length("i"))]

    def tagged(self, value: Any = None) -> Any:
        """Skip the tags, of which none is ever sent, behind a value."""
        assert not self.flexible or self.number("b") == 0
        return value


def pack(kinds: str, *values: int) -> bytes:
    """Numbers, as `struct` writes them."""
    return struct.pack(f">{kinds}", *values)


def pack_text(text: str | None) -> bytes:
    """A text with its length before it."""
    return pack("h", -1) if text is None else pack("h", len(text.encode())) + text.encode()


def pack_array(items: list[bytes]) -> bytes:
    """An array of packed items."""
    return pack("i", len(items)) + b"".join(items)


def pack_topics(partitions: list[Partition], pack_one: Callable[[Partition], bytes], *, flexible: bool) -> bytes:
    """An array of topics, one partition in each, followed by what ``pack_one`` gives."""
    if not flexible:
        return pack_array([pack_text(one[0]) + pack_array([pack("i", one[1]) + pack_one(one)]) for one in partitions])
    topics = [
        pack("B", len(one[0]) + 1) + one[0].encode() + pack("Bi", 2, one[1]) + pack_one(one) + pack("BB", 0, 0)
        for one in partitions
    ]
    return pack("B", len(topics) + 1) + b"".join(topics)


@dataclass
class Transaction:
    """What one producer wrote and read since it began."""

    state: str = "open"
    began_at: float = field(default_factory=time.monotonic)
    partitions: set[Partition] = field(default_factory=set)
    first_offsets: dict[Partition, int] = field(default_factory=dict)
    offsets: dict[tuple[str, Partition], tuple[int, str | None]] = field(default_factory=dict)


@dataclass
class Producer:
    """The one producer that may write under a transactional id."""

    identity: tuple[int, int]
    timeout_seconds: float
    transaction: Transaction | None = None


class Transactions:
    """Who may write what, what is open, and what was committed."""

    def __init__(self) -> None:
        self.producers: dict[str, Producer] = {}
        self.batches: dict[tuple[Partition, int], Transaction] = {}
        self.committed: dict[tuple[str, Partition], tuple[int, str | None]] = {}
        self.errors: dict[int, list[int]] = {}

    def check(self, api: int, name: str, identity: tuple[int, int], *, begins: bool = False) -> int:
        """The error that a request under a transactional id gets, 0 for none."""
        if self.errors.get(api):
            return self.errors[api].pop(0)
        producer = self.producers.get(name)
        if producer is None or producer.identity != identity:
            return INVALID_EPOCH
        if begins and producer.transaction is None:
            producer.transaction = Transaction()
        return 0 if producer.transaction is not None else INVALID_STATE

    def start(self, name: str, identity: tuple[int, int], timeout_seconds: float) -> None:
        """Let a new producer take over; what the one before left open is aborted."""
        if name in self.producers:
            self.end(name, commit=False)
        self.producers[name] = Producer(identity, timeout_seconds)

    def end(self, name: str, *, commit: bool) -> None:
        """Commit or abort what is open."""
        transaction, self.producers[name].transaction = self.producers[name].transaction, None
        if transaction is not None:
            transaction.state = "committed" if commit else "aborted"
            if commit:
                self.committed |= transaction.offsets

    def list_open(self) -> list[Transaction]:
        """The open transactions; those that took too long are aborted first, and their producers fenced."""
        for name, producer in self.producers.items():
            began_at = producer.transaction.began_at if producer.transaction else time.monotonic()
            if time.monotonic() - began_at > producer.timeout_seconds:
                self.end(name, commit=False)
                producer.identity = (-1, -1)
        return [producer.transaction for producer in self.producers.values() if producer.transaction is not None]

    def find_stable(self, partition: Partition, end: int) -> int:
        """The offset up to which a partition holds nothing undecided."""
        return min([end, *(one.first_offsets.get(partition, end) for one in self.list_open())])


@dataclass
class Trap:
    """Holds one request: its client can be killed meanwhile."""

    api: int
    count: int
    processed: bool
    client: str
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    drop: bool = False

    def release(self, *, drop: bool = False) -> None:
        """Let it go on, or end its connection."""
        self.drop = drop
        self.released.set()


class Gateway:
    """Forwards to the mock, and answers what the mock would answer wrongly."""

    def __init__(self, mock_port: int) -> None:
        self.transactions = Transactions()
        self.traps: list[Trap] = []
        self.connections: set[asyncio.Task[Any]] = set()
        self._mock_port = mock_port
        self._handlers = {
            PRODUCE: self._produce,
            FETCH: self._fetch,
            OFFSET_FETCH: self._fetch_offsets,
            INIT_PRODUCER: self._init_producer,
            ADD_PARTITIONS: self._add_partitions,
            ADD_OFFSETS: self._add_offsets,
            SEND_OFFSETS: self._send_offsets,
            END: self._end,
        }

    async def serve(self, client: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: requests are answered one after the other."""
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)  # nothing else holds it once its client is gone
        mock, mock_writer = await asyncio.open_connection("127.0.0.1", self._mock_port)

        async def forward(request: bytes) -> bytes:
            mock_writer.write(pack("i", len(request)) + request)
            return await read_frame(mock)

        try:
            while (response := await self._answer(await read_frame(client), forward)) is not None:
                writer.write(pack("i", len(response)) + response)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # one of the three has gone
        finally:
            self.connections.discard(task)
            writer.close()
            mock_writer.close()

    async def _answer(self, request: bytes, forward: Forward) -> bytes | None:
        api, version, correlation = struct.unpack_from(">hhi", request)
        body = Reader(request)
        body.place = 8
        trap = self._find_trap(api, body.text() or "")
        if trap is not None and not trap.processed and await self._spring(trap):
            return None
        handler = self._handlers.get(api)
        if handler is None:
            response = await forward(request)
        else:
            body.flexible = version >= FLEXIBLE_SINCE.get(api, 99)
            body.tagged()
            answer = await handler(body, version, lambda: forward(request), forward)
            response = answer if isinstance(answer, bytes) else pack("i", correlation) + answer[0]
        if trap is not None and trap.processed and await self._spring(trap):
            return None
        return response

    def _find_trap(self, api: int, client: str) -> Trap | None:
        for trap in self.traps:
            if trap.api == api and client.endswith(trap.client):
                trap.count -= 1
                return trap if trap.count == 0 else None
        return None

    async def _spring(self, trap: Trap) -> bool:
        trap.reached.set()
        await asyncio.to_thread(trap.released.wait)
        return trap.drop

    async def _init_producer(self, body: Reader, version: int, pass_on: Any, _: Forward) -> bytes:
        name, timeout_ms = body.text(), body.number("i")
        response: bytes = await pass_on()
        answer = Reader(response, flexible=body.flexible)
        answer.place = 4
        answer.tagged()
        _, error, *identity = answer.number("i"), answer.number("h"), answer.number("q"), answer.number("h")
        if name is not None and not error:
            self.transactions.start(name, (identity[0], identity[1]), timeout_ms / 1000)
        return response

    async def _add_partitions(self, body: Reader, *_: Any) -> tuple[bytes]:
        name, identity = body.text() or "", (body.number("q"), body.number("h"))
        topics = body.array(lambda: (body.text(), body.array(lambda: body.number("i"))))
        chosen = [(topic, partition) for topic, partitions in topics for partition in partitions]
        error = self.transactions.check(ADD_PARTITIONS, name, identity, begins=True)
        if not error:
            transaction = self.transactions.producers[name].transaction
            assert transaction is not None
            transaction.partitions |= set(chosen)
        return (pack("i", 0) + pack_topics(chosen, lambda _: pack("h", error), flexible=False),)

    async def _add_offsets(self, body: Reader, *_: Any) -> tuple[bytes]:
        name, identity = body.text() or "", (body.number("q"), body.number("h"))
        return (pack("ih", 0, self.transactions.check(ADD_OFFSETS, name, identity, begins=True)),)

    async def _send_offsets(self, body: Reader, _: int, __: Any, forward: Forward) -> tuple[bytes]:
        name, group, identity = body.text() or "", body.text() or "", (body.number("q"), body.number("h"))
        generation, member, _ = body.number("i"), body.text() or "", body.text()
        topics = body.array(
            lambda: (
                body.text(),
                body.array(lambda: (body.number("i"), body.number("q"), body.number("i"), body.text())),
            )
        )
        error = self.transactions.check(SEND_OFFSETS, name, identity)
        if not error:  # the mock's own judgement of the membership; any rebalance that is under way is none of it
            beat = pack("hhih", HEARTBEAT, 0, 0, -1) + pack_text(group) + pack("i", generation) + pack_text(member)
            (judged,) = struct.unpack(">h", (await forward(beat))[4:6])
            error = judged if judged in (ILLEGAL_GENERATION, UNKNOWN_MEMBER) else 0
        chosen = {(topic, one[0]): (one[1], one[3]) for topic, partitions in topics for one in partitions}
        transaction = self.transactions.producers[name].transaction if not error else None
        if transaction is not None:
            transaction.offsets |= {(group, partition): offset for partition, offset in chosen.items()}
        return (pack("bi", 0, 0) + pack_topics(list(chosen), lambda _: pack("h", error), flexible=True) + pack("b", 0),)

    async def _end(self, body: Reader, *_: Any) -> tuple[bytes]:
        name, identity, commit = body.text() or "", (body.number("q"), body.number("h")), body.number("b")
        error = self.transactions.check(END, name, identity)
        if not error:
            self.transactions.end(name, commit=bool(commit))
        return (pack("ih", 0, error),)

    async def _produce(self, body: Reader, version: int, pass_on: Any, _: Forward) -> bytes | tuple[bytes]:
        name, *_ = body.text(), body.number("h"), body.number("i")
        if name is None:
            response: bytes = await pass_on()
            return response
        topics = body.array(lambda: (body.text(), body.array(lambda: self._read_batch(body))))
        batches = {(topic, one[0]): one[1] for topic, partitions in topics for one in partitions}
        producer = self.transactions.producers.get(name)
        transaction = producer.transaction if producer else None
        if (
            producer is None
            or transaction is None
            or any(identity != producer.identity for identity in batches.values())
            or not batches.keys() <= transaction.partitions
        ):
            refused = pack("hqqq", INVALID_EPOCH, -1, -1, -1)
            return (pack_topics(list(batches), lambda _: refused, flexible=False) + pack("i", 0),)
        response = await pass_on()
        answer = Reader(response)
        answer.place = 4
        for topic, partitions in answer.array(
            lambda: (answer.text(), answer.array(lambda: [answer.number(kind) for kind in "ihqqq"]))
        ):
            for partition, error, offset, *_ in partitions:
                if not error and offset >= 0:
                    transaction.first_offsets.setdefault((topic, partition), offset)
                    self.transactions.batches[(topic, partition), offset] = transaction
        return response

    @staticmethod
    def _read_batch(body: Reader) -> tuple[int, tuple[int, int]]:
        """A partition, and the producer named in the head of its one batch of records."""
        partition, records = body.number("i"), body.take(body.number("i"))
        producer, epoch = struct.unpack_from(">qh", records, 43)
        return partition, (producer, epoch)

    async def _fetch(self, body: Reader, version: int, pass_on: Any, _: Forward) -> bytes:
        """The mock's answer, which carries one batch a partition, for who reads committed messages only."""
        body.place += 16
        committed_only = body.number("b")
        response: bytes = await pass_on()
        if not committed_only:
            return response
        answer = Reader(response)
        head = answer.take(8)
        held_back = False

        def rewrite(topic: str | None) -> bytes:
            nonlocal held_back
            partition, error, end, _ = (answer.number(kind) for kind in "ihqq")
            start = answer.take(8 if version >= 5 else 0)
            answer.place += 4  # the mock knows no aborted transactions
            records = answer.take(max(0, answer.number("i")))
            stable = self.transactions.find_stable((topic or "", partition), end)
            aborted: list[bytes] = []
            if records:
                (offset,) = struct.unpack_from(">q", records)
                transaction = self.transactions.batches.get(((topic or "", partition), offset))
                if transaction is not None and transaction.state == "aborted":
                    aborted = [records[43:51] + pack("q", offset)]
                elif offset >= stable:
                    records, held_back = b"", True
            numbers = pack("ihqq", partition, error, end, stable)
            return numbers + start + pack_array(aborted) + pack("i", len(records)) + records

        def rewrite_topic() -> bytes:
            topic = answer.text()
            return pack_text(topic) + pack_array(answer.array(lambda: rewrite(topic)))

        topics = answer.array(rewrite_topic)
        if held_back:
            await asyncio.sleep(0.02)  # the mock has messages and so does not wait for any, which a broker would
        return head + pack_array(topics)

    async def _fetch_offsets(self, body: Reader, version: int, *_: Any) -> tuple[bytes]:
        group = body.text() or ""
        topics = body.array(lambda: (body.text(), body.array(lambda: body.number("i"))))
        undecided = {key for transaction in self.transactions.list_open() for key in transaction.offsets}

        def describe(partition: Partition) -> bytes:
            offset, metadata = self.transactions.committed.get((group, partition), (-1, None))
            error = UNSTABLE_OFFSET if (group, partition) in undecided else 0
            epoch = pack("i", -1) if version >= 5 else b""
            return pack("q", offset) + epoch + pack_text(metadata) + pack("h", error)

        chosen = [(topic, partition) for topic, partitions in topics for partition in partitions]
        throttle = pack("i", 0) if version >= 3 else b""
        return (throttle + pack_topics(chosen, describe, flexible=False) + (pack("h", 0) if version >= 2 else b""),)


async def read_frame(stream: asyncio.StreamReader) -> bytes:
    """One message of the protocol."""
    (length,) = struct.unpack(">i", await stream.readexactly(4))
    return await stream.readexactly(length)


@dataclass
class KafkaCluster:
    """A running cluster of one broker; ``address`` is what clients connect to."""

    address: str
    gateway: Gateway
    _library: ctypes.CDLL
    _mock: int

    @property
    def committed(self) -> dict[tuple[str, Partition], tuple[int, str | None]]:
        """What transactions have committed: offset and metadata by group and partition."""
        return self.gateway.transactions.committed

    def create_topic(self, name: str, partitions: int) -> str:
        """Make a topic, and return its name."""
        assert self._library.rd_kafka_mock_topic_create(self._mock, name.encode(), partitions, 1) == 0
        return name

    @contextmanager
    def trap(self, api: int, *, count: int = 1, processed: bool = False, client: str = "") -> Iterator[Trap]:
        """Hold the ``count``-th request of a kind from now on before it is processed, or else its answer.

        Only those of clients whose name ends in ``client`` count.
        """
        trap = Trap(api, count, processed, client)
        self.gateway.traps.append(trap)
        try:
            yield trap
        finally:
            self.gateway.traps.remove(trap)
            trap.released.set()

    def produce_with_header(self, topic: str, value: bytes, name: bytes) -> None:
        """Write a message with a header of any name, which the client of Python cannot."""
        settings = self._library.rd_kafka_conf_new()
        self._library.rd_kafka_conf_set(settings, b"bootstrap.servers", self.address.encode(), None, 0)
        client = self._library.rd_kafka_new(0, settings, None, 0)
        headers = self._library.rd_kafka_headers_new(1)
        assert self._library.rd_kafka_header_add(headers, name, -1, b"", -1) == 0
        # pairs of what is given and its value (with a length): topic, value, to be copied, headers
        pairs = [1, topic.encode(), 4, value, ctypes.c_size_t(len(value)), 7, 2, 10, ctypes.c_void_p(headers), 0]
        assert self._library.rd_kafka_producev(ctypes.c_void_p(client), *pairs) == 0
        assert self._library.rd_kafka_flush(client, 60_000) == 0
        self._library.rd_kafka_destroy(client)

    def fail(self, api: int, error: int) -> None:
        """Let the next transactional request of a kind fail."""
        self.gateway.transactions.errors.setdefault(api, []).append(error)


def load_library() -> ctypes.CDLL:
    """The library inside the client's package, with the functions that are used here."""
    (path,) = Path(confluent_kafka.__file__).parent.with_suffix(".libs").glob("librdkafka-*.so*")
    library = ctypes.CDLL(str(path))
    handle, text, number, short = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int16
    functions: dict[str, tuple[Any, list[Any] | None]] = {
        "rd_kafka_conf_new": (handle, []),
        "rd_kafka_conf_set": (number, [handle, text, text, text, ctypes.c_size_t]),
        "rd_kafka_new": (handle, [number, handle, text, ctypes.c_size_t]),
        "rd_kafka_destroy": (None, [handle]),
        "rd_kafka_headers_new": (handle, [ctypes.c_size_t]),
        "rd_kafka_header_add": (number, [handle, text, ctypes.c_ssize_t, text, ctypes.c_ssize_t]),
        "rd_kafka_producev": (number, None),
        "rd_kafka_flush": (number, [handle, number]),
        "rd_kafka_mock_cluster_new": (handle, [handle, number]),
        "rd_kafka_mock_cluster_destroy": (None, [handle]),
        "rd_kafka_mock_cluster_bootstraps": (text, [handle]),
        "rd_kafka_mock_topic_create": (number, [handle, text, number, number]),
        "rd_kafka_mock_broker_set_host_port": (None, [handle, ctypes.c_int32, text, number]),
        "rd_kafka_mock_set_apiversion": (number, [handle, short, short, short]),
        "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [handle, ctypes.c_int32]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@contextmanager
def run_kafka() -> Iterator[KafkaCluster]:
    """A cluster for the length of the block."""
    library = load_library()
    settings = library.rd_kafka_conf_new()
    library.rd_kafka_conf_set(settings, b"log_level", b"3", None, 0)  # it warns that it has no broker itself
    client = library.rd_kafka_new(0, settings, None, 0)
    mock = library.rd_kafka_mock_cluster_new(client, 1)
    library.rd_kafka_mock_group_initial_rebalance_delay_ms(mock, 100)
    for api, version in NEWEST_VERSIONS.items():
        assert library.rd_kafka_mock_set_apiversion(mock, api, 0, version) == 0
    gateway = Gateway(int(library.rd_kafka_mock_cluster_bootstraps(mock).decode().split(":")[1]))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="kafka", daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(gateway.serve, "127.0.0.1", 0), loop).result()
    port = server.sockets[0].getsockname()[1]
    library.rd_kafka_mock_broker_set_host_port(mock, 1, b"127.0.0.1", port)
    try:
        yield KafkaCluster(f"127.0.0.1:{port}", gateway, library, mock)
    finally:
        asyncio.run_coroutine_threadsafe(stop(server, gateway.connections), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        library.rd_kafka_mock_cluster_destroy(mock)
        library.rd_kafka_destroy(client)


async def stop(server: asyncio.Server, connections: set[asyncio.Task[Any]]) -> None:
    """Close a server with all its connections."""
    server.close()
    for connection in connections:
        connection.cancel()
    await asyncio.gather(*connections, return_exceptions=True)
    await asyncio.sleep(0)  # sockets are closed in the loop's next turn
