"""Rows brought to Redis at once are, byte for byte, those that Feast writes there value by value."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from redis import Redis

from closedloop.adapters import online_writer
from closedloop.adapters.feast import Features
from closedloop.adapters.online_writer import is_plain_redis
from closedloop.config.featureset import FeatureSet
from closedloop.config.settings import load_settings
from closedloop.errors import ServiceUnavailable
from closedloop.tabular.tables import write_table
from tests.online_rows import read_online
from tests.services import RedisServer, run_redis

AT = dt.datetime(2024, 1, 31, tzinfo=dt.UTC)
MIXED = FeatureSet(numeric=("spent", "visits"), categorical=("plan", "Città"), service="mixed")
NUMBERS, TEXTS = FeatureSet(("spent",), (), "numbers"), FeatureSet((), ("plan",), "texts")
ROWS = pd.DataFrame(
    {
        "customer_id": ["anna", "Jürgen Ö.", "", "7", "0007", "c" * 200],
        "event_timestamp": AT,
        "spent": [0.0, -0.0, float("inf"), None, 1e-310, 2.0**60],
        "visits": [None, None, None, None, 3.0, 4.0],
        "plan": ["", None, "a\r\nb", "x" * 127, "x" * 128, "日本" * 9_000],
        "Città": ["Forlì"] * 6,
    }
)
OpenStore = Callable[[FeatureSet, int], Features]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with run_redis(tmp_path_factory.mktemp("redis")) as found:
        yield found


@pytest.fixture
def open_store(make_project: Any, server: RedisServer, tmp_path: Path) -> OpenStore:
    """A feature store whose online rows lie in one of the server's databases, which is empty."""
    settings = load_settings("local", folder=make_project(tmp_path / "project").root / "configs")

    def build(features: FeatureSet, database: int) -> Features:
        connect(server, database).flushdb()
        online = {"type": "redis", "connection_string": f"{server.address},db={database}"}
        there = settings.features.model_copy(update={"overrides": {"online_store": online}})
        mine = settings.model_copy(update={"features": there})
        return Features(mine, project="shop", features=features, max_age_days=31)

    return build


def connect(server: RedisServer, database: int) -> Redis:
    host, port = server.address.split(":")
    return Redis(host=host, port=int(port), db=database)


def publish(store: Features, rows: pd.DataFrame, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    names = ["customer_id", "event_timestamp", *store.features.names]
    write_table(folder / f"{AT:%Y-%m-%d}.parquet", rows[names])
    store.publish(folder)


def list_stored(server: RedisServer, database: int) -> dict[bytes, dict[bytes, bytes]]:
    client = connect(server, database)
    return {key: client.hgetall(key) for key in client.scan_iter()}


@pytest.mark.parametrize("features", [MIXED, NUMBERS, TEXTS], ids=lambda one: one.service)
def test_the_bytes_are_those_of_feast(
    features: FeatureSet,
    open_store: OpenStore,
    server: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(online_writer, "CHUNK_ROWS", 4)  # more than one part
    ours, feasts = open_store(features, 1), open_store(features, 2)
    publish(ours, ROWS, tmp_path / "rows")
    assert ours.materialize(AT)
    second = dt.timedelta(seconds=1)
    feasts.open_store().materialize(AT - second, AT + second, feature_views=[features.service])
    assert len(list_stored(server, 1)) == len(ROWS)
    assert list_stored(server, 1) == list_stored(server, 2)


def test_feast_knows_what_was_brought_online(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store(MIXED, 1)
    publish(store, ROWS, tmp_path / "rows")
    assert store.materialize(AT)
    (interval,) = store.open_store().get_feature_view("mixed").materialization_intervals
    assert interval[0] < AT < interval[1]


def test_corrected_rows_of_the_same_day_replace_what_is_online(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store(NUMBERS, 1)
    for spent in (1.0, None, 2.0):
        publish(store, ROWS.assign(spent=pd.Series([spent] * len(ROWS), dtype="float64")), tmp_path / "rows")
        assert store.materialize(AT)
        found = read_online(store, ["anna"], as_of=AT).features["spent"].tolist()
        assert found == ([spent] if spent is not None else pytest.approx([float("nan")], nan_ok=True))


def test_a_server_that_goes_away_or_refuses_is_an_error(
    open_store: OpenStore, server: RedisServer, tmp_path: Path
) -> None:
    store = open_store(NUMBERS, 1)
    publish(store, ROWS, tmp_path / "rows")
    client = connect(server, 1)
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(ServiceUnavailable, match="maxmemory"):
            store.materialize(AT)
    finally:
        client.config_set("maxmemory", 0)
    assert store.materialize(AT)


def test_what_other_options_of_the_store_mean_is_left_to_feast() -> None:
    plain = {"type": "redis", "connection_string": "one:1"}
    assert is_plain_redis(plain)
    assert is_plain_redis({**plain, "redis_type": "redis"})
    for other in ({"key_ttl_seconds": 60}, {"redis_type": "redis_cluster"}, {"type": "sqlite", "path": "online.db"}):
        assert not is_plain_redis({**plain, **other})
