"""Kafka: read events from a topic and write their answers, each batch in one transaction: none is lost or doubled.

Answers and the group's new position are committed together (KIP-447, brokers from 2.5 on). A reader of committed
messages sees each event answered exactly once, even if processes are killed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from closedloop.errors import ConfigError, ServiceUnavailable

logger = logging.getLogger(__name__)
CALL_SECONDS = 10.0
PATIENCE_SECONDS = 60.0
ABORTS_MAX = 10


Headers = tuple[tuple[str, bytes | None], ...]


class Event(NamedTuple):
    """A message that was read; ``timestamp_ms`` is its time in the topic, -1 if the topic keeps none."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


class OutgoingMessage(NamedTuple):
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
        Unique among running processes, and the same after a restart. Opening the stream aborts the open transaction of
        an earlier process with this id, and shuts that process out if it still runs.
    properties
        Properties of librdkafka, such as credentials; those that exactly-once delivery needs cannot be changed.
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
            # Eager: every rebalance revokes all partitions and assigns them again, from the committed positions.
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
        """Check that the topics exist, abort a predecessor's open transaction, and join the group.

        Parameters
        ----------
        topics
            Topic names by the settings that name them.

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
            _retry(self._producer.init_transactions)
            self._consumer.subscribe([self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke)
        except KafkaException as error:
            raise ServiceUnavailable(f"stream.brokers {self._brokers}: {_describe(error)}") from error

    def read_batch(self, events_max: int, wait_seconds: float) -> list[Event]:
        """Read the available events, at most ``events_max``; wait for the first one only.

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

    def commit(self, events: Sequence[Event], messages: Sequence[OutgoingMessage]) -> bool:
        """Write the messages and commit these events' position in one transaction.

        Returns
        -------
        bool
            False if the transaction was aborted; this or another member will read the events again.

        Raises
        ------
        ServiceUnavailable
            If this process cannot go on: the transaction's result is unknown, or another process took its place.
        """
        ends = {(event.topic, event.partition): event.offset + 1 for event in events}
        offsets = [TopicPartition(*place, end) for place, end in ends.items()]
        try:
            self._producer.begin_transaction()
            for message in messages:
                self._producer.produce(message.topic, message.value, message.key, headers=list(message.headers))
            # The membership that read the events: Kafka refuses the commit if the group has expelled it since.
            _retry(self._producer.send_offsets_to_transaction, offsets, self._membership)
            _retry(self._producer.commit_transaction)
        except KafkaException as error:
            self._abort(error.args[0], events)
            return False
        self._aborts = 0
        self._producer.poll(0)  # passes its log lines on
        return True

    def rewind(self, events: Sequence[Event]) -> None:
        """Go back so that these events, the last ones that were read, are read again.

        Raises
        ------
        ServiceUnavailable
            If that fails; after a restart the events are read again.
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

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._batch.clear()
        self._membership = consumer.consumer_group_metadata()
        logger.info("partitions assigned: %s", [one.partition for one in partitions])

    def _on_revoke(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        """Forget the events read so far: their partitions' next owner reads them. No transaction is open here."""
        self._batch.clear()
        logger.info("partitions revoked: %s", [one.partition for one in partitions])

    def _abort(self, problem: KafkaError, events: Sequence[Event]) -> None:
        self._aborts += 1
        if problem.fatal() or problem.retriable() or self._aborts > ABORTS_MAX:
            raise ServiceUnavailable(f"Kafka: {problem.str()}")
        logger.warning("a transaction is aborted, its events are read again: %s", problem.str())
        try:
            _retry(self._producer.abort_transaction)
        except KafkaException as error:
            raise ServiceUnavailable(f"Kafka: {_describe(error)}") from error
        self.rewind(events)


def _read_headers(message: Message) -> Headers:
    """A message's headers, none if the client cannot read them."""
    try:
        found: Any = message.headers()
    except SystemError:  # a name is not UTF-8; a second call would return a broken list
        return ()
    return tuple(found or ())


def _retry(call: Callable[..., Any], *arguments: Any) -> None:
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
