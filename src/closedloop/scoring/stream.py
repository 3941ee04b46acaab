"""The stream worker: ``python -m closedloop.scoring.stream CONFIG`` (what ``closedloop stream`` becomes).

Events of one Kafka topic, each what ``POST /predict`` takes, are answered into another; an event that cannot be
answered goes to the dead-letter topic as it came, with the reason in its headers. The HTTP service's own code checks,
scores and logs them, with the same slots. A prediction is logged before its transaction is committed, under an id that
follows from where its event stands: if the event is read again, the store knows the prediction.
"""

from __future__ import annotations

import asyncio
import logging
import logging.config
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from closedloop.adapters.kafka import Event, EventStream, OutgoingMessage
from closedloop.config.settings import StreamSettings, read_stream_environment
from closedloop.errors import ClosedloopError, ServiceUnavailable
from closedloop.files import take_lock
from closedloop.processes import handle_end_signals
from closedloop.records import Prediction, digest_position
from closedloop.rules import Breach, RefusedRequest, ScoringRequest
from closedloop.serving.batching import Batcher, Pending
from closedloop.serving.config import WorkerConfig
from closedloop.serving.http.answers import PredictAnswer, describe, encode, error_of
from closedloop.serving.logs import LOG_CONFIG
from closedloop.serving.process.children import keep_agent
from closedloop.serving.slots.slots import Serving, take_up_waiting
from closedloop.serving.worker import Worker

WAIT_SECONDS, RETRY_SECONDS, REPORT_SECONDS = 0.5, 1.0, 60.0
# A broker takes messages of a million bytes by default; it must take every dead letter.
KEY_BYTES_MAX, HEADERS_BYTES_MAX, DEAD_BYTES_MAX = 10_000, 10_000, 900_000
OWN_PREFIX, HEADER_BYTES = "closedloop-", 10  # at most two lengths of five bytes stand before a header
logger = logging.getLogger(__name__)


class StreamConfig(WorkerConfig):
    """The config of the stream worker; an agent runs beside it unless a service has the same state folder."""

    stream: StreamSettings


class SourcePosition(msgspec.Struct, frozen=True):
    """Where an event stands, as it is written."""

    topic: str
    partition: int
    offset: int


class StreamAnswer(PredictAnswer, frozen=True, kw_only=True):
    """The answer of ``POST /predict``, and the event that it answers."""

    source: SourcePosition


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRequest(ScoringRequest):
    """A checked request, and the event that it stood in."""

    event: Event


class EventBatcher(Batcher):
    """Gives predictions ids that follow from their events' positions."""

    source = "stream"

    def _draw_ids(self, group: Sequence[Pending]) -> list[str]:
        """The same whenever the same version scores the event again.

        With the event's time, since a topic that is made anew counts from 0 again; with version and variant, since
        another one may answer an event whose first transaction was aborted: an id leads to what was answered.
        """
        ids = []
        for pending in group:
            assert isinstance(pending.request, EventRequest)  # noqa: S101 - narrows the type
            event = pending.request.event
            position = event.topic, event.partition, event.offset, event.timestamp_ms
            ids.append(digest_position(*position, pending.model.version, pending.variant))
        return ids


class StreamWorker:
    """Reads, answers and commits, batch by batch, until told to stop.

    Parameters
    ----------
    stream
        Opened, and closed by whoever opened it.
    worker
        With what the HTTP service answers a request with, and an `EventBatcher`.
    stopping
        Once it is set, the batch at hand is committed, and no more.
    """

    def __init__(self, config: StreamConfig, stream: EventStream, worker: Worker, stopping: threading.Event) -> None:
        self._settings, self._stream, self._worker, self._stopping = config.stream, stream, worker, stopping
        self._answered = self._dead = self._transactions = 0
        self._reported_at = time.monotonic()

    async def run(self) -> None:
        """Work until told to stop.

        Raises
        ------
        ServiceUnavailable
            If Kafka does not let this process go on: to be started again.
        """
        if self._worker.slots.serving is None:
            logger.warning("no model is ready: events wait for one")
        while self._worker.slots.serving is None and not self._stopping.is_set():
            await asyncio.to_thread(self._stopping.wait, WAIT_SECONDS)
        while not self._stopping.is_set():
            events = await asyncio.to_thread(self._stream.read_batch, self._settings.batch_size, WAIT_SECONDS)
            if events:
                await self._take(events)
            if time.monotonic() - self._reported_at >= REPORT_SECONDS:
                self._report()
        self._report()

    async def _take(self, events: Sequence[Event]) -> None:
        try:
            answered, dead = await self.answer(events)
        except ServiceUnavailable as error:
            logger.warning("events wait: %s", error)
            await asyncio.to_thread(self._stream.rewind, events)
            await asyncio.to_thread(self._stopping.wait, RETRY_SECONDS)
            return
        if await asyncio.to_thread(self._stream.commit, events, answered + dead):
            self._answered += len(answered)
            self._dead += len(dead)
            self._transactions += 1

    async def answer(self, events: Sequence[Event]) -> tuple[list[OutgoingMessage], list[OutgoingMessage]]:
        """Answers and dead letters, one for each event; the predictions are in the log when this returns.

        Raises
        ------
        ServiceUnavailable
            If no model is ready, the online store does not answer or the log takes nothing: nothing is answered then.
        """
        arrived, serving = time.perf_counter(), self._worker.slots.serving
        if serving is None:
            raise ServiceUnavailable("no model is ready")
        found: list[EventRequest | RefusedRequest | Prediction] = [self._check(event, serving) for event in events]
        for by_id in (True, False):  # what an outage can hold up first, else the rest would be logged at every attempt
            waiting = {place: one for place, one in enumerate(found) if isinstance(one, EventRequest)}
            chosen = {place: one for place, one in waiting.items() if by_id == (one.values is None)}
            futures = [self._worker.batcher.submit(one, serving, arrived=arrived) for one in chosen.values()]
            results = await asyncio.gather(*futures, return_exceptions=True)
            for place, result in zip(chosen, results, strict=True):
                if not isinstance(result, Prediction | RefusedRequest):
                    raise result
                found[place] = result
        answered, dead = [], []
        for event, one in zip(events, found, strict=True):
            if isinstance(one, Prediction):
                answer = StreamAnswer(
                    **msgspec.structs.asdict(describe(one, arrived)),
                    source=SourcePosition(event.topic, event.partition, event.offset),
                )
                answered.append(OutgoingMessage(self._settings.output_topic, event.key, encode(answer)))
            elif isinstance(one, RefusedRequest):
                dead.append(refuse_event(self._settings.dead_letter_topic, event, one))
        return answered, dead

    def _check(self, event: Event, serving: Serving) -> EventRequest | RefusedRequest:
        try:
            if event.key is not None and len(event.key) > KEY_BYTES_MAX:
                breach = Breach("", len(event.key), f"a message's key has at most {KEY_BYTES_MAX} bytes")
                raise RefusedRequest("invalid_request", "the key is too long", (breach,))
            checked = serving.checker.read(event.value or b"", f"{event.topic}-{event.partition}-{event.offset}")
            if checked.explain:
                rule = "is not known: the stream gives no reasons"
                raise RefusedRequest("invalid_request", "1 rule is broken", (Breach("explain", checked.explain, rule),))
            request = EventRequest(checked.request_id, checked.customer_id, checked.values, event=event)
            if request.values is None and self._worker.config.online is None:
                breach = Breach("features", None, "is required: no online store is configured")
                raise RefusedRequest("no_features", "there is no online store", (breach,))
        except RefusedRequest as refused:
            return refused
        return request

    def _report(self) -> None:
        seconds = time.monotonic() - self._reported_at
        counts = self._answered, self._dead, self._transactions
        logger.info("in %.0f s: events answered: %d, dead letters: %d, transactions: %d", seconds, *counts)
        self._answered = self._dead = self._transactions = 0
        self._reported_at = time.monotonic()


