"""Rows read without Feast equal what Feast's own client answers, on SQLite and Redis, whatever happens to the store."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hiredis
import numpy as np
import pandas as pd
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import DoubleList
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from feast.types import Bool, Float32, Float64, Int32, Int64, String
from redis import Redis

from closedloop.adapters.feast import Features
from closedloop.adapters.feast_store import read_store_config
from closedloop.adapters.online_format import UNKNOWN, UNREADABLE, OnlineRow
from closedloop.adapters.online_store import OnlineReader, is_stale, open_online_reader
from closedloop.config.featureset import FeatureSet
from closedloop.config.settings import load_settings
from closedloop.errors import ConfigError, ServiceUnavailable
from closedloop.tabular.tables import write_table
from tests.services import RedisServer, require, run_redis

pytestmark = pytest.mark.thorough

SNAPSHOT = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
# Of each type a feature of this name, and the field of Feast's message that holds it.
TYPES = {"double": Float64, "text": String, "single": Float32, "long": Int64, "short": Int32, "flag": Bool}
FIELDS = dict(zip(TYPES, ("double_val", "string_val", "float_val", "int64_val", "int32_val", "bool_val"), strict=True))
TABLE = "shop_view"  # Feast's name for a view's table: project and view
TWO = "x'290000000000000040'"  # the stored form of 2.0: a tag byte and eight bytes
NOTHING = (None,) * len(TYPES)
NOBODY = "nobody at all"


@dataclass
class View:
    """A view, written and read by Feast."""

    folder: Path
    online: dict[str, Any]
    project: str = "shop"
    fields: tuple[str, ...] = tuple(TYPES)
    name: str = "view"

    def __post_init__(self) -> None:
        self.config: dict[str, Any] = {
            "project": self.project,
            "provider": "local",
            "registry": {"registry_type": "sql", "path": f"sqlite:///{self.folder}/registry.db"},
            "online_store": self.online,
            "entity_key_serialization_version": 3,
        }
        self.store = FeatureStore(config=RepoConfig(**self.config))
        entity = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
        source = FileSource(name="rows", path=f"{self.folder}/unused.parquet", timestamp_field="event_timestamp")
        schema = [Field(name=name, dtype=TYPES[name]) for name in self.fields]
        schema.append(Field(name="customer_id", dtype=String))
        view = FeatureView(name=self.name, entities=[entity], schema=schema, source=source, online=True)
        self.store.apply([entity, source, view])
        self.view = self.store.get_feature_view(self.name)

    def write(self, rows: dict[str, dict[str, ValueProto]], at: dt.datetime = SNAPSHOT) -> None:
        """Let Feast write exactly these messages."""
        data = [
            (EntityKey(join_keys=["customer_id"], entity_values=[ValueProto(string_val=customer)]), values, at, None)
            for customer, values in rows.items()
        ]
        self.store._get_provider().online_write_batch(self.store.config, self.view, data, None)

    def write_doubles(self, values: dict[str, float], at: dt.datetime = SNAPSHOT) -> None:
        self.write({customer: {"double": ValueProto(double_val=value)} for customer, value in values.items()}, at)

    def ask_feast(self, customers: Sequence[str]) -> list[OnlineRow]:
        """What Feast's client answers; numbers as floats, and who has no time is unknown."""
        entities = [{"customer_id": customer} for customer in customers]
        references = [f"{self.name}:{name}" for name in self.fields]
        answer = self.store.get_online_features(features=references, entity_rows=entities)
        columns = answer.to_dict(include_event_timestamps=True)
        rows = []
        for position, second in enumerate(columns[f"{self.fields[0]}__ts"]):
            values = [columns[name][position] for name in self.fields]
            values = [float(value) if isinstance(value, int | float) else value for value in values]
            row = OnlineRow(tuple(values), dt.datetime.fromtimestamp(second, dt.UTC))
            rows.append(row if second else UNKNOWN)
        return rows


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    require(shutil.which("redis-server"), "Redis")
    with run_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def client(one_server: RedisServer) -> Iterator[Redis]:
    """A client of a Redis that holds nothing."""
    with Redis(port=one_server.port) as client:
        client.flushall()
        yield client


