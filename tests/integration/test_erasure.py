"""A customer's features are taken away from either online store and from published files, and nobody else's are."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from closedloop.adapters import online_erasure
from closedloop.adapters.feast import Features
from closedloop.adapters.feast_store import read_store_config
from closedloop.adapters.online_erasure import erase_online, is_anybody_online
from closedloop.adapters.online_format import UNKNOWN
from closedloop.adapters.online_store import open_online_reader
from closedloop.config.featureset import FeatureSet
from closedloop.config.settings import Settings, load_settings
from closedloop.errors import ServiceUnavailable
from closedloop.files import hold_lock
from closedloop.loop import erasure
from closedloop.loop.erasure import erase_published
from closedloop.processes import start_process
from closedloop.store.predictions import list_spellings
from closedloop.tabular.tables import write_table
from tests.conftest import Project
from tests.http_service import wait_until
from tests.services import run_redis

pytestmark = pytest.mark.thorough

DAYS = [dt.datetime(2024, 1, day, tzinfo=dt.UTC) for day in (1, 2)]
# patterns, and ids of which one is a part of the other
CUSTOMERS = ["Kassandra", "Kassandr", "*", "?", "[a-z]", "\\", "1", "11", "größer", "x'; --"]
DEFINITIONS = {"shop": ("shop_0a", "shop_0b"), "bank": ("bank_0a",)}


@pytest.fixture(params=["sqlite", "redis"])
def settings(request: pytest.FixtureRequest, make_project: Any, tmp_path: Path) -> Iterator[Settings]:
    local = load_settings("local", folder=make_project(tmp_path / "project").root / "configs")
    with contextlib.ExitStack() as stack:
        overrides = {}
        if request.param == "redis":
            address = stack.enter_context(run_redis(tmp_path)).address
            overrides = {"online_store": {"type": "redis", "connection_string": address}}
        yield local.model_copy(update={"features": local.features.model_copy(update={"overrides": overrides})})


@pytest.fixture
def stores(settings: Settings, tmp_path: Path) -> list[Features]:
    """Two data sets with the same customers, one of them in two definitions, on two days."""
    for day in DAYS:
        stamp = pd.Timestamp(day).as_unit("us")
        rows = pd.DataFrame({"customer_id": CUSTOMERS, "event_timestamp": stamp, "spent": 1.0})
        write_table(tmp_path / f"rows/{day:%F}.parquet", rows)
    made = [
        Features(settings, project=project, features=FeatureSet(("spent",), (), name), max_age_days=31)
        for project, names in DEFINITIONS.items()
        for name in names
    ]
    for features in made:
        features.publish(tmp_path / "rows")
        features.materialize(DAYS[-1])
    return made


def list_online(settings: Settings, features: Features) -> list[str]:
    """The customers that the service knows."""

    async def read() -> list[Any]:
        config = read_store_config(settings, features.project)
        reader = open_online_reader(config, features.project, features.features.service, ("spent",), timeout_seconds=60)
        try:
            return await reader.read(CUSTOMERS)
        finally:
            await reader.close()

    return [customer for customer, row in zip(CUSTOMERS, asyncio.run(read()), strict=True) if row != UNKNOWN]


def read_online_store(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = read_store_config(settings, "shop")["online_store"]
    return found


def test_a_customer_is_erased_everywhere_and_nobody_else_is(settings: Settings, stores: list[Features]) -> None:
    online, left = read_online_store(settings), list(CUSTOMERS)
    a_customer = len(stores) if online["type"] == "sqlite" else len(DEFINITIONS)
    for customer in CUSTOMERS[:-1]:
        left.remove(customer)
        assert (erase_online(online, [customer]), erase_online(online, [customer])) == (a_customer, 0)
        for features in stores:
            assert list_online(settings, features) == left
    offline = settings.locate(settings.features.offline)
    written = {path: path.stat().st_mtime_ns for path in offline.rglob("*.parquet")}
    assert erase_published(offline, list_spellings("nobody")) == 0
    assert {path: path.stat().st_mtime_ns for path in offline.rglob("*.parquet")} == written
    assert erase_published(offline, list_spellings("Kassandra")) == len(written) == len(stores) * len(DAYS)
    for path in written:
        assert pd.read_parquet(path)["customer_id"].tolist() == CUSTOMERS[1:]
        assert b"Kassandra" not in path.read_bytes()
    asked = pd.DataFrame({"customer_id": CUSTOMERS[:2], "event_timestamp": pd.Timestamp(DAYS[-1]).as_unit("us")})
    joined = stores[0].read_published(asked)
    assert joined is not None
    assert joined["spent"].fillna(-1).tolist() == [-1, 1]


def test_a_customer_is_erased_under_each_spelling_of_the_id(settings: Settings, stores: list[Features]) -> None:
    """Rows from before ids had one spelling say 1.0 where newer ones say 1."""
    online, offline = read_online_store(settings), settings.locate(settings.features.offline)
    paths = sorted(offline.rglob("*.parquet"))
    for path in paths:
        rows = pd.read_parquet(path)
        rows.assign(customer_id=rows["customer_id"].replace("1", "1.0")).to_parquet(path, index=False)
    assert erase_published(offline, list_spellings("1")) == len(paths)
    assert not any("1.0" in pd.read_parquet(path)["customer_id"].tolist() for path in paths)
    assert erase_online(online, list_spellings("1.0")) > 0
    assert "1" not in list_online(settings, stores[0])


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_no_byte_of_an_erased_customer_is_left_in_the_file(settings: Settings, stores: list[Features]) -> None:
    online = read_online_store(settings)
    files = [Path(online["path"]), Path(online["path"] + "-wal")]

    def count() -> int:
        return sum(path.read_bytes().count(b"Kassandra") for path in files if path.exists())

    assert count() > 0
    erase_online(online, ["Kassandra"])
    assert count() == 0


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_a_reader_that_keeps_the_file_from_being_rewritten(
    settings: Settings, stores: list[Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online_erasure, "WAIT_SECONDS", 0.1)
    online = read_online_store(settings)
    with contextlib.closing(sqlite3.connect(online["path"], isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM shop_shop_0a").fetchall()
        with pytest.raises(ServiceUnavailable, match=r"online store .*: .* in use by another process; run it again"):
            erase_online(online, ["Kassandra"])
    erase_online(online, ["Kassandra"])


@pytest.mark.parametrize(
    "words", ["store erase --customer-id anna", "refresh --as-of 2024-01-01", "outcomes --as-of 2024-01-01"]
)
def test_what_erases_and_what_reads_the_source_wait_for_each_other(
    words: str, make_project: Any, tmp_path: Path
) -> None:
    """Else a refresh that read before the source forgot somebody would publish them after their erasure."""
    made, told = make_project(tmp_path / "project"), tmp_path / "told"
    made.run("store", "upgrade")
    root = made.root
    command = [sys.executable, "-m", "closedloop.cli.main", *words.split()]
    with told.open("wb") as output, hold_lock(root / "state/working.lock"):
        process = start_process(command, cwd=root, stdout=output, stderr=output)
        wait_until(lambda: "waiting for its end" in " ".join(told.read_text().split()), "the wait")
        assert not (root / "state/refresh").exists()
        if "erase" not in words:  # the others would read the whole shop
            process.kill()
    assert process.wait(180) == (0 if "erase" in words else -9)


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_half_a_publication_is_deleted_once_nobody_can_be_writing_it(
    settings: Settings, stores: list[Features]
) -> None:
    offline = settings.locate(settings.features.offline)
    half = next(offline.rglob("*.parquet")).with_name(".2024-01-03.parquet.17")
    half.write_bytes(b"Kassandra")
    with pytest.raises(ServiceUnavailable, match=r"17 is or just was being written; run it again later"):
        erase_published(offline, list_spellings("Kassandra"))
    assert half.exists()
    long_ago = half.stat().st_mtime - erasure.PUBLISHING_SECONDS_MAX - 60
    os.utime(half, (long_ago, long_ago))
    elsewhere = offline.rename(offline.with_name("elsewhere"))
    offline.mkdir()
    for project in elsewhere.iterdir():  # a data set on another disk
        (offline / project.name).symlink_to(project)
    assert erase_published(offline, list_spellings("Kassandra")) == len(stores) * len(DAYS)
    assert [path for path in elsewhere.rglob("*") if path.is_file() and b"Kassandra" in path.read_bytes()] == []


def test_where_nothing_was_brought_online_nothing_is_erased(settings: Settings) -> None:
    online, offline = read_online_store(settings), settings.locate(settings.features.offline)
    assert (erase_online(online, ["anna"]), is_anybody_online(online)) == (0, False)
    assert erase_published(offline, list_spellings("anna")) is None
    (offline / "shop/shop_0a").mkdir(parents=True)
    assert erase_published(offline, list_spellings("anna")) is None


def test_as_long_as_somebody_is_online_it_is_told(settings: Settings, stores: list[Features]) -> None:
    online = read_online_store(settings)
    for customer in CUSTOMERS:
        assert is_anybody_online(online)
        erase_online(online, [customer])
    assert not is_anybody_online(online)


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_published_features_that_cannot_be_read_are_no_success(settings: Settings, stores: list[Features]) -> None:
    offline = settings.locate(settings.features.offline)
    (offline / "shop/shop_0a/2024-01-01.parquet").write_bytes(b"torn")
    with pytest.raises(ServiceUnavailable, match=r"published features in .*/offline: .*; run it again"):
        erase_published(offline, list_spellings("anna"))
    (offline.parent / "file").write_bytes(b"")
    with pytest.raises(ServiceUnavailable, match="Not a directory"):
        erase_published(offline.parent / "file", list_spellings("anna"))


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_the_command_fails_where_features_are_online_and_those_published_lie_elsewhere(
    settings: Settings, stores: list[Features]
) -> None:
    project, offline = Project(settings.root), settings.locate(settings.features.offline)
    project.run("store", "upgrade")
    written = len(stores) * len(DAYS)
    output = project.run("store", "erase", "--customer-id", "1").output
    assert f"deleted rows of features: online {len(stores)}, published {written}, in {offline}\n" in output
    offline.rename(offline.with_name("elsewhere"))
    output = project.run("store", "erase", "--customer-id", "11", status=1).output
    assert f"deleted rows of features: online {len(stores)}; nothing is published in {offline}\n" in output
    assert "deleted: 0 predictions and 0 outcomes" in output  # all that can be reached
    assert "run it where those files lie" in output
    project.run("store", "erase", "--customer-id", "11", status=1)  # nor is it a success the second time


def test_a_redis_that_is_away_is_named() -> None:
    away = {"type": "redis", "connection_string": "127.0.0.1:1,password=s3cr3t"}
    with pytest.raises(ServiceUnavailable, match="online store: Error 111 connecting to") as refused:
        erase_online(away, ["anna"])
    assert "s3cr3t" not in str(refused.value)