def refuse_event(topic: str, event: Event, refused: RefusedRequest) -> OutgoingMessage:
    """The event as it came, as far as a message may be long, with reason, position and time in headers of our own.

    The message's own time is that of the refusal: a broker may refuse one that is far off, or delete it at once.
    """
    headers = [
        ("closedloop-error", encode(error_of(refused))),
        ("closedloop-source", encode(SourcePosition(event.topic, event.partition, event.offset))),
        ("closedloop-timestamp-ms", b"%d" % event.timestamp_ms),
    ]
    # those of ours are of an earlier refusal of the same event
    kept = [header for header in event.headers if not header[0].startswith(OWN_PREFIX)]
    headers_bytes = sum(len(name.encode()) + len(content or b"") + HEADER_BYTES for name, content in kept)
    if headers_bytes > HEADERS_BYTES_MAX:
        kept = []
    key, value = event.key and event.key[:KEY_BYTES_MAX], event.value and event.value[:DEAD_BYTES_MAX]
    if (key, value) != (event.key, event.value) or headers_bytes > HEADERS_BYTES_MAX:
        lengths = len(event.key or b""), len(event.value or b""), headers_bytes
        headers.append(("closedloop-cut-from", b"%d %d %d" % lengths))
    return OutgoingMessage(topic, key, value, (*kept, *headers))


def claim_instance(folder: Path) -> tuple[int, str]:
    """The lock of the least number that no other process on this machine has, and the machine's name with it.

    The process holds the lock; a process that is started again gets its predecessor's number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        try:
            return take_lock(folder / f"{number}.lock"), f"{socket.gethostname()}-{number}"
        except BlockingIOError:
            number += 1


async def run_stream(config: StreamConfig, properties: Mapping[str, str], stopping: threading.Event) -> None:
    """Answer events until ``stopping`` is set.

    Parameters
    ----------
    properties
        Of librdkafka: what the brokers ask for, with the credentials.

    Raises
    ------
    ConfigError, ServiceUnavailable
        As `EventStream` does.
    """
    lock, instance = claim_instance(config.state_dir / "stream")
    given = config.stream
    transactional_id = f"{given.group}-{instance}"
    stream = EventStream(given.brokers, given.input_topic, given.group, transactional_id, properties)
    worker = Worker(config, EventBatcher)
    try:
        names = ("input_topic", "output_topic", "dead_letter_topic")
        await asyncio.to_thread(stream.open, {f"stream.{name}": getattr(given, name) for name in names})
        worker.start()
        await StreamWorker(config, stream, worker, stopping).run()
    finally:
        await asyncio.to_thread(stream.close)
        await worker.stop()
        os.close(lock)


def main() -> None:
    """Run the worker of the configuration named on the command line, and an agent beside it."""
    config = StreamConfig.model_validate_json(Path(sys.argv[1]).read_bytes())
    properties = read_stream_environment().properties
    logging.config.dictConfig(LOG_CONFIG)
    stopping, ended = threading.Event(), threading.Event()
    handle_end_signals(lambda _: stopping.set())  # first of all: nothing else would end the agent
    arguments = (ended, config.params, config.state_dir / "spool")
    agent = threading.Thread(target=keep_agent, args=arguments, name="agent")
    if config.agent:
        take_up_waiting(config.state_dir)
        agent.start()
    try:
        asyncio.run(run_stream(config, properties, stopping))
    except ClosedloopError as error:
        logger.error("%s", error)
        sys.exit(error.exit_status)
    finally:
        ended.set()
        if config.agent:
            agent.join()


if __name__ == "__main__":
    main()
