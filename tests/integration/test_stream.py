"""The stream worker between Kafka topics, across processes: each event is answered once, whatever is killed when.

The cluster is librdkafka's mock with the transactions of `tests.kafka`; a real broker was never asked.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from closedloop.adapters.kafka import Event
from closedloop.config.settings import StreamSettings
from closedloop.contract import digest_folder
from closedloop.processes import start_process
from closedloop.records import Prediction, is_issued
from closedloop.scoring import stream
from closedloop.scoring.stream import EventBatcher, StreamConfig, StreamWorker, run_stream
from closedloop.serving.exposition import build_registry
from closedloop.serving.log.drain import drain_once
from closedloop.serving.log.segments import list_segments, list_spools, read_lines
from closedloop.serving.slots.slots import Slot, Slots
from closedloop.serving.worker import Worker
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from tests import kafka
from tests.kafka import KafkaCluster, run_kafka
from tests.model_folders import ROWS, expected_score, write_model_folder, write_online_rows, write_slots

pytestmark = pytest.mark.thorough

SNAPSHOT = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
GROUP, MODEL = "scorers", "test_churn"
BIASES = {"1": 0.0, "2": -3.0}
CUSTOMERS = {"fresh": SNAPSHOT, "stale": SNAPSHOT - dt.timedelta(days=400)}
# A dead member is given up after three seconds; what it left open is not, so who comes after it must end that.
PROPERTIES = {
    "session.timeout.ms": "3000",
    "heartbeat.interval.ms": "300",
    "fetch.wait.max.ms": "50",
    "transaction.timeout.ms": "600000",
}
DEADLINE_SECONDS = 300.0
SHARE = r"partitions assigned: \[\d"
Position = tuple[int, int]


def wait_until(found: Callable[[], Any], what: str) -> None:
    """Look until something holds."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not found():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)


def make_value(number: int) -> bytes:
    """Event number so-and-so: one in five cannot be answered."""
    features = {"visits_30d": number % 21, "age": 18 + number % 63, "plan": ("basic", "plus", None)[number % 3]}
    values: dict[int, Any] = {
        0: b"{not JSON",
        1: {"features": features | {"age": 500}},
        2: {"customer_id": "nobody"},
        3: {"customer_id": "stale"},
        4: {"customer_id": "fresh", "request_id": f"r{number}"},
    }
    value = values.get(number % 20, {"features": features, "request_id": f"r{number}"})
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def describe_worker(state_dir: Path, stream: StreamSettings | None = None, **values: Any) -> StreamConfig:
    topics = {"input_topic": "in", "output_topic": "out", "dead_letter_topic": "dead", "group": "group"}
    return StreamConfig(model_name=MODEL, state_dir=state_dir, stream=stream or StreamSettings(**topics), **values)


def change_settings(config: StreamConfig, **values: Any) -> StreamConfig:
    return config.model_copy(update={"stream": config.stream.model_copy(update=values)})