@pytest.fixture(params=["sqlite", "redis"])
def online(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Where an online store is, in Feast's words."""
    if request.param == "sqlite":
        return {"type": "sqlite", "path": str(tmp_path / "online.db")}
    request.getfixturevalue("client")
    return {"type": "redis", "connection_string": request.getfixturevalue("one_server").address}


@pytest.fixture
def view(online: dict[str, Any], tmp_path: Path) -> View:
    return View(tmp_path, online)


@pytest.fixture
def on_sqlite(tmp_path: Path) -> View:
    return View(tmp_path, {"type": "sqlite", "path": str(tmp_path / "online.db")}, fields=("double",))


@pytest.fixture
def on_redis(tmp_path: Path, one_server: RedisServer, client: Redis) -> View:
    return View(tmp_path, {"type": "redis", "connection_string": one_server.address}, fields=("double",))


@pytest.fixture
def run() -> Iterator[Callable[[Any], Any]]:
    """Runs coroutines in one event loop, as a server does."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture
def open_reader(run: Callable[[Any], Any]) -> Iterator[Callable[..., OnlineReader]]:
    """Opens a reader of a view, patient by default, and closes it in the end."""
    opened = []

    def open_one(view: View, timeout_seconds: float = 60, names: Sequence[str] = (), **config: Any) -> OnlineReader:
        names = names or view.fields
        place = (view.config | config, view.project, view.name)
        opened.append(open_online_reader(*place, names, timeout_seconds=timeout_seconds))
        return opened[-1]

    yield open_one
    for reader in opened:
        run(reader.close())


@pytest.fixture
def read(run: Callable[[Any], Any], open_reader: Callable[..., OnlineReader]) -> Callable[..., list[OnlineRow]]:
    """Rows of customers, by a view's new reader or a given one."""

    def read_rows(place: Any, customers: Sequence[str]) -> list[OnlineRow]:
        reader = open_reader(place) if isinstance(place, View) else place
        rows: list[OnlineRow] = run(reader.read(customers))
        return rows

    return read_rows


def known(*values: float | str | None, at: dt.datetime = SNAPSHOT) -> OnlineRow:
    return OnlineRow(values, at)


def number_customers(count: int) -> dict[str, float]:
    return {f"C{number:05}": float(number) for number in range(count)}


INTEGERS = [0, 1, -1, 127, 128, 300, 2**31 - 1, -(2**31)]
EACH_VALUE: list[tuple[str, Any]] = [
    *(("double", value) for value in (0.0, -0.0, 1.5, 0.1 + 0.2, -1e15 / 3, 1e300, 5e-324, -2.2e-308)),
    *(("double", float(value)) for value in ("inf", "-inf", "nan", "1.7976931348623157e308")),
    *(("single", float(value)) for value in ("0", "-0.0", "0.5", "0.1", "1e-45", "3.4e38", "-inf", "nan")),
    *(("text", value) for value in ("", " ", "größer", "日本語 🙂", "a\x00b", "x" * 127, "x" * 128, "ä" * 20_000)),
    *(("long", value) for value in (*INTEGERS, 2**53 + 1, 2**63 - 1, -(2**63))),
    *(("short", value) for value in INTEGERS),
    *(("flag", value) for value in (True, False)),
]


def test_every_type_and_every_odd_value_is_what_feast_answers(view, read):
    """Compared as printed, so that a NaN equals itself and a negative zero does not equal zero."""
    rows = {
        f"C{position}": {name: ValueProto(**{FIELDS[name]: value})} for position, (name, value) in enumerate(EACH_VALUE)
    }
    view.write(rows)
    found = read(view, list(rows))
    assert [repr(row) for row in found] == [repr(row) for row in view.ask_feast(list(rows))]
    for (name, value), row in zip(EACH_VALUE, found, strict=True):
        written = value if name == "text" else float(np.float32(value) if name == "single" else value)
        expected = [written if field == name else None for field in TYPES]
        assert repr(row) == repr(known(*expected))


def test_a_thousand_customers_as_materialised(view, read):
    """Any bits as doubles, among them every kind of NaN; what pandas holds to be missing is stored as nothing."""
    draw, customers = np.random.default_rng(0), 1_000
    frame = pd.DataFrame({"customer_id": list(number_customers(customers)), "event_timestamp": SNAPSHOT})
    bits = draw.integers(0, 2**64, customers, dtype=np.uint64).view(np.float64)
    frame["double"] = np.where(draw.random(customers) < 0.1, np.nan, bits)
    frame["text"] = draw.choice(np.array(["free", "", "größer, 'quoted'", None], dtype=object), customers)
    frame["single"] = draw.normal(size=customers).astype(np.float32)
    frame["long"] = draw.integers(-(2**63), 2**63 - 1, customers)
    frame["short"] = draw.integers(-(2**31), 2**31 - 1, customers, dtype=np.int32)
    frame["flag"] = draw.random(customers) < 0.5
    view.store.write_to_online_store("view", frame)
    asked = [*frame["customer_id"], NOBODY]
    found = read(view, asked)
    assert found == view.ask_feast(asked)
    assert found[-1] == UNKNOWN
    columns = [frame[name].astype(object).where(frame[name].notna(), None) for name in TYPES]
    assert 50 < columns[0].isna().sum() < 150
    assert [row.values for row in found[:-1]] == [
        tuple(value if value is None or isinstance(value, str) else float(value) for value in values)
        for values in zip(*columns, strict=True)
    ]


def test_unknown_empty_and_partly_written_customers_are_told_apart(view, read):
    View(view.folder, view.online, name="other").write_doubles({"elsewhere": 1.0})
    one, two = ValueProto(double_val=1), ValueProto(string_val="two")
    view.write({"part": {"text": two}, "nulls": {name: ValueProto() for name in TYPES}})
    view.write({"full": {"double": one, "text": two}, "null": {"double": ValueProto(null_val=0), "text": two}})
    view.write({"full": {"text": ValueProto()}}, at=SNAPSHOT + DAY)  # one value is written anew, as nothing
    part, nulls, full = known(None, "two", *NOTHING[2:]), known(*NOTHING), known(1.0, *NOTHING[1:], at=SNAPSHOT + DAY)
    asked = ["part", NOBODY, "nulls", "elsewhere", "full", "part"]
    assert read(view, asked) == view.ask_feast(asked) == [part, UNKNOWN, nulls, UNKNOWN, full, part]
    assert read(view, ["null"]) == [part]  # Feast shows the message's own null, which it does not write, as 0
    assert read(view, []) == []


def test_a_store_without_rows_is_empty(view, open_reader, run):
    reader = open_reader(view)
    assert run(reader.is_empty())
    view.write_doubles({"anna": 1.0})
    assert not run(reader.is_empty())


def test_ids_of_any_kind(view, read):
    odd = ["", " ", "1", "01", "11", "größer", "日本 🙂", "a'b\"c;--", "a\x00b", "a\r\nb", "*", "x" * 70_000, "shop"]
    view.write_doubles({customer: float(number) for number, customer in enumerate(odd)})
    half_a_pair = "\ud800"  # valid JSON, no valid text
    found = read(view, [*odd, half_a_pair, "1 ", "A'B\"C;--"])
    assert found == [*view.ask_feast(odd), UNKNOWN, UNKNOWN, UNKNOWN]
    assert [row.values[0] for row in found[: len(odd)]] == list(range(len(odd)))


def test_projects_with_the_same_ids_and_view_never_mix(online, tmp_path, read):
    projects, customers = ("shop", "bank", "shopshop", "p", "sho"), ["17", "18", "shop", "pp", "x"]
    views = [View(tmp_path, online, project=project, fields=("double",)) for project in projects]
    for number, view in enumerate(views):
        view.write_doubles({customer: number + position / 10 for position, customer in enumerate(customers[number:])})
    for number, view in enumerate(views):
        written = [known(number + position / 10) for position in range(len(customers) - number)]
        assert read(view, customers) == view.ask_feast(customers) == [UNKNOWN] * number + written


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Auckland", "America/St_Johns"])
def test_snapshot_times_in_any_zone(view, read, monkeypatch, zone):
    """Feast's SQLite store takes UTC for local time as it writes, and local time for UTC as it reads."""
    odd = dt.datetime(2090, 2, 28, 23, 59, 59, tzinfo=dt.UTC)
    times = {"winter": SNAPSHOT, "summer": SNAPSHOT + 190 * DAY, "early": SNAPSHOT - 19_000 * DAY, "odd": odd}
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        for customer, at in times.items():
            view.write_doubles({customer: 1.0}, at)
        found, feast = read(view, list(times)), view.ask_feast(list(times))
    time.tzset()
    assert found == feast
    assert [row.snapshot_at for row in found] == list(times.values())


def test_only_the_features_asked_for_in_their_order(view, open_reader, read):
    view.write({"anna": {"double": ValueProto(double_val=1), "text": ValueProto(string_val="two")}})
    for names, values in ((("text", "double"), ("two", 1.0)), (("text",), ("two",)), (("flag", "text"), (None, "two"))):
        assert read(open_reader(view, names=names), ["anna"]) == [known(*values)]


def test_a_value_that_no_model_takes(view, open_reader, read):
    doubles = ValueProto(double_list_val=DoubleList(val=[1.0]))
    view.write({"list": {"double": doubles}, "bytes": {"text": ValueProto(bytes_val=b"x")}})
    view.write_doubles({"good": 1.0})
    found = read(open_reader(view), ["good", "list", "bytes", NOBODY])
    assert found == [known(1.0, *NOTHING[1:]), UNREADABLE, UNREADABLE, UNKNOWN]  # its neighbours have their rows


def test_reads_at_the_same_time_get_their_own_rows(view, open_reader, run):
    customers = number_customers(200)
    view.write_doubles(customers)
    reader, asked = open_reader(view), [list(customers)[start : start + 3] for start in range(200)]

    async def read_all() -> list[list[OnlineRow]]:
        return await asyncio.gather(*(reader.read(some) for some in asked))

    assert run(read_all()) == [[known(customers[one], *NOTHING[1:]) for one in some] for some in asked]


def test_rows_are_whole_and_there_while_feast_writes_them_anew(make_project, online, tmp_path, run):
    """A customer's values all belong to one snapshot; with SQLite, nobody even has to wait for the writer."""
    settings = load_settings("local", folder=make_project(tmp_path / "project").root / "configs")
    overrides = {"online_store": online, "registry": {"path": f"sqlite:///{tmp_path}/registry.db"}}
    settings = settings.model_copy(update={"features": settings.features.model_copy(update={"overrides": overrides})})
    names = tuple(f"number_{position}" for position in range(8))
    features = Features(settings, project="shop", features=FeatureSet(names, (), "shop_0a"), max_age_days=31)
    customers, days = list(number_customers(2_000)), [SNAPSHOT + step * DAY for step in range(3)]
    for step, day in enumerate(days):
        frame = pd.DataFrame({"customer_id": customers, "event_timestamp": pd.Timestamp(day).as_unit("us")})
        write_table(tmp_path / f"rows/{day:%Y-%m-%d}.parquet", frame.assign(**dict.fromkeys(names, float(step))))
    features.publish(tmp_path / "rows")
    features.materialize(days[0])
    rows = [known(*[float(step)] * len(names), at=day) for step, day in enumerate(days)]
    config, limit = read_store_config(settings, "shop"), 0 if online["type"] == "sqlite" else 60
    reader = open_online_reader(config, "shop", "shop_0a", names, timeout_seconds=limit)

    async def read_while_writing() -> int:
        reads, writing = (
            0,
            asyncio.create_task(asyncio.to_thread(lambda: [features.materialize(day) for day in days[1:]])),
        )
        while not writing.done():
            assert set(await reader.read(customers[::300])) <= set(rows)
            reads += 1
            await asyncio.sleep(0.002)  # a loop without a pause would keep the interpreter from the writer
        assert await writing == [True, True]
        return reads

    assert run(reader.read(customers)) == [rows[0]] * len(customers)
    assert run(read_while_writing()) > 10
    assert run(reader.read(customers)) == [rows[2]] * len(customers)
    if online["type"] == "sqlite":  # nothing of the old file is left beside it that would cover the new one
        shutil.copy(online["path"], tmp_path / "copy.db")
        with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as store, store:
            store.execute(f"UPDATE shop_shop_0a SET value = {TWO.replace('0040', '1040')}")
        (tmp_path / "copy.db").replace(online["path"])
        assert run(reader.read(customers)) == [known(*[4.0] * len(names), at=days[2])] * len(customers)
    run(reader.close())


def test_a_sqlite_file_that_goes_comes_and_is_replaced(on_sqlite, open_reader, read):
    on_sqlite.write_doubles({"anna": 1.0})
    place, reader = Path(on_sqlite.online["path"]), open_reader(on_sqlite)
    away, other = place.with_name("away.db"), place.with_name("other.db")
    assert read(reader, ["anna"]) == [known(1.0)]
    place.rename(away)
    with pytest.raises(ServiceUnavailable, match="online store: it holds no view view; train or refresh first"):
        read(reader, ["anna"])
    place.write_bytes(b"not a database" * 1_000)
    with pytest.raises(ServiceUnavailable, match="online store: file is not a database"):
        read(reader, ["anna"])
    with contextlib.closing(sqlite3.connect(other)) as store:
        store.execute("CREATE TABLE another (view)")
    other.replace(place)
    with pytest.raises(ServiceUnavailable, match="online store: it holds no view view; train or refresh first"):
        read(reader, ["anna"])
    shutil.copy(away, other)
    away.replace(place)
    assert read(reader, ["anna"]) == [known(1.0)]
    with contextlib.closing(sqlite3.connect(other)) as store, store:
        store.execute(f"UPDATE {TABLE} SET value = {TWO}")
    other.replace(place)
    assert read(reader, ["anna"]) == [known(2.0)]


def test_nothing_is_ever_written_to_a_sqlite_file(on_sqlite, open_reader, read, monkeypatch):
    on_sqlite.write_doubles({"anna": 1.0})
    opened, connect = [], sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *given, **options: opened.append(connect(*given, **options)) or opened[-1]
    )
    reader, before = open_reader(on_sqlite), Path(on_sqlite.online["path"]).read_bytes()
    read(reader, ["anna", NOBODY])
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        opened[0].execute(f"DELETE FROM {TABLE}")
    assert Path(on_sqlite.online["path"]).read_bytes() == before


