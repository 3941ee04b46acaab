"""Kafka: events are read from a topic and answered, each batch in one transaction, so that none is lost or doubled.

Answers and the group's new position are committed together (KIP-447, brokers from 2.5 on): who reads committed messages
sees each event answered once, whatever dies when.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from closedloop.errors import ConfigError, ServiceUnavailable

try:
    from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
except ImportError as error:
    raise ConfigError("the stream worker needs Kafka's client: install closedloop[kafka]") from error

logger = logging.getLogger(__name__)
CALL_SECONDS = 10.0
PATIENCE_SECONDS = 60.0
ABORTS_MAX = 10


Headers = tuple[tuple[str, bytes | None], ...]


class Event(NamedTuple):
    """A message that was read; ``timestamp_ms`` is what the topic keeps of it, -1 if nothing."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


class Letter(NamedTuple):
    """A message to write."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


class EventStream:
    """One member of a consumer group, and the producer of its answers; for one thread.

    Parameters
    ----------
    transactional_id
        Of one living process only, and the same after a restart: opening the stream ends what a process of that id
        left open, and shuts that process out if it lives.
    properties
        Of librdkafka, such as credentials; those that exactly once rests on cannot be changed by it.
    """

    def __init__(
        self, brokers: str, input_topic: str, group: str, transactional_id: str, properties: Mapping[str, str]
    ) -> None:
        self._brokers, self._topic = brokers, input_topic
        shared = {**properties, "bootstrap.servers": brokers, "client.id": transactional_id}
        reads = {
            "group.id": group,
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            # Eager: all partitions are taken back and given again, from the committed positions, in every rebalance.
            "partition.assignment.strategy": "range",
        }
        writes = {"transactional.id": transactional_id}
        try:
            self._consumer = Consumer({**shared, **reads}, logger=logger)
            self._producer = Producer({"compression.type": "lz4", **shared, **writes}, logger=logger)
        except KafkaException as error:
            raise ConfigError(f"stream.properties: {_describe(error)}") from error
        self._batch: list[Event] = []
        self._membership = b""
        self._aborts = 0

    def open(self, topics: Mapping[str, str]) -> None:
        """Check that topics are there, end what a predecessor left open, and join the group.

        Parameters
        ----------
        topics
            By the setting that names them.

        Raises
        ------
        ConfigError
            If a topic is missing.
        ServiceUnavailable
            If no broker answers.
        """
        try:
            for setting, topic in topics.items():
                found = self._consumer.list_topics(topic, CALL_SECONDS).topics[topic]
                if found.error is not None:
                    raise ConfigError(f"{setting}: {topic} at {self._brokers}: {found.error.str()}")
            _insist(self._producer.init_transactions)
            self._consumer.subscribe([self._topic], on_assign=self._take, on_revoke=self._give_back)
        except KafkaException as error:
            raise ServiceUnavailable(f"stream.brokers {self._brokers}: {_describe(error)}") from error

    def read_batch(self, events_max: int, wait_seconds: float) -> list[Event]:
        """What is there, at most ``events_max`` events; waits for the first one only.

        Raises
        ------
        ServiceUnavailable
            If this member cannot go on.
        """
        self._batch = []
        while len(self._batch) < events_max:
            message = self._consumer.poll(0 if self._batch else wait_seconds)
            if message is None:
                break
            problem = message.error()
            if problem is not None:
                if problem.fatal():
                    raise ServiceUnavailable(f"Kafka: {problem.str()}")
                logger.warning("Kafka: %s", problem.str())
                break
            place: tuple[Any, Any, Any] = (message.topic(), message.partition(), message.offset())
            content = message.key(), message.value(), _read_headers(message)
            self._batch.append(Event(*place, message.timestamp()[1], *content))
        return self._batch

    def commit(self, events: Sequence[Event], letters: Sequence[Letter]) -> bool:
        """Write letters and that these events are done, both or neither.

        Returns
        -------
        bool
            False if neither, and the events will be read again, here or by another member.

        Raises
        ------
        ServiceUnavailable
            If this process cannot go on: it is not known what became of the transaction, or another took its place.
        """
        ends = {(event.topic, event.partition): event.offset + 1 for event in events}
        offsets = [TopicPartition(*place, end) for place, end in ends.items()]
        try:
            self._producer.begin_transaction()
            for letter in letters:
                self._producer.produce(letter.topic, letter.value, letter.key, headers=list(letter.headers))
            # The membership under which the events came: if the group has shut that out since, this is refused.
            _insist(self._producer.send_offsets_to_transaction, offsets, self._membership)
            _insist(self._producer.commit_transaction)
        except KafkaException as error:
            self._abort(error.args[0], events)
            return False
        self._aborts = 0
        self._producer.poll(0)  # hands its log lines on
        return True

    def rewind(self, events: Sequence[Event]) -> None:
        """Let these events, which are the last that were read, be read again.

        Raises
        ------
        ServiceUnavailable
            If that is not possible; after a restart they are read again.
        """
        starts = {(event.topic, event.partition): event.offset for event in reversed(events)}
        try:
            for place, start in starts.items():
                self._consumer.seek(TopicPartition(*place, start))
        except KafkaException as error:
            raise ServiceUnavailable(f"Kafka: {_describe(error)}") from error

    def close(self) -> None:
        """Leave the group, so that others need not wait for this member to time out."""
        self._consumer.close()

    def _take(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._batch.clear()
        self._membership = consumer.consumer_group_metadata()
        logger.info("partitions given: %s", [one.partition for one in partitions])

    def _give_back(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        """Called while reading, when no transaction is open: what was read so far is for who gets the partitions."""
        self._batch.clear()
        logger.info("partitions taken back: %s", [one.partition for one in partitions])

    def _abort(self, problem: KafkaError, events: Sequence[Event]) -> None:
        self._aborts += 1
        if problem.fatal() or problem.retriable() or self._aborts > ABORTS_MAX:
            raise ServiceUnavailable(f"Kafka: {problem.str()}")
        logger.warning("a transaction is aborted, its events are read again: %s", problem.str())
        try:
            _insist(self._producer.abort_transaction)
        except KafkaException as error:
            raise ServiceUnavailable(f"Kafka: {_describe(error)}") from error
        self.rewind(events)


def _read_headers(message: Message) -> Headers:
    """A message's headers, none if the client cannot read them."""
    try:
        found: Any = message.headers()
    except SystemError:  # a name is not UTF-8; asked again the client would give a broken list
        return ()
    return tuple(found or ())


def _insist(call: Callable[..., Any], *arguments: Any) -> None:
    """Repeat a call for as long as Kafka says that it may still succeed, up to a minute."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            call(*arguments, CALL_SECONDS)
            return
        except KafkaException as error:
            if not error.args[0].retriable() or time.monotonic() > deadline:
                raise


def _describe(error: KafkaException) -> str:
    problem: KafkaError = error.args[0]
    return problem.str()