class Place:
    """A state folder with two model versions, an online store and topics; starts workers there."""

    def __init__(self, folder: Path, cluster: KafkaCluster, *, partitions: int = 4, batch_size: int = 50) -> None:
        self.folder, self.cluster, self.partitions = folder, cluster, partitions
        self.state_dir = folder / "state"
        self.online_path = folder / "online.db"
        write_online_rows(self.online_path, MODEL, CUSTOMERS)
        for version, bias in BIASES.items():
            write_model_folder(folder / version, bias=bias)
        self.serve("1")
        suffix = os.urandom(4).hex()
        self.input, self.output, self.dead = (
            cluster.create_topic(f"{name}-{suffix}", partitions) for name in ("events", "answers", "dead")
        )
        self.group = f"{GROUP}-{suffix}"
        online = {
            "online_store": {"type": "sqlite", "path": str(self.online_path)},
            "registry": {},
            "entity_key_serialization_version": 3,
        }
        topics = {"input_topic": self.input, "output_topic": self.output, "dead_letter_topic": self.dead}
        settings = StreamSettings(brokers=cluster.address, **topics, group=self.group, batch_size=batch_size)
        self.config = describe_worker(
            self.state_dir, stream=settings, online=online, as_of=SNAPSHOT.date(), agent=False
        )
        self.workers: list[Streamer] = []
        batches = {"linger.ms": 50, "compression.type": "lz4", "batch.size": 16_384, "message.max.bytes": 2_000_000}
        self._producer = Producer({"bootstrap.servers": cluster.address, "log_level": 2, **batches})
        self.produced = 0

    def serve(self, version: str) -> None:
        """Ask for a version, as the agent does."""
        folder = self.folder / version
        write_slots(self.state_dir, Slots(int(version), "", Slot(version, str(folder), digest_folder(folder))))

    def produce(self, number: int) -> None:
        """Write events, and wait until the cluster has them."""
        for one in range(self.produced, self.produced + number):
            self._producer.produce(self.input, make_value(one), f"key{one % 97}")
            self._producer.poll(0)
        self.produced += number
        assert self._producer.flush(60) == 0

    def produce_one(self, value: bytes | None, key: bytes | None = None, **options: Any) -> None:
        """Write one event."""
        self._producer.produce(self.input, value, key, **options)
        self.produced += 1
        assert self._producer.flush(60) == 0

    def start(self) -> Streamer:
        """A worker process."""
        self.workers.append(Streamer(self, len(self.workers)))
        return self.workers[-1]

    def count_done(self) -> int:
        """Events that are committed."""
        return sum(offset for (group, _), (offset, _) in self.cluster.committed.items() if group == self.group)

    def wait_until_done(self) -> None:
        """Until all that was produced is committed."""
        wait_until(lambda: self.count_done() == self.produced, f"{self.produced} events done")

    def read(self, topic: str, level: str = "read_committed") -> list[Message]:
        """All messages of a topic, as a reader of committed messages gets them."""
        settings = {"bootstrap.servers": self.cluster.address, "isolation.level": level, "group.id": "reader"}
        consumer = Consumer({**settings, "enable.partition.eof": True, "auto.offset.reset": "earliest"})
        consumer.assign([TopicPartition(topic, partition, 0) for partition in range(self.partitions)])
        found, ends = [], set()
        while len(ends) < self.partitions:
            message = consumer.poll(180)
            assert message is not None, "the topic does not end"
            error = message.error()
            if error is None:
                found.append(message)
            else:
                assert error.code() == KafkaError._PARTITION_EOF, error
                ends.add(message.partition())
        consumer.close()
        return found

    def read_log(self) -> list[Prediction]:
        """What stands in all spools."""
        spools = list_spools(self.state_dir / "spool")
        lines = [line for spool in spools for path in list_segments(spool) for line in read_lines(path)]
        return [line.record for line in lines if isinstance(line.record, Prediction)]

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.kill()