WRITE_AND_DIE = f"""
import os, sqlite3, sys
store = sqlite3.connect(sys.argv[1])
store.execute("PRAGMA cache_size=10")  # so that the file itself is written to before the commit
store.execute("BEGIN")
store.execute("UPDATE {TABLE} SET value = {TWO}")
os._exit(9)
"""


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_a_writer_that_was_killed_leaves_the_old_rows(on_sqlite, read, journal):
    customers, place = number_customers(3_000), on_sqlite.online["path"]
    on_sqlite.write_doubles(customers)
    with contextlib.closing(sqlite3.connect(place)) as store:
        assert store.execute(f"PRAGMA journal_mode={journal}").fetchone() == (journal,)
    before = Path(place).read_bytes()
    assert subprocess.run([sys.executable, "-c", WRITE_AND_DIE, place], check=False).returncode == 9
    assert (Path(place).read_bytes() != before) == (journal == "delete")
    assert read(on_sqlite, list(customers)) == [known(value) for value in customers.values()]


def test_waiting_for_a_lock_blocks_nobody_else(on_sqlite, open_reader, read, run):
    on_sqlite.write_doubles({"anna": 1.0})
    reader = open_reader(on_sqlite)

    async def read_locked(writer: sqlite3.Connection) -> list[OnlineRow]:
        reading = asyncio.create_task(reader.read(["anna"]))
        await asyncio.sleep(0)
        assert not reading.done()
        # the lock goes only because this runs while the reader waits in the same loop
        writer.execute(f"UPDATE {TABLE} SET value = {TWO}")
        writer.execute("COMMIT")
        return await reading

    with contextlib.closing(sqlite3.connect(on_sqlite.online["path"], isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        assert run(read_locked(writer)) == [known(2.0)]
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ServiceUnavailable, match="online store: database is locked"):
            read(open_reader(on_sqlite, timeout_seconds=0.01), ["anna"])


def test_redis_stopped_and_started_again(on_redis, one_server, open_reader, read):
    reader = open_reader(on_redis)
    on_redis.write_doubles({"anna": 1.0})
    assert read(reader, ["anna"]) == [known(1.0)]
    one_server.stop()
    try:
        for _ in range(3):
            with pytest.raises(ServiceUnavailable, match="online store: no rows in 60000 ms") as caught:
                read(reader, ["anna"])
            assert str(one_server.port) not in str(caught.value)
    finally:
        one_server.start()
    assert read(reader, ["anna"]) == [UNKNOWN]  # this server keeps nothing
    on_redis.write_doubles({"anna": 2.0})
    assert read(reader, ["anna"]) == [known(2.0)]
    one_server.stop()
    one_server.start()  # unnoticed: the connection looks alive until it is used
    assert read(reader, ["anna"]) == [UNKNOWN]


def test_a_redis_that_hangs_holds_nobody_up_and_its_late_answers_reach_nobody(on_redis, client, open_reader, read, run):
    on_redis.write_doubles({"anna": 1.0, "ben": 2.0})
    hasty, patient = open_reader(on_redis, timeout_seconds=0.05), open_reader(on_redis)
    assert read(patient, ["anna"]) == [known(1.0)]

    async def read_and_cancel() -> None:
        reading = asyncio.create_task(patient.read(["anna"]))
        for _ in range(50):
            await asyncio.sleep(0)
        assert reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    pid = client.info("server")["process_id"]
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(2):
            with pytest.raises(ServiceUnavailable, match="online store: no rows in 50 ms"):
                read(hasty, ["anna"])
        run(read_and_cancel())
    finally:
        os.kill(pid, signal.SIGCONT)
    for _ in range(3):
        assert read(patient, ["ben", NOBODY]) == [known(2.0), UNKNOWN]


def test_a_key_of_another_kind_in_redis(on_redis, client, open_reader, read):
    on_redis.write_doubles({"anna": 1.0, "ben": 2.0})
    (key,) = (key for key in client.scan_iter() if b"anna" in key)
    client.set(key, "text")
    reader = open_reader(on_redis)
    for _ in range(2):
        with pytest.raises(ServiceUnavailable, match="online store: it refuses to be read"):
            read(reader, ["ben", "anna", "ben", "ben"])
        assert read(reader, [NOBODY, "ben"]) == [UNKNOWN, known(2.0)]


def test_an_answer_after_a_failed_read_is_not_taken_for_the_next_one(on_redis, open_reader, run):
    """A server that sends the first of two answers, an error, at once and the other one only before the next."""
    requests, bodies = hiredis.Reader(), {b"ben": 2.0, b"carl": 3.0}

    async def serve(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        owed = b""
        while received := await stream.read(65_536):
            requests.feed(received)
            while (request := requests.gets()) is not False:
                double = b"".join(struct.pack("<Bd", 0x29, bodies[name]) for name in bodies if name in request[1])
                row = b"*2\r\n$9\r\n" + double + b"\r\n$0\r\n\r\n"
                if request[0] != b"HMGET":
                    writer.write(b"+OK\r\n")
                elif b"anna" in request[1]:
                    writer.write(b"-WRONGTYPE\r\n")
                elif b"ben" in request[1]:
                    owed = row
                else:
                    writer.write(owed + row)
        writer.close()

    async def read_twice() -> list[OnlineRow]:
        async with await asyncio.start_server(serve, "127.0.0.1") as server:
            address = "{}:{}".format(*server.sockets[0].getsockname())
            reader = open_reader(on_redis, online_store={"type": "redis", "connection_string": address})
            with pytest.raises(ServiceUnavailable, match="online store: it refuses to be read"):
                await reader.read(["anna", "ben"])
            rows = await reader.read(["carl"])
            await reader.close()
            return rows

    assert run(read_twice()) == [known(3.0, at=dt.datetime(1970, 1, 1, tzinfo=dt.UTC))]


def test_a_redis_with_a_password_and_another_database(on_redis, one_server, client, open_reader, read):
    on_redis.write_doubles({"anna": 1.0})
    client.config_set("requirepass", "s3=cret")
    try:
        online = {"type": "redis", "connection_string": f"{one_server.address},db=3,password=s3=cret"}
        other = View(on_redis.folder, online, fields=("double",))
        other.write_doubles({"anna": 3.0})
        assert read(other, ["anna"]) == other.ask_feast(["anna"]) == [known(3.0)]
        for wrong in (f"{one_server.address},password=wr0ng", one_server.address):
            reader = open_reader(other, online_store={"type": "redis", "connection_string": wrong})
            with pytest.raises(ServiceUnavailable, match="online store: it refuses to be read") as caught:
                read(reader, ["anna"])
            assert "wr0ng" not in str(caught.value)
    finally:
        client.config_set("requirepass", "")


CLUSTER = {"type": "redis", "redis_type": "redis_cluster", "connection_string": "one:1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"online_store": {"type": "dynamodb"}}, r"online_store\.type is dynamodb.*; sqlite and redis \(one server\)"),
        ({"online_store": CLUSTER}, r"online_store\.type is redis with redis_type redis_cluster; sqlite and redis"),
        ({"entity_key_serialization_version": 2}, "entity_key_serialization_version is 2, must be 3"),
        ({"registry": {"enable_online_feature_view_versioning": True}}, "versioning must be off"),
    ],
)
def test_forms_that_are_not_read_are_refused(change, message):
    config = {"registry": {}, "online_store": {"type": "sqlite", "path": "unused.db"}} | change
    with pytest.raises(ConfigError, match=message):
        open_online_reader(config, "shop", "view", ["double"])


READ = """
import asyncio, json, sys
from closedloop.adapters.feast_store import read_store_config
from closedloop.adapters.online_store import open_online_reader
reader = open_online_reader(json.loads(sys.argv[1]), "shop", "view", ["double"])
print(asyncio.run(reader.read(["anna"]))[0].values)
print(sorted(name for name in ("feast", "google", "mlflow", "pandas", "sklearn", "sqlalchemy") if name in sys.modules))
"""


def test_reading_imports_neither_feast_nor_pandas(view):
    view.write_doubles({"anna": 1.0})
    ran = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(view.config)], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "(1.0,)\n[]\n"


def test_a_row_is_stale_beyond_the_age_that_is_allowed():
    for age, stale in ((-DAY, False), (0 * DAY, False), (31 * DAY, False), (31.01 * DAY, True)):
        assert is_stale(SNAPSHOT, SNAPSHOT + age, 31) is stale
