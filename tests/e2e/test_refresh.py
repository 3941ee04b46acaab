"""`closedloop refresh`: features as of a date go online without training; a data gate's no changes nothing there.

The steps build on each other, as days do: a fixture takes them once, and keeps what was online after each.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from closedloop.bootstrap import build_features, load_run
from tests import online_rows

FIRST, NEXT, LATER, OLDER, REFUSED = "2023-05-20", "2023-05-21", "2023-08-01", "2023-06-20", "2023-08-02"
WORK = Path("state/refresh/shop_churn")
NEVER_SEEN = "nobody"


@dataclass(frozen=True)
class Step:
    """What a refresh printed; its daily aggregates by file name, with inode and time; its feature rows."""

    output: str
    daily: dict[str, tuple[int, int]]
    rows: pd.DataFrame
    online: pd.DataFrame


def read_online(root: Path, ids: list[str], as_of: str) -> pd.DataFrame:
    """Features, ``snapshot_at`` and ``state`` at ``as_of``, by customer."""
    run = load_run(root / "params.yaml", root=root, overrides={"as_of": as_of})
    answer = online_rows.read_online(build_features(run), ids, as_of=run.params.as_of_at)
    return answer.features.assign(snapshot_at=answer.snapshot_at, state=answer.state).set_axis(ids)


@pytest.fixture(scope="module")
def steps(young_shop: Any) -> dict[str, Step]:
    """By date, in the order in which they were taken."""
    taken: dict[str, Step] = {}
    ids: list[str] = []
    for as_of in (FIRST, NEXT, LATER, OLDER, REFUSED):
        if as_of == REFUSED:
            young_shop.change_dataset("shop", {"expectations": [ADULTS]})
        output = young_shop.run("refresh", "--as-of", as_of, status=2 if as_of == REFUSED else 0).output
        files = {
            path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in (young_shop.root / WORK / "daily").iterdir()
        }
        rows = pd.read_parquet(young_shop.root / WORK / "features")
        ids = ids or sorted(rows["customer_id"])
        everybody = sorted({*ids, *rows["customer_id"]})
        taken[as_of] = Step(output, files, rows, read_online(young_shop.root, everybody, as_of))
    return taken


ADULTS = {
    "table": "customers",
    "type": "expect_column_values_to_be_between",
    "kwargs": {"column": "age", "min_value": 99},
}


@pytest.fixture(scope="module")
def young_shop(tmp_path_factory, make_project):
    """A shop without a model, and too small for one."""
    made = make_project(tmp_path_factory.mktemp("refresh") / "project")
    made.change_params({"simulator": {"customers": 4_000}, "features": {"window_days": [7, 30]}})
    return made


def test_refresh_brings_the_snapshot_online_without_training(young_shop, steps):
    rows = steps[FIRST].rows
    assert len(rows) >= 1000
    assert set(rows["event_timestamp"]) == {pd.Timestamp(FIRST, tz="UTC")}
    online = steps[FIRST].online.loc[rows["customer_id"]]
    assert set(online["snapshot_at"]) == {pd.Timestamp(FIRST, tz="UTC")}
    assert set(online["state"]) == {"fresh"}
    assert f"features of {FIRST} online" in steps[FIRST].output
    assert not (young_shop.root / "models").exists()
    assert not (young_shop.root / "mlflow.db").exists()


def test_refresh_rolls_up_new_days_only(steps):
    before, after = steps[FIRST].daily, steps[NEXT].daily
    assert after.keys() - before.keys() == {f"{FIRST}.parquet"}
    assert {name for name in before if after.get(name) != before[name]} == set()


def test_an_older_date_leaves_newer_rows_online(young_shop, steps):
    population = steps[LATER].rows["customer_id"]
    after = read_online(young_shop.root, list(population), LATER)
    assert set(after["snapshot_at"]) == {pd.Timestamp(LATER, tz="UTC")}
    pd.testing.assert_frame_equal(after, steps[LATER].online.loc[population])
    assert set(steps[OLDER].rows["event_timestamp"]) == {pd.Timestamp(OLDER, tz="UTC")}


def test_an_older_date_says_that_it_changed_nothing(steps):
    assert "nothing changed online" in " ".join(steps[OLDER].output.split())


def test_a_data_gate_that_says_no_leaves_the_store_as_it_was(young_shop, steps):
    assert "data gate" in steps[REFUSED].output
    assert "customers.age" in steps[REFUSED].output
    population = list(steps[LATER].rows["customer_id"])
    pd.testing.assert_frame_equal(read_online(young_shop.root, population, LATER), steps[LATER].online.loc[population])


def test_a_customer_who_left_goes_stale_and_one_never_seen_is_unknown(young_shop, steps):
    left = sorted(set(steps[NEXT].rows["customer_id"]) - set(steps[LATER].rows["customer_id"]))
    assert left
    run = load_run(young_shop.root / "params.yaml", root=young_shop.root)
    last_fresh = dt.date.fromisoformat(NEXT) + dt.timedelta(days=run.dataset.feature_max_age_days)
    for day, state in ((last_fresh, "fresh"), (last_fresh + dt.timedelta(days=1), "stale")):
        found = read_online(young_shop.root, [*left, NEVER_SEEN], str(day))
        assert set(found.loc[left, "state"]) == {state}
        assert set(found.loc[left, "snapshot_at"]) == {pd.Timestamp(NEXT, tz="UTC")}
        assert found.loc[NEVER_SEEN, "state"] == "unknown"
        assert found.loc[NEVER_SEEN].drop("state").isna().all()


def test_offline_and_online_answer_the_same_to_the_last_bit(young_shop, steps):
    """1,000 customers through the point-in-time join and through the online store, missing values included."""
    run = load_run(young_shop.root / "params.yaml", root=young_shop.root)
    features = build_features(run)
    population = steps[LATER].rows["customer_id"].sample(1000, random_state=0).tolist()
    asked = pd.DataFrame({"customer_id": population, "event_timestamp": pd.Timestamp(LATER, tz="UTC").as_unit("us")})
    offline = features.read_historical(asked, features.offline_dir)[list(features.features.names)]
    online = read_online(young_shop.root, population, LATER)[list(features.features.names)].reset_index(drop=True)
    assert offline.isna().sum().sum() > 0
    pd.testing.assert_frame_equal(offline, online, check_exact=True)
    assert not offline.duplicated().all()
