"""The feature store on real Feast: point in time, the same values on both sides, and a state for what is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.adapters import feast_store
from closedloop.adapters.feast import Features
from closedloop.adapters.feast_store import read_store_config
from closedloop.config.featureset import FeatureSet
from closedloop.config.settings import Settings, load_settings
from closedloop.errors import ConfigError, DataError, ServiceUnavailable
from closedloop.processes import start_process
from closedloop.stages.parts.online import materialize_newest
from closedloop.tabular.tables import write_table
from tests.online_rows import read_online
from tests.services import run_redis

MAX_AGE_DAYS = 31
FIRST, SECOND, THIRD = (dt.datetime(2024, 1, 1, tzinfo=dt.UTC) + dt.timedelta(days=30 * step) for step in range(3))
SHOP = FeatureSet(numeric=("spent", "visits"), categorical=("plan",), service="shop_0a")
COLUMNS = ["customer_id", *SHOP.names]
BuildStore = Callable[..., Features]


@pytest.fixture
def settings(make_project: Any, tmp_path: Path) -> Settings:
    return load_settings("local", folder=make_project(tmp_path / "project").root / "configs")


@pytest.fixture
def build_store(settings: Settings) -> BuildStore:
    """A data set's features in the one store of this test."""

    def build(project: str = "shop", features: FeatureSet = SHOP) -> Features:
        return Features(settings, project=project, features=features, max_age_days=MAX_AGE_DAYS)

    return build


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.thorough)])
def elsewhere(request: pytest.FixtureRequest, settings: Settings, tmp_path: Path) -> Iterator[BuildStore]:
    """The same on either online store, by the name of a machine: each has a folder of its own, all share the rest."""
    with contextlib.ExitStack() as stack:
        overrides = {}
        if request.param == "redis":
            address = stack.enter_context(run_redis(tmp_path)).address
            overrides = {"online_store": {"type": "redis", "connection_string": address}}

        def build(machine: str = "here") -> Features:
            changes = {"offline": str(tmp_path / machine), "overrides": overrides}
            changed = settings.model_copy(update={"features": settings.features.model_copy(update=changes)})
            return Features(changed, project="shop", features=SHOP, max_age_days=MAX_AGE_DAYS)

        yield build


def write_rows(folder: Path, rows_of: dict[dt.datetime, list[tuple[Any, ...]]], columns: list[str] = COLUMNS) -> Path:
    """One file a snapshot, as the features stage writes them."""
    for snapshot, rows in rows_of.items():
        frame = pd.DataFrame(rows, columns=columns)
        frame.insert(1, "event_timestamp", pd.Timestamp(snapshot).as_unit("us"))
        write_table(folder / f"{snapshot:%Y-%m-%d}.parquet", frame)
    return folder


def ask(*pairs: tuple[str, dt.datetime]) -> pd.DataFrame:
    frame = pd.DataFrame(pairs, columns=["customer_id", "event_timestamp"])
    return frame.astype({"event_timestamp": "datetime64[us, UTC]"})


