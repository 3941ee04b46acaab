"""Feast's own command line in `feature_repo/`, as its documentation says: it sees and does what the stages do."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from closedloop.adapters.feast import Features
from closedloop.bootstrap import build_features, load_run
from closedloop.config.featureset import FeatureSet
from tests import online_rows

pytestmark = pytest.mark.thorough

FEAST = Path(sys.executable).with_name("feast")
NEWEST = "2024-01-01"
MOMENT = dt.datetime.fromisoformat(NEWEST).replace(tzinfo=dt.UTC)
# What a definition is made of may not differ after a command; when it was touched and materialised may.
VOLATILE = re.compile(
    r"(created|last_updated)_timestamp \{[^}]*\}\s*|state: \w+\s*|materialization_intervals \{.*?\n  \}\s*", re.DOTALL
)


def describe_registry(features: Features) -> dict[str, str]:
    """Every definition in this project's registry, as text."""
    store = features.open_store()
    found = [*store.list_entities(), *store.list_data_sources(), *store.list_feature_views()]
    protos = {f"{type(item).__name__} {item.name}": item for item in [*found, *store.list_feature_services()]}
    return {name: VOLATILE.sub("", str(item.to_proto())) for name, item in protos.items()}


def read_online(features: Features) -> pd.DataFrame:
    """What the online store answers for everybody in the newest published snapshot."""
    rows = pd.read_parquet(features.offline_dir / f"{NEWEST}.parquet")
    answer = online_rows.read_online(features, rows["customer_id"].tolist(), as_of=MOMENT)
    return answer.features.assign(state=answer.state, snapshot_at=answer.snapshot_at).set_index(rows["customer_id"])


def read_published(features: Features) -> pd.DataFrame:
    """The same as `read_online`, from the published file."""
    rows = pd.read_parquet(features.offline_dir / f"{NEWEST}.parquet").set_index("customer_id")
    snapshot_at = rows["event_timestamp"].astype("datetime64[ns, UTC]")
    return rows[list(features.features.names)].assign(state="fresh", snapshot_at=snapshot_at)


@dataclass(frozen=True)
class FeastRun:
    """What was there before `feast apply` and after each command, and what the commands printed."""

    earlier: Features
    current: Features
    other: Features
    registries: dict[str, list[dict[str, str]]]
    online: dict[str, list[pd.DataFrame]]
    emptied: pd.DataFrame
    printed: dict[str, str]


def feast(folder: Path, *arguments: str) -> str:
    command = [str(FEAST), *arguments]
    ran = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def empty_tables(database: Path) -> None:
    with contextlib.closing(sqlite3.connect(database)) as store, store:
        for (table,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            store.execute(f'DELETE FROM "{table}"')


@pytest.fixture(scope="module")
def feast_run(small_shop: Any, tmp_path_factory: pytest.TempPathFactory) -> FeastRun:
    """A shop that changed its windows after it was trained, and shares its store with another data set."""
    shop = small_shop.copy(tmp_path_factory.mktemp("feast") / "project")

    def load() -> Features:
        return build_features(load_run(shop.root / "params.yaml", root=shop.root))

    earlier = load()
    earlier.publish(shop.root / "data/features")  # the registry holds absolute paths: those of the copy from here on
    shop.change_params({"features": {"window_days": [14], "aggregations": ["count"]}})
    shop.run("features")
    current = load()
    current.publish(shop.root / "data/features")
    current.materialize(MOMENT)
    small = FeatureSet(numeric=("age",), categorical=(), service=earlier.features.service)
    settings = load_run(shop.root / "params.yaml", root=shop.root).settings
    other = Features(settings, project="other_churn", features=small, max_age_days=31)
    other.publish(shop.root / "data/features")
    projects = {"earlier": earlier, "current": current, "other": other}
    registries = {name: [describe_registry(features)] for name, features in projects.items()}
    online = {name: [read_online(features)] for name, features in projects.items() if name != "other"}
    repo, printed = shop.root / "feature_repo", {}
    printed["apply"] = feast(repo, "apply")
    for name, frames in online.items():
        frames.append(read_online(projects[name]))
    empty_tables(shop.root / "state/feast/online.db")
    emptied = read_online(current)
    printed["materialize"] = feast(repo, "materialize", "2023-12-31T23:59:59", f"{NEWEST}T00:00:01")
    for name, frames in online.items():
        frames.append(read_online(projects[name]))
    with ThreadPoolExecutor() as pool:  # a command takes seconds to import Feast
        lists = ("feature-views", "feature-services")
        printed |= dict(zip(lists, pool.map(lambda what: feast(repo, what, "list"), lists), strict=True))
    for name, described in registries.items():
        described.append(describe_registry(projects[name]))
    return FeastRun(earlier, current, other, registries, online, emptied, printed)


def test_lists_show_the_current_definition_and_the_earlier_one(feast_run: FeastRun) -> None:
    both = {feast_run.earlier.features.service, feast_run.current.features.service}
    assert len(both) == 2
    for what in ("feature-views", "feature-services"):
        lines = feast_run.printed[what].splitlines()[1:]
        assert {line.split()[0] for line in lines if line.startswith("shop_churn_")} == both
    assert f"{feast_run.current.features.service}:purchase_count_14d" in feast_run.printed["feature-services"]
    assert f"{feast_run.earlier.features.service}:purchase_sum_30d" in feast_run.printed["feature-services"]


def test_apply_and_materialize_change_no_definition(feast_run: FeastRun) -> None:
    for before, after in feast_run.registries.values():
        assert after == before
    assert {name for name in feast_run.registries["current"][1] if name.startswith("FeatureView ")} == {
        f"FeatureView {features.features.service}" for features in (feast_run.earlier, feast_run.current)
    }


def test_apply_leaves_what_is_online_and_how_new_it_is(feast_run: FeastRun) -> None:
    for before, after, _ in feast_run.online.values():
        assert set(before["state"]) == {"fresh"}
        pd.testing.assert_frame_equal(before, after, check_exact=True)
        assert set(before["snapshot_at"]) == {MOMENT}


def test_materialize_brings_both_definitions_online_to_the_last_bit(feast_run: FeastRun) -> None:
    assert set(feast_run.emptied["state"]) == {"unknown"}
    for features, frames in (
        (feast_run.earlier, feast_run.online["earlier"]),
        (feast_run.current, feast_run.online["current"]),
    ):
        published = read_published(features)
        assert len(published) > 1000
        pd.testing.assert_frame_equal(frames[-1], published, check_exact=True, check_like=True)
