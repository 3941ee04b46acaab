"""What was served by customer id equals the point-in-time join of training, and a skewed feature is caught."""

from __future__ import annotations

import contextlib
import json
import sqlite3

import msgspec
import pandas as pd
import pytest

from closedloop.adapters.online_format import encode_key
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from tests.http_service import run_service, wait_until
from tests.model_folders import pack_value

pytestmark = pytest.mark.thorough

NAME = "shop_churn"
CUSTOMERS = 300


def ask(service, customers):
    """Request each once, alone and in a batch; returns the answers' ids."""
    items = [{"customer_id": customer} for customer in customers]
    status, found = service.call("POST", "/predict/batch", items)
    assert status == 200
    ids = [answer["prediction_id"] for answer in found["predictions"]]
    return [*ids, service.call("POST", "/predict", items[0])[1]["prediction_id"]]


def wait_for_rows(project, ids):
    """Until the store has them."""

    def stored():
        with contextlib.closing(sqlite3.connect(project.root / "state/operations.db")) as store:
            return {one for (one,) in store.execute("SELECT prediction_id FROM predictions")}

    wait_until(lambda: set(ids) <= stored(), "all answers in the store")


def score_elsewhere(project):
    """A file that was scored brings features of its own, which nobody was served."""
    with contextlib.closing(Database(f"sqlite:///{project.root / 'state/operations.db'}")) as database:
        store = Predictions(database)
        [one, *_] = next(iter(store.read_predictions(NAME)))
        changes = {"prediction_id": "elsewhere", "source": "batch", "features": (1e9, *one.features[1:])}
        assert store.insert([msgspec.structs.replace(one, **changes)]).predictions == 1


def test_replayed_requests_equal_what_was_served_until_a_feature_is_skewed(shop_copy):
    rows = pd.read_parquet(shop_copy.root / "data/features/2024-01-01.parquet")
    customers = rows["customer_id"].head(CUSTOMERS).tolist()
    nothing = shop_copy.run("skew", status=1)
    assert "no request by customer" in nothing.output
    with run_service(shop_copy.root) as service:
        wait_for_rows(shop_copy, ask(service, customers))
        features = {
            name: value for name, value in rows.iloc[0].items() if name not in ("customer_id", "event_timestamp")
        }
        known = {name: None if pd.isna(value) else value for name, value in features.items()} | {"age": 20.0}
        status, inline = service.call("POST", "/predict", {"features": known, "customer_id": customers[0]})
        assert status == 200, inline
        wait_for_rows(shop_copy, [inline["prediction_id"]])
        score_elsewhere(shop_copy)
        same = shop_copy.run("skew")
        assert f"{CUSTOMERS + 1:,} requests were served {CUSTOMERS:,} rows, all as in training" in same.output
        victim, right = customers[7], float(rows["age"].iloc[7])
        with contextlib.closing(sqlite3.connect(shop_copy.root / "state/feast/online.db")) as online, online:
            (table,) = [
                name
                for (name,) in online.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
                if name.startswith(f"{NAME}_")
            ]
            update = f'UPDATE "{table}" SET value = ? WHERE entity_key = ? AND feature_name = ?'
            changed = online.execute(update, (pack_value(right + 1), encode_key(victim), "age")).rowcount
            assert changed == 1
        quiet = json.loads(shop_copy.run("skew", "--json").stdout)  # nobody was served it yet
        assert quiet == {"requests": CUSTOMERS + 1, "rows": CUSTOMERS, "bundled": 0}
        wait_for_rows(shop_copy, ask(service, customers))
    found = shop_copy.run("skew", status=2)
    assert f"skew gate: 1 of {CUSTOMERS + 1:,} rows that were served differ (limit 0)" in found.output
    assert f"customer {victim}, column age: offline {right}, online {right + 1}" in found.output
    assert "no request by customer" in shop_copy.run("skew", "--since", "2999-01-01", status=1).output
    for file in (shop_copy.root / "state/feast/offline" / NAME).rglob("2024-01-01.parquet"):
        file.unlink()
    assert "not all of the served snapshots are published: 2024-01-01" in shop_copy.run("skew", status=1).output
