"""Gates around features: a leak from the future, features too old, an online store that answers otherwise."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import shutil
import sqlite3

import pandas as pd

from closedloop.config.layout import Layout
from closedloop.tabular.tables import write_table


def compute_leaking_features(shop, days):
    """Every snapshot's features from events up to ``days`` after it: the engine runs with a clock that is ahead."""
    from closedloop.bootstrap import build_engine, load_run
    from closedloop.config.featureset import build_window_spec
    from closedloop.stages.features import write_window_features
    from closedloop.stages.parts.snapshots import list_feature_snapshots

    run, data = load_run(shop.root / "params.yaml", root=shop.root), shop.root / "data"
    spec = build_window_spec(run.params, run.dataset)
    # those who were active at the true snapshot stay in
    spec = dataclasses.replace(spec, active_days=spec.active_days + days)
    ahead = dt.timedelta(days=days)
    snapshots = list_feature_snapshots(run.params, run.dataset, data / "raw/events")
    columns = run.dataset.columns
    attributes = dict.fromkeys(columns.numeric, "numeric") | dict.fromkeys(columns.categorical, "categorical")
    with build_engine(run) as engine:
        write_window_features(
            Layout(raw=data / "raw", daily=data / "daily", features=data / "ahead"),
            engine,
            spec=spec,
            snapshots=[snapshot + ahead for snapshot in snapshots],
            attributes=attributes,
            since_column=columns.since,
        )
    for snapshot in snapshots:
        rows = pd.read_parquet(data / f"ahead/{snapshot + ahead:%Y-%m-%d}.parquet")
        honest_time = rows["event_timestamp"] - ahead
        rows["event_timestamp"] = honest_time.astype("datetime64[us, UTC]")
        write_table(data / f"features/{snapshot:%Y-%m-%d}.parquet", rows)
    shutil.rmtree(data / "ahead")


def test_features_that_know_one_day_of_the_future(shop_copy):
    labels = pd.read_parquet(shop_copy.root / "data/training/test.parquet")["churned"]
    compute_leaking_features(shop_copy, days=1)
    shop_copy.run("training-set")
    test = pd.read_parquet(shop_copy.root / "data/training/test.parquet")
    assert test["churned"].tolist() == labels.tolist()
    shop_copy.run("train")
    output = " ".join(shop_copy.run("evaluate", status=2).output.split())
    gates = shop_copy.read_json("metrics/gates.json")["gates"]
    assert {name for name, gate in gates.items() if gate["blocking"] and not gate["passed"]} == {"feature_cutoff"}
    assert gates["feature_cutoff"]["figure"] > 100
    assert "GateFailed: 1 of 18 gates failed" in output
    assert "must be <= 0 (rows that differ, 500 checked; first: customer C" in output
    assert "from the events before the snapshot" in output


def test_features_that_are_too_old(shop_copy):
    shop_copy.change_params({"as_of": "2024-01-30"})
    shop_copy.change_dataset("shop", {"feature_max_age_days": 28})
    before = (shop_copy.root / "metrics/training_set.json").read_bytes()
    output = " ".join(shop_copy.run("training-set", status=2).output.split())
    assert "GateFailed: feature freshness: the newest snapshot is 2024-01-01, 29 days before as_of 2024-01-30" in output
    assert "at most 28 days are allowed (feature_max_age_days)" in output
    assert (shop_copy.root / "metrics/training_set.json").read_bytes() == before


def test_features_as_old_as_allowed(shop_copy):
    shop_copy.change_params({"as_of": "2024-01-30"})
    shop_copy.change_dataset("shop", {"feature_max_age_days": 29})
    shop_copy.run("training-set")
    assert shop_copy.read_json("metrics/training_set.json")["serving"]["age_days"] == 29


def test_a_snapshot_of_today_from_events_that_stopped(shop_copy):
    """A snapshot can be taken any day: its age alone would never say that no events arrive."""
    events = sorted((shop_copy.root / "data/raw/events").glob("*.parquet"))
    for path in events[-3:]:
        path.unlink()
    shop_copy.run("features")
    assert (shop_copy.root / "data/features/2024-01-01.parquet").is_file()
    shop_copy.change_dataset("shop", {"feature_max_age_days": 2})
    output = " ".join(shop_copy.run("training-set", status=2).output.split())
    assert "feature freshness: the newest events are of 2023-12-28, 3 days before as_of 2024-01-01" in output
    shop_copy.change_dataset("shop", {"feature_max_age_days": 3})
    shop_copy.run("training-set")
    assert shop_copy.read_json("metrics/training_set.json")["serving"]["age_days"] == 3


def test_an_online_store_that_answers_otherwise_than_it_was_told(shop_copy):
    """A trigger stands for a store that rounds what it is given: one customer's age changes as it is written."""
    with contextlib.closing(sqlite3.connect(shop_copy.root / "state/feast/online.db")) as store, store:
        ((table,),) = store.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        # the stored form of a Feast double: a tag byte and eight bytes; 1.0 here
        store.execute(
            f"""
            CREATE TRIGGER rounding AFTER UPDATE ON "{table}" WHEN NEW.feature_name = 'age'
            BEGIN
                UPDATE "{table}" SET value = x'29000000000000f03f'
                WHERE entity_key = NEW.entity_key AND feature_name = 'age';
            END
            """
        )
    customers = len(pd.read_parquet(shop_copy.root / "data/features/2024-01-01.parquet"))
    before = (shop_copy.root / "metrics/training_set.json").read_bytes()
    output = " ".join(shop_copy.run("training-set", status=2).output.split())
    assert customers > 1000
    assert "GateFailed: skew gate: 1000 of 1,000 customers differ online (limit 0); first: customer C" in output
    assert "column age: offline" in output
    assert "online 1.0" in output
    assert (shop_copy.root / "metrics/training_set.json").read_bytes() == before