def list_rows(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    """Rows as tuples, everything missing as None."""
    return [tuple(None if pd.isna(value) else value for value in row) for row in frame.itertuples(index=False)]


BY_HAND: dict[dt.datetime, list[tuple[Any, ...]]] = {
    FIRST: [("anna", 1.0, 10.0, "free"), ("ben", 2.0, None, None)],
    SECOND: [("anna", 3.0, None, "paid")],
    THIRD: [("anna", 5.0, 50.0, None), ("carl", 7.0, 70.0, "paid")],
}
NOTHING = (None, None, None)


def test_a_row_gets_the_newest_values_that_were_known_then(build_store: BuildStore, tmp_path: Path) -> None:
    day = dt.timedelta(days=1)
    cases = [
        ("anna", SECOND, (3.0, None, "paid")),  # a missing value is not filled from an older snapshot
        ("nobody", SECOND, NOTHING),
        ("carl", SECOND, NOTHING),  # his first values come later
        ("anna", SECOND - day, (1.0, 10.0, "free")),
        ("ben", FIRST + MAX_AGE_DAYS * day, (2.0, None, None)),  # as old as allowed
        ("ben", FIRST + (MAX_AGE_DAYS + 1) * day, NOTHING),  # expired
        ("anna", FIRST - day, NOTHING),
        ("anna", FIRST, (1.0, 10.0, "free")),
        ("carl", THIRD, (7.0, 70.0, "paid")),
        ("anna", SECOND, (3.0, None, "paid")),  # asked for twice
        ("anna", THIRD, (5.0, 50.0, None)),
    ]
    asked = ask(*((customer, time) for customer, time, _ in cases)).assign(churned=[True, False] * 5 + [True])
    asked.index = pd.Index(range(100, 111))
    before = asked.copy()
    joined = build_store().read_historical(asked, write_rows(tmp_path / "rows", BY_HAND))
    assert list(joined.columns) == [*asked.columns, *SHOP.names]
    pd.testing.assert_frame_equal(joined[list(asked.columns)], asked.reset_index(drop=True))
    assert list_rows(joined[list(SHOP.names)]) == [expected for _, _, expected in cases]
    pd.testing.assert_frame_equal(asked, before)


def test_a_customer_twice_in_a_snapshot_is_still_one_row(build_store: BuildStore, tmp_path: Path) -> None:
    rows = {FIRST: [("anna", 1.0, 1.0, "free"), ("anna", 1.0, 1.0, "free"), ("ben", 3.0, 3.0, "free")]}
    joined = build_store().read_historical(ask(("ben", FIRST), ("anna", FIRST)), write_rows(tmp_path / "rows", rows))
    assert list_rows(joined[list(SHOP.names)]) == [(3.0, 3.0, "free"), (1.0, 1.0, "free")]


def test_a_store_that_loses_rows_is_refused(settings: Settings, tmp_path: Path) -> None:
    """Feast's Dask store drops whom it has no values for, where the DuckDB store keeps them."""
    dask = settings.features.model_copy(update={"overrides": {"offline_store": {"type": "dask"}}})
    other = settings.model_copy(update={"features": dask})
    features = Features(other, project="shop", features=SHOP, max_age_days=MAX_AGE_DAYS)
    rows = write_rows(tmp_path / "rows", BY_HAND)
    assert len(features.read_historical(ask(("anna", FIRST), ("ben", FIRST)), rows)) == 2
    with pytest.raises(DataError, match="the point-in-time join returned 1 row for 2 asked for"):
        features.read_historical(ask(("anna", FIRST), ("carl", SECOND)), rows)


def draw_rows(customers: int) -> dict[dt.datetime, list[tuple[Any, ...]]]:
    """Customers who come and go, with missing values and numbers that do not survive a float32 or a decimal text."""
    draw = np.random.default_rng(3)
    plans = np.array(["free", "", "größer, 'quoted'", None], dtype=object)
    rows_of = {}
    for snapshot in (FIRST, SECOND, THIRD):
        present = [f"C{number:04}" for number in range(customers) if draw.random() < 0.7]
        spent = draw.choice([0.1 + 0.2, 1e-300, -1.0e15 / 3, 0.0, np.nan], len(present))
        visits = np.where(draw.random(len(present)) < 0.2, np.nan, draw.normal(size=len(present)))
        rows_of[snapshot] = list(zip(present, spent, visits, draw.choice(plans, len(present)), strict=True))
    return rows_of


def test_online_and_offline_are_the_same_for_a_thousand_customers(build_store: BuildStore, tmp_path: Path) -> None:
    rows_of, features = draw_rows(1000), build_store()
    features.publish(write_rows(tmp_path / "rows", rows_of))
    assert [features.materialize(snapshot) for snapshot in (FIRST, SECOND, THIRD)] == [True, True, True]
    newest = {row[0]: (row[1:], snapshot) for snapshot, rows in rows_of.items() for row in rows}
    everybody = [f"C{number:04}" for number in reversed(range(1000))]
    online = read_online(features, everybody, as_of=THIRD)
    offline = features.read_historical(ask(*((one, THIRD) for one in everybody)), features.offline_dir)
    fresh = (online.state == "fresh").to_numpy()
    names = list(SHOP.names)
    pd.testing.assert_frame_equal(
        online.features[fresh], offline.loc[fresh, names], check_exact=True, check_dtype=True, check_names=True
    )
    # and both are what was written, each customer's newest
    expected = pd.DataFrame([newest[one][0] if one in newest else NOTHING for one in everybody], columns=names)
    assert list_rows(online.features) == list_rows(expected)
    age = [THIRD - newest[one][1] if one in newest else None for one in everybody]
    assert online.state.tolist() == [
        "unknown" if days is None else "stale" if days.days > MAX_AGE_DAYS else "fresh" for days in age
    ]
    assert set(online.state) == {"fresh", "stale", "unknown"}
    # what is stale or unknown online has expired or never was offline
    assert offline.loc[~fresh, names].isna().all(axis=None)
    assert 100 < offline.loc[fresh, "visits"].isna().sum() < 300


def test_states_are_told_apart_and_nothing_missing_is_a_zero(build_store: BuildStore, tmp_path: Path) -> None:
    features = build_store()
    features.publish(
        write_rows(tmp_path / "rows", {FIRST: [("zero", 0.0, 0.0, ""), ("blank", None, None, None)]}),
    )
    features.materialize(FIRST)
    asked = ["nobody", "zero", "blank", "nobody", "zero"]
    last_day = FIRST + dt.timedelta(days=MAX_AGE_DAYS)
    for as_of, state in ((FIRST, "fresh"), (last_day, "fresh"), (last_day + dt.timedelta(seconds=1), "stale")):
        answer = read_online(features, asked, as_of=as_of)
        assert answer.state.tolist() == ["unknown", state, state, "unknown", state]
        assert list_rows(answer.features) == [NOTHING, (0.0, 0.0, ""), NOTHING, NOTHING, (0.0, 0.0, "")]
        known = pd.Timestamp(FIRST)
        assert list_rows(answer.snapshot_at.to_frame()) == [(None,), (known,), (known,), (None,), (known,)]


def test_times_are_numbers_online_whatever_else_wrote_to_sqlite(
    build_store: BuildStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, convert in sqlite3.converters.items():
        monkeypatch.setitem(sqlite3.converters, name, convert)  # how Feast's client reads times: of the whole process
    features = build_store()
    features.publish(write_rows(tmp_path / "rows", {day: [("one", 1.0, 2.0, "")] for day in (FIRST, SECOND)}))
    features.materialize(FIRST)
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        pd.DataFrame({"x": [1]}).to_sql("x", other)  # changes how this whole process stores times
    features.materialize(SECOND)
    assert read_online(features, ["one"], as_of=SECOND).state.tolist() == ["fresh"]


def test_an_older_snapshot_never_takes_the_place_of_a_newer_one(elsewhere: BuildStore, tmp_path: Path) -> None:
    features = elsewhere()
    features.publish(write_rows(tmp_path / "rows", BY_HAND))
    for snapshot, written in ((SECOND, True), (FIRST, False), (SECOND, True), (THIRD, True), (SECOND, False)):
        assert features.materialize(snapshot) is written
    answer = read_online(features, ["anna", "ben", "carl"], as_of=THIRD)
    # ben was in the first snapshot only, which was refused
    assert list_rows(answer.features) == [(5.0, 50.0, None), NOTHING, (7.0, 70.0, "paid")]
    assert answer.state.tolist() == ["fresh", "unknown", "fresh"]


def test_a_snapshot_older_than_what_another_machine_brought_online_is_left(
    elsewhere: BuildStore, tmp_path: Path
) -> None:
    """A retraining of a day that is taken up after the next day's refresh, in pods that share no volume."""
    rows = {day: [("anna", spent, None, "free")] for day, spent in ((FIRST, 1.0), (SECOND, 2.0))}
    folders = {day: write_rows(tmp_path / f"rows/{day:%F}", {day: rows[day]}) for day in rows}
    reports = {}
    for machine, day in (("refresh", SECOND), ("retraining", FIRST)):
        features = elsewhere(machine)
        features.publish(folders[day])
        reports[machine] = materialize_newest(features, folders[day], newest=day, seed=0)
    assert reports["refresh"]["materialized"] is True
    assert reports["retraining"] == {
        "snapshot": f"{FIRST:%F}",
        "materialized": False,
        "reason": "older than the store",
    }
    answer = read_online(elsewhere("refresh"), ["anna"], as_of=SECOND)
    assert (answer.features["spent"].tolist(), answer.snapshot_at.tolist()) == ([2.0], [pd.Timestamp(SECOND)])


def test_an_interval_that_ends_later_hides_no_newer_snapshot(build_store: BuildStore, tmp_path: Path) -> None:
    """As after `feast materialize-incremental`, which ends it at the wall clock, with dates in the past."""
    features = build_store()
    features.publish(write_rows(tmp_path / "rows", {FIRST: BY_HAND[FIRST]}))
    features.open_store().materialize(FIRST - dt.timedelta(days=1), dt.datetime.now(dt.UTC))
    features.publish(write_rows(tmp_path / "rows", BY_HAND))
    assert features.materialize(THIRD)


def test_a_snapshot_that_is_published_again_answers_with_its_new_rows(elsewhere: BuildStore, tmp_path: Path) -> None:
    features = elsewhere()
    for spent in (1.0, 2.0):
        features.publish(write_rows(tmp_path / "rows", {FIRST: [("anna", spent, None, "free")]}))
        features.materialize(FIRST)
        assert read_online(features, ["anna"], as_of=FIRST).features["spent"].tolist() == [spent]
    assert [path.name for path in features.offline_dir.iterdir()] == ["2024-01-01.parquet"]


def test_published_rows_are_read_only_if_every_snapshot_asked_for_is_there(
    build_store: BuildStore, tmp_path: Path
) -> None:
    features = build_store()
    features.publish(write_rows(tmp_path / "rows", {day: BY_HAND[day] for day in (FIRST, THIRD)}))
    found = features.read_published(ask(("carl", THIRD), ("anna", FIRST)))
    assert found is not None
    assert list_rows(found[list(SHOP.names)]) == [(7.0, 70.0, "paid"), (1.0, 10.0, "free")]
    # the join alone would answer with the first snapshot's value, 30 days old
    assert features.read_published(ask(("carl", THIRD), ("anna", SECOND))) is None


def test_two_data_sets_in_one_store_never_meet_though_ids_and_names_are_the_same(
    build_store: BuildStore, tmp_path: Path
) -> None:
    shop, bank = build_store("shop"), build_store("bank")
    shop.publish(write_rows(tmp_path / "shop", {FIRST: [("17", 1.0, 10.0, "free"), ("18", 2.0, 20.0, "free")]}))
    shop.materialize(FIRST)
    with pytest.raises(ServiceUnavailable, match="it holds no view shop_0a; train or refresh first"):
        read_online(bank, ["17"], as_of=FIRST)
    bank.publish(write_rows(tmp_path / "bank", {SECOND: [("17", -1.0, None, "gold")]}))
    bank.materialize(SECOND)
    assert shop.open_store().config.registry.path == bank.open_store().config.registry.path
    answers = {one.project: read_online(one, ["17", "18"], as_of=SECOND) for one in (shop, bank)}
    assert list_rows(answers["shop"].features) == [(1.0, 10.0, "free"), (2.0, 20.0, "free")]
    assert list_rows(answers["bank"].features) == [(-1.0, None, "gold"), NOTHING]
    assert answers["bank"].state.tolist() == ["fresh", "unknown"]
    assert read_online(shop, ["17"], as_of=SECOND).snapshot_at.tolist() == [pd.Timestamp(FIRST)]
    assert answers["bank"].snapshot_at.tolist()[0] == pd.Timestamp(SECOND)
    asked = ask(("17", SECOND), ("18", SECOND))
    offline = {one.project: one.read_historical(asked, one.offline_dir) for one in (shop, bank)}
    assert list_rows(offline["shop"][list(SHOP.names)]) == [(1.0, 10.0, "free"), (2.0, 20.0, "free")]
    assert list_rows(offline["bank"][list(SHOP.names)]) == [(-1.0, None, "gold"), NOTHING]


def test_a_second_definition_leaves_the_first_readable_on_both_sides(build_store: BuildStore, tmp_path: Path) -> None:
    first = build_store()
    first.publish(write_rows(tmp_path / "first", {FIRST: [("anna", 1.0, 10.0, "free")]}))
    first.materialize(FIRST)
    wider = FeatureSet(numeric=("spent", "spent_90d"), categorical=(), service="shop_0b")
    second = first.with_definition(wider)
    columns = ["customer_id", *wider.names]
    second.publish(write_rows(tmp_path / "second", {SECOND: [("anna", -3.0, 9.0)]}, columns))
    second.materialize(SECOND)
    store = first.open_store()
    for listed in (store.list_feature_views(), store.list_feature_services()):
        assert {item.name for item in listed} == {"shop_0a", "shop_0b"}
    for features, snapshot, values in ((first, FIRST, (1.0, 10.0, "free")), (second, SECOND, (-3.0, 9.0))):
        answer = read_online(features, ["anna"], as_of=SECOND)
        assert list_rows(answer.features) == [values]
        assert answer.snapshot_at.tolist() == [pd.Timestamp(snapshot)]
        published = features.read_published(ask(("anna", snapshot)))
        assert published is not None
        assert list_rows(published[list(features.features.names)]) == [values]
    # the first may be brought up to date again, as after a rollback
    first.publish(write_rows(tmp_path / "first", {SECOND: [("anna", 3.0, 30.0, "paid")]}))
    assert first.materialize(SECOND)
    assert list_rows(read_online(first, ["anna"], as_of=SECOND).features) == [(3.0, 30.0, "paid")]
    assert list_rows(read_online(second, ["anna"], as_of=SECOND).features) == [(-3.0, 9.0)]


def test_a_registry_that_does_not_answer_is_named_without_its_password(settings: Settings, tmp_path: Path) -> None:
    registry = {"registry_type": "sql", "path": "postgresql+psycopg://someone:s3cr3t@127.0.0.1:1/feast"}
    away = settings.features.model_copy(update={"overrides": {"registry": registry}})
    features = Features(
        settings.model_copy(update={"features": away}), project="shop", features=SHOP, max_age_days=MAX_AGE_DAYS
    )
    calls: list[Callable[[], Any]] = [
        lambda: features.publish(write_rows(tmp_path / "rows", BY_HAND)),
        lambda: features.materialize(FIRST),
        lambda: features.has_service(SHOP.service),
    ]
    for call in calls:
        with pytest.raises(ServiceUnavailable, match="feature store: ") as refused:
            call()
        assert "s3cr3t" not in str(refused.value)


def test_the_profile_says_where_the_stores_are(settings: Settings, tmp_path: Path) -> None:
    config = read_store_config(settings, "shop")
    state = settings.root / "state/feast"
    assert config["project"] == "shop"
    assert config["registry"]["path"] == f"sqlite:///{state}/registry.db"
    assert config["online_store"] == {"type": "sqlite", "path": f"{state}/online.db"}
    overrides = {"registry": {"path": "postgresql+psycopg://store/feast"}, "online_store": {"type": "redis"}}
    changed = settings.features.model_copy(update={"overrides": overrides})
    config = read_store_config(settings.model_copy(update={"features": changed}), "shop")
    assert config["registry"] == {"registry_type": "sql", "path": "postgresql+psycopg://store/feast"}
    assert config["online_store"]["type"] == "redis"
    (settings.root / "feature_repo/feature_store.yaml").write_text("project: shop\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"feature_store\.yaml: registry\.path and online_store\.type are required"):
        read_store_config(settings, "shop")


LOCKS = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
connection.execute("COMMIT")
"""


@contextlib.contextmanager
def hold_until_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let another process write to a SQLite file until this one says that it waits; alone SQLite waits five seconds."""
    with start_process(
        [sys.executable, "-c", LOCKS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        monkeypatch.setattr(feast_store.logger, "warning", lambda *_: other.stdin.close())
        yield
        assert other.stdin.closed


@pytest.mark.parametrize("name", ["online.db", "registry.db"])
def test_a_writer_waits_for_another_data_sets_writer(build_store, settings, tmp_path, monkeypatch, name):
    store = build_store()
    rows = write_rows(tmp_path / "rows", {FIRST: [("c1", 1.0, 2.0, "x")]})
    store.publish(rows)
    store.materialize(FIRST)
    second = build_store("other", dataclasses.replace(SHOP, service="other_0b"))
    with hold_until_waited_for(settings.root / "state/feast" / name, monkeypatch):
        second.publish(rows)
        assert second.materialize(FIRST)
    assert read_online(second, ["c1"], as_of=FIRST).state.tolist() == ["fresh"]


def test_the_first_that_lets_readers_in_while_it_writes_waits_for_a_writer_too(
    build_store, settings, tmp_path, monkeypatch
):
    store = build_store()
    store.publish(write_rows(tmp_path / "rows", {FIRST: [("c1", 1.0, 2.0, "x")]}))
    with hold_until_waited_for(settings.root / "state/feast/online.db", monkeypatch):
        assert store.materialize(FIRST)