class Streamer:
    """A worker process, with its log in a file."""

    def __init__(self, place: Place, number: int) -> None:
        self.log_path = place.folder / f"worker-{number}.log"
        config_path = place.folder / "stream.json"
        config_path.write_text(place.config.model_dump_json())
        variables = {"CLOSEDLOOP_STREAM__PROPERTIES": json.dumps(PROPERTIES)}
        with self.log_path.open("wb") as log:
            self.process = start_process(
                [sys.executable, "-m", "closedloop.scoring.stream", str(config_path)],
                env=os.environ | variables,
                stderr=log,
            )

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self.log_path.read_text()

    def wait_for(self, pattern: str) -> None:
        """Until it has logged something."""
        wait_until(lambda: re.search(pattern, self.log), f"{pattern!r} in {self.log_path}")

    def pause(self) -> None:
        """Stop it until it is told to go on."""
        self.process.send_signal(signal.SIGSTOP)
        status = Path(f"/proc/{self.process.pid}/status")
        wait_until(lambda: "State:\tT" in status.read_text(), "the process stands still")

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> str:
        """Ask it to end; returns its log."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(DEADLINE_SECONDS) == 0, self.log
        return self.log


@pytest.fixture(scope="module")
def cluster() -> Iterator[KafkaCluster]:
    with run_kafka() as started:
        yield started


@pytest.fixture
def place(tmp_path: Path, cluster: KafkaCluster) -> Iterator[Place]:
    made = Place(tmp_path, cluster)
    yield made
    made.close()


def read_source(message: Message) -> Position:
    """The position of the event that an answer or a dead letter belongs to."""
    if message.headers():
        source = json.loads(dict(message.headers())["closedloop-source"])
    else:
        source = json.loads(message.value())["source"]
    return source["partition"], source["offset"]


def check_exactly_once(place: Place) -> list[dict[str, Any]]:
    """Every event has one answer or dead letter, and the right one; returns the answers."""
    events = {(message.partition(), message.offset()): message for message in place.read(place.input)}
    outputs, dead = place.read(place.output), place.read(place.dead)
    assert len(events) == place.produced
    assert Counter(map(read_source, outputs + dead)) == dict.fromkeys(events, 1)
    answers = [json.loads(message.value()) for message in outputs]
    for message, answer in zip(outputs, answers, strict=True):
        event = events[read_source(message)]
        asked = json.loads(event.value())
        row = asked.get("features", ROWS[0])
        assert (message.key(), answer["request_id"]) == (event.key(), asked["request_id"])
        assert answer["probability"] == pytest.approx(expected_score(row, BIASES[answer["model_version"]]), abs=1e-6)
        assert answer["prediction"] == (answer["probability"] >= 0.5)
    for message in dead:
        event = events[read_source(message)]
        assert (message.key(), message.value()) == (event.key(), event.value())
    assert len({answer["prediction_id"] for answer in answers}) == len(answers)
    return answers


def check_store(place: Place, answers: list[dict[str, Any]]) -> None:
    """The drained log holds each answered prediction once, and nothing else."""
    store = Predictions(Database(f"sqlite:///{place.folder / 'operations.db'}"))
    store.database.upgrade()
    drain_once(place.state_dir / "spool", store, MODEL)
    found = [one for some in store.read_predictions(MODEL) for one in some]
    store.database.close()
    logged = sorted((one.prediction_id, one.model_version, one.score, one.source) for one in found)
    assert logged == sorted((a["prediction_id"], a["model_version"], a["probability"], "stream") for a in answers)


def run_scenario(place: Place, events: int) -> list[dict[str, Any]]:
    """A worker, a second one that joins while the first has a transaction open, another version, a kill, a restart."""
    quarter = events // 4
    with place.cluster.trap(kafka.END, count=2, client="-0") as end:
        first = place.start()
        place.produce(2 * quarter)
        assert end.reached.wait(DEADLINE_SECONDS)
        with place.cluster.trap(kafka.JOIN_GROUP, client="-1") as join:
            second = place.start()
            assert join.reached.wait(DEADLINE_SECONDS)
        end.release()
    second.wait_for(SHARE)
    place.produce(quarter)
    place.wait_until_done()
    place.serve("2")
    for worker in (first, second):
        worker.wait_for("serving revision 2")
    with place.cluster.trap(kafka.END, count=2, client="-0") as end:
        place.produce(quarter // 2)
        assert end.reached.wait(DEADLINE_SECONDS)
        first.kill()
        end.release(drop=True)
    third = place.start()
    third.wait_for(SHARE)
    place.produce(events - place.produced)
    place.wait_until_done()
    for worker in (second, third):
        worker.stop()
    return check_exactly_once(place)


def test_every_event_is_answered_once_although_a_worker_joins_and_one_is_killed(place):
    answers = run_scenario(place, 5_000)
    assert len(answers) == 4_000
    assert {answer["model_version"] for answer in answers} == {"1", "2"}
    assert len(place.read(place.output, "read_uncommitted")) > 4_000  # the killed one had written answers
    assert len(place.read_log()) > 4_000  # and logged them
    check_store(place, answers)


STEPS = {
    "partitions added": (kafka.ADD_PARTITIONS, False),
    "answers half written": (kafka.PRODUCE, False),
    "answers written": (kafka.PRODUCE, True),
    "offsets added": (kafka.ADD_OFFSETS, True),
    "offsets sent": (kafka.SEND_OFFSETS, True),
    "not yet committed": (kafka.END, False),
    "just committed": (kafka.END, True),
}


def test_a_worker_killed_at_any_step_of_a_transaction_loses_and_doubles_nothing(place):
    wasted = {}
    for name, (api, processed) in STEPS.items():
        with place.cluster.trap(api, count=3, processed=processed, client="-0") as trap:
            worker = place.start()
            place.produce(400)
            assert trap.reached.wait(DEADLINE_SECONDS), name
            before = place.count_done()
            worker.kill()
            trap.release(drop=True)
        wasted[name] = place.produced - before
    place.start()
    place.wait_until_done()
    assert min(wasted.values()) > 0  # all were killed before they were done
    check_store(place, check_exactly_once(place))


def test_a_worker_that_was_taken_for_dead_cannot_commit(place):
    """Stopped in a transaction until another member has its partitions: the old generation is refused."""
    with place.cluster.trap(kafka.ADD_OFFSETS, count=2) as trap:
        sleeper = place.start()
        place.produce(400)
        assert trap.reached.wait(DEADLINE_SECONDS)
        done = place.count_done()
        sleeper.pause()
    heir = place.start()
    place.wait_until_done()
    assert place.count_done() - done > 0
    sleeper.process.send_signal(signal.SIGCONT)
    sleeper.wait_for("a transaction is aborted")
    place.produce(400)
    place.wait_until_done()
    for worker in (sleeper, heir):
        worker.stop()
    check_store(place, check_exactly_once(place))


@pytest.mark.parametrize("api", [kafka.ADD_PARTITIONS, kafka.ADD_OFFSETS, kafka.SEND_OFFSETS])
def test_events_of_an_aborted_transaction_are_answered_again(place, api):
    place.cluster.fail(api, kafka.UNKNOWN_MEMBER if api == kafka.SEND_OFFSETS else kafka.NOT_AUTHORISED)
    worker = place.start()
    place.produce(400)
    place.wait_until_done()
    assert "a transaction is aborted" in worker.stop()
    check_store(place, check_exactly_once(place))


def test_events_of_others_that_were_aborted_are_not_answered(place):
    source = Producer({"bootstrap.servers": place.cluster.address, "transactional.id": place.input})
    source.init_transactions(30)
    for number, end in [(5, source.abort_transaction), (6, source.commit_transaction)]:
        source.begin_transaction()
        source.produce(place.input, make_value(number), partition=0)
        assert source.flush(30) == 0  # aborting would throw away what is not yet written
        place.produced += 1
        end(30)
    worker = place.start()
    place.wait_until_done()
    worker.stop()
    assert [read_source(message) for message in place.read(place.output) + place.read(place.dead)] == [(0, 1)]


def test_answers_dead_letters_and_log_say_what_they_belong_to(place):
    huge = b"x" * 1_020_000
    for value, key in [
        (json.dumps({"customer_id": "fresh"}).encode(), b"one"),
        (None, b"nothing"),
        (b"[]", None),
        (json.dumps({"features": ROWS[0] | {"age": 500}}).encode(), b"\xff"),
        (b'{"customer_id": "stale"}', b"old"),
        (huge, b"huge"),
        (b"{}", b"k" * 20_000),
    ]:
        place.produce_one(value, key)
    worker = place.start()
    place.wait_until_done()
    assert "dead letters: 6" in worker.stop()
    (message,) = place.read(place.output)
    answer = json.loads(message.value())
    source = {"topic": place.input, "partition": read_source(message)[0], "offset": read_source(message)[1]}
    expected = {
        "prediction": 1,
        "model_version": "1",
        "variant": "champion",
        "request_id": f"{source['topic']}-{source['partition']}-{source['offset']}",
        "features_as_of": SNAPSHOT.isoformat(),
        "source": source,
    }
    assert answer.items() >= expected.items()
    assert is_issued(answer["prediction_id"], (place.state_dir / "id.key").read_bytes())
    assert answer["latency_ms"] > 0
    (logged,) = place.read_log()
    assert (logged.prediction_id, logged.source, logged.customer_id) == (answer["prediction_id"], "stream", "fresh")
    assert (logged.score, logged.features) == (answer["probability"], tuple(ROWS[0].values()))
    dead = {message.key(): message for message in place.read(place.dead)}
    errors = {key: json.loads(dict(one.headers())["closedloop-error"]) for key, one in dead.items()}
    rules = {key: (error["code"], error["details"][0]["field"]) for key, error in errors.items()}
    assert rules == {
        b"nothing": ("invalid_json", ""),
        None: ("invalid_request", ""),
        b"\xff": ("invalid_request", "features.age"),
        b"old": ("no_features", "customer_id"),
        b"huge": ("invalid_json", ""),
        b"k" * 10_000: ("invalid_request", ""),
    }
    assert errors[b"\xff"]["details"][0]["value"] == 500
    assert dead[b"nothing"].value() is None
    assert dead[b"huge"].value() == huge[:900_000]
    assert dict(dead[b"huge"].headers())["closedloop-cut-from"] == b"4 1020000 0"


def test_a_dead_letter_keeps_the_headers_of_its_event_and_says_when_that_was(place):
    own = [("trace", b"\xff\x00"), ("trace", b"again"), ("nothing", None), ("closedloop-error", b"of an earlier time")]
    many = [(f"header{number}", b"x" * 1000) for number in range(60)]
    place.produce_one(b"[]", b"one", headers=own, timestamp=1_700_000_000_123)
    place.produce_one(b"y" * 950_000, b"two", headers=many)
    worker = place.start()
    place.wait_until_done()
    worker.stop()
    dead = {message.key(): message.headers() for message in place.read(place.dead)}
    assert dead[b"one"][:3] == own[:3]
    names = [name for name, _ in dead[b"one"][3:]]
    assert names == ["closedloop-error", "closedloop-source", "closedloop-timestamp-ms"]
    assert json.loads(dict(dead[b"one"])["closedloop-error"])["code"] == "invalid_request"
    assert dict(dead[b"one"])["closedloop-timestamp-ms"] == b"1700000000123"
    assert [name for name, _ in dead[b"two"] if not name.startswith("closedloop-")] == []
    lengths = dict(dead[b"two"])["closedloop-cut-from"].split()
    assert lengths[:2] == [b"3", b"950000"]
    assert int(lengths[2]) > 60_000


def test_a_header_that_the_client_cannot_read_stops_no_worker(place):
    place.cluster.produce_with_header(place.input, b"[]", b"\xff\xfe")
    place.produced += 1
    place.produce_one(b"[]")
    worker = place.start()
    place.wait_until_done()
    worker.stop()
    assert [message.value() for message in place.read(place.dead)] == [b"[]", b"[]"]


def test_events_wait_while_the_online_store_is_away(place):
    place.online_path.rename(place.folder / "away.db")
    worker = place.start()
    place.produce(400)
    worker.wait_for("(?s)" + 3 * "events wait: online store.*")
    assert place.count_done() < place.produced
    (place.folder / "away.db").rename(place.online_path)
    place.wait_until_done()
    worker.stop()
    assert set(Counter(logged.prediction_id for logged in place.read_log()).values()) == {1}  # not at every attempt
    check_store(place, check_exactly_once(place))


def test_events_wait_until_a_model_is_ready(place):
    (place.state_dir / "slots.json").unlink()
    worker = place.start()
    place.produce(40)
    worker.wait_for("events wait for one")
    place.serve("2")
    place.wait_until_done()
    worker.stop()
    assert {answer["model_version"] for answer in check_exactly_once(place)} == {"2"}


def test_a_missing_topic_ends_the_worker_with_its_name(place):
    place.config = change_settings(place.config, dead_letter_topic="nowhere")
    worker = place.start()
    assert worker.process.wait(DEADLINE_SECONDS) == 1
    assert "stream.dead_letter_topic: nowhere" in worker.log


def test_a_wrong_property_ends_the_worker_with_its_name(place, monkeypatch):
    monkeypatch.setitem(PROPERTIES, "sasl.mechanism", "none such")
    worker = place.start()
    assert worker.process.wait(DEADLINE_SECONDS) == 1
    assert "stream.properties:" in worker.log
    assert "sasl.mechanism" in worker.log


def test_an_absent_broker_ends_the_worker_with_its_address(place):
    place.config = change_settings(place.config, brokers="127.0.0.1:1")
    worker = place.start()
    assert worker.process.wait(DEADLINE_SECONDS) == 1
    assert "stream.brokers 127.0.0.1:1" in worker.log


def test_the_same_event_gets_the_same_id_from_the_same_version_and_role(tmp_path):
    state_dir = tmp_path / "state"
    slots = {version: write_model_folder(tmp_path / version, bias=bias) for version, bias in BIASES.items()}
    champion, challenger = (Slot(version, str(path), digest_folder(path)) for version, path in slots.items())
    write_slots(state_dir, Slots(1, "", champion, challenger, "shadow"))
    config = describe_worker(state_dir)
    worker = Worker(config, EventBatcher)
    value = json.dumps({"features": ROWS[0]}).encode()
    event = Event("in", 3, 70, 1_700_000_000_000, None, value)
    events = [event, event, event._replace(offset=71), event._replace(partition=4), event._replace(timestamp_ms=1)]

    async def answer() -> list[dict[str, Any]]:
        messages, dead = await StreamWorker(config, None, worker, threading.Event()).answer(events)
        assert dead == []
        return [json.loads(message.value) for message in messages]

    ids = [one["prediction_id"] for one in asyncio.run(answer())]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4
    (spool,) = list_spools(state_dir / "spool")
    records = [line.record for path in list_segments(spool) for line in read_lines(path)]
    shadows = [record for record in records if record.variant == "shadow"]
    assert [record.answered_id for record in shadows] == ids
    assert len({record.prediction_id for record in records}) == 8
    assert all(record.score == pytest.approx(expected_score(ROWS[0], BIASES["2"]), abs=1e-6) for record in shadows)


def test_a_customer_cannot_be_asked_for_where_there_is_no_online_store(tmp_path):
    bundled = write_model_folder(tmp_path / "bundled")
    config = describe_worker(tmp_path / "state", bundled_dir=bundled)
    worker = Worker(config, EventBatcher)
    streaming = StreamWorker(config, None, worker, threading.Event())
    answered, (message,) = asyncio.run(streaming.answer([Event("in", 0, 0, 0, None, b'{"customer_id": "C1"}')]))
    assert (answered, message.topic) == ([], "dead")
    assert json.loads(dict(message.headers)["closedloop-error"])["code"] == "no_features"


def test_the_features_of_the_last_events_are_counted_when_the_worker_stops(tmp_path, monkeypatch):
    bundled = write_model_folder(tmp_path / "bundled")
    workers = []

    async def work(self):
        workers.append(self)
        (message,), _ = await self.answer([Event("in", 0, 0, 0, None, json.dumps({"features": ROWS[0]}).encode())])
        assert message.topic == "out"

    monkeypatch.setattr(stream, "EventStream", mock.Mock())
    monkeypatch.setattr(StreamWorker, "run", work)
    given = describe_worker(tmp_path / "state", bundled_dir=bundled)
    asyncio.run(run_stream(given, {}, threading.Event()))
    families = build_registry(tmp_path / "state/metrics").collect()
    counted = [one.value for family in families for one in family.samples if one.name == "feature_distribution_count"]
    assert set(counted) == {1.0}


def test_the_cluster_of_these_tests_isolates_and_fences(cluster):
    """Without the gateway, the mock shows aborted messages, forgets offsets and fences nobody."""
    topic = cluster.create_topic(f"plain-{os.urandom(4).hex()}", 1)
    settings = {"bootstrap.servers": cluster.address}
    source = Consumer({**settings, "group.id": topic, "auto.offset.reset": "earliest", "session.timeout.ms": 6000})
    source.subscribe([topic])
    first = Producer({**settings, "transactional.id": topic})
    first.init_transactions(30)

    def read(level: str) -> list[bytes]:
        reader = Consumer({**settings, "group.id": "reader", "isolation.level": level, "enable.partition.eof": True})
        reader.assign([TopicPartition(topic, 0, 0)])
        found = []
        while (message := reader.poll(180)) is not None and message.error() is None:
            found.append(message.value())
        reader.close()
        return found

    def write(producer: Producer, value: str, end: Callable[[float], None] | None) -> None:
        producer.begin_transaction()
        producer.produce(topic, value)
        assert producer.flush(30) == 0
        if end is not None:
            offset = [TopicPartition(topic, 0, len(value))]
            producer.send_offsets_to_transaction(offset, source.consumer_group_metadata(), 30)
            end(30)

    while not source.assignment():
        source.poll(0.1)
    write(first, "aborted", first.abort_transaction)
    assert (read("read_committed"), read("read_uncommitted")) == ([], [b"aborted"])
    assert (topic, (topic, 0)) not in cluster.committed
    write(first, "kept", first.commit_transaction)
    assert read("read_committed") == [b"kept"]
    assert cluster.committed[topic, (topic, 0)][0] == len("kept")
    write(first, "open", None)
    assert read("read_committed") == [b"kept"]
    second = Producer({**settings, "transactional.id": topic})
    second.init_transactions(30)
    write(second, "second", second.commit_transaction)
    assert read("read_committed") == [b"kept", b"second"]
    with pytest.raises(KafkaException, match="fenced"):
        first.commit_transaction(30)
    source.close()
