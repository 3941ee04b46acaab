from __future__ import annotations

import datetime as dt
from typing import Any

import ibis
import pandas as pd
import pytest

from closedloop.core.features.daily import DAILY_COLUMNS, EVENTS_COLUMNS, aggregate_daily
from closedloop.core.features.labels import compute_labels
from closedloop.core.features.windows import WindowSpec
from closedloop.errors import ConfigError

SNAPSHOT = dt.datetime(2024, 3, 11, tzinfo=dt.UTC)
SPEC = WindowSpec(("purchase", "login"), ("purchase",), "purchase", (7,), ("count",), 30, 90, 365)


def label(rows: list[tuple[str, str, str]], snapshots: list[dt.datetime], as_of: dt.datetime) -> dict[Any, bool]:
    frame = pd.DataFrame(rows, columns=["customer_id", "event_type", "time"]).assign(amount=1.0)
    frame["time"] = pd.to_datetime(frame["time"], format="ISO8601").astype("datetime64[us]")
    daily = aggregate_daily(ibis.memtable(frame, schema=EVENTS_COLUMNS))
    table = compute_labels(daily, snapshots, SPEC, horizon_days=10, as_of=as_of).to_pandas()
    return {(row.customer_id, f"{row.event_timestamp:%m-%d}"): row.churned for row in table.itertuples()}


def test_boundaries_of_horizon_and_population() -> None:
    active = [(name, "purchase", "2024-03-10T23:59:59.999999") for name in "abcde"]
    rows = [
        *active,
        ("a", "purchase", "2024-03-11T00:00:00"),  # at the snapshot: in the horizon
        ("b", "purchase", "2024-03-20T23:59:59.999999"),  # the horizon's last moment
        ("c", "purchase", "2024-03-21T00:00:00"),  # the horizon has ended
        ("d", "login", "2024-03-12T00:00:00"),  # another type
        ("f", "purchase", "2024-02-10T00:00:00"),  # exactly active_days before: in the population
        ("g", "purchase", "2024-02-09T23:59:59.999999"),  # not in it
        ("g", "purchase", "2024-03-12T00:00:00"),
        ("h", "login", "2024-03-10T00:00:00"),  # never purchased
    ]
    found = label(rows, [SNAPSHOT], SNAPSHOT + dt.timedelta(days=10))
    assert found == {
        ("a", "03-11"): False, ("b", "03-11"): False, ("c", "03-11"): True,
        ("d", "03-11"): True, ("e", "03-11"): True, ("f", "03-11"): True,
    }  # fmt: skip


def test_each_snapshot_has_its_own_label() -> None:
    rows = [("a", "purchase", "2024-03-01"), ("a", "purchase", "2024-03-08")]
    snapshots = [SNAPSHOT - dt.timedelta(days=5), SNAPSHOT]
    found = label(rows, snapshots, SNAPSHOT + dt.timedelta(days=10))
    assert found == {("a", "03-06"): False, ("a", "03-11"): True}


def test_an_open_horizon_is_refused() -> None:
    daily = ibis.table(DAILY_COLUMNS, name="daily")
    as_of = SNAPSHOT + dt.timedelta(days=10)
    assert compute_labels(daily, [SNAPSHOT], SPEC, horizon_days=10, as_of=as_of).columns[-1] == "churned"
    with pytest.raises(ConfigError, match=r"snapshot 2024-03-12: .* labels are known up to 2024-03-11"):
        compute_labels(daily, [SNAPSHOT + dt.timedelta(days=1)], SPEC, horizon_days=10, as_of=as_of)
