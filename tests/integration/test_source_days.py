"""Events in S3, divided by day: only new and corrected objects are fetched."""

from __future__ import annotations

import datetime as dt
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.config.dataset import DatasetConfig
from closedloop.config.layout import Layout
from closedloop.config.params import Params, parse_params
from closedloop.errors import DataError, ServiceUnavailable
from closedloop.stages.ingest import ingest
from closedloop.workflow import prepare_workspace
from tests.conftest import Project
from tests.production import ACCOUNT, Bucket

FIRST, DAYS = dt.date(2024, 1, 1), 6
ORDERS: dict[str, Any] = {
    "name": "orders",
    "model_name": "orders_churn",
    "description": "Orders in S3.",
    "kind": "events",
    "source": {"type": "parquet"},
    "timezone": "UTC",
    "columns": {"entity_id": "member", "time": "at", "amount": "paid"},
    "event_types": {"purchase": {"has_amount": True}},
    "label": {"event_type": "purchase", "horizon_days": 10, "active_days": 20, "snapshot_every_days": 10},
    "expectations": [],
}
PATTERN = "s3://landing/orders/day={day}/*.parquet"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The client of a bucket with an object a day."""
    server = Bucket()
    server.start()
    for name, value in (ACCOUNT | {"AWS_ENDPOINT_URL": server.url, "AWS_MAX_ATTEMPTS": "1"}).items():
        monkeypatch.setenv(name, value)
    client = server.client()
    client.create_bucket(Bucket="landing", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    for number in range(DAYS):
        put_day(client, FIRST + dt.timedelta(days=number))
    yield client
    for one in client.list_objects_v2(Bucket="landing").get("Contents", []):
        client.delete_object(Bucket="landing", Key=one["Key"])
    client.delete_bucket(Bucket="landing")
    server.stop()


def put_day(client: Any, day: dt.date, paid: float = 1.0, key: str = "orders/day={day}/part-0.parquet") -> None:
    times = pd.Timestamp(day, tz="UTC") + pd.to_timedelta(np.arange(8), unit="h")
    content = io.BytesIO()
    pd.DataFrame({"member": [f"M{one}" for one in range(8)], "at": times, "paid": paid}).to_parquet(content)
    client.put_object(Bucket="landing", Key=key.replace("{day}", f"{day}"), Body=content.getvalue())


def make_params(pattern: str = PATTERN) -> Params:
    as_of = f"{FIRST + dt.timedelta(days=DAYS)}"
    given = {"dataset": "orders", "as_of": as_of, "seed": 1, "model": {"type": "random_forest"}}
    return parse_params(given | {"data": {"source": pattern}}, "a test")


def run(folder: Path, pattern: str = PATTERN) -> dict[str, Any]:
    layout = Layout(raw=folder / "raw", ingest_metrics=folder / "ingest.json")
    return ingest(make_params(pattern), DatasetConfig.model_validate(ORDERS), layout)


def test_new_and_corrected_objects_alone_are_fetched(bucket: Any, tmp_path: Path) -> None:
    bucket.delete_object(Bucket="landing", Key="orders/day=2024-01-02/part-0.parquet")
    assert len(run(tmp_path)["days_read"]) == DAYS - 1
    put_day(bucket, dt.date(2024, 1, 2))
    put_day(bucket, dt.date(2024, 1, 5), paid=3.0)
    found = run(tmp_path)
    assert found["days_read"] == ["2024-01-02", "2024-01-05"]
    assert (found["events"], found["days"]) == (8 * DAYS, DAYS)
    assert pd.read_parquet(tmp_path / "raw/events/2024-01-05.parquet")["amount"].tolist() == [3.0] * 8
    assert run(tmp_path)["days_read"] == []


def test_objects_of_one_name_in_two_folders_are_both_read(bucket: Any, tmp_path: Path) -> None:
    for country in ("de", "fr"):
        put_day(bucket, FIRST, key=f"countries/{country}/{{day}}.parquet")
    found = run(tmp_path, "s3://landing/countries/*/{day}.parquet")
    assert found["rows_read"] == found["events"] == 16


def test_a_bucket_without_days_and_one_that_is_not_there_are_told_apart(bucket: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s3://landing/payments/\{day\}\.csv.*no file of any day"):
        run(tmp_path, "s3://landing/payments/{day}.csv")
    bucket.delete_object(Bucket="landing", Key="orders/day=2024-01-02/part-0.parquet")
    with pytest.raises(ServiceUnavailable, match=re.escape("s3://")):
        run(tmp_path, "s3://landing:wrong/{day}.csv")


def test_a_workspace_asks_the_storage_each_time(bucket: Any, project: Project) -> None:
    import yaml

    (project.root / "configs/datasets/orders.yaml").write_text(yaml.safe_dump(ORDERS), encoding="utf-8")
    project.add_sources(".dvc")
    folder = prepare_workspace(project.root, dataset="orders", source=PATTERN, as_of="2024-01-07")
    graph = yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))
    assert graph["stages"]["ingest"]["always_changed"] is True
    assert yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))["data"]["source"] == PATTERN
    local = prepare_workspace(project.root, dataset="orders", source="landing/day={day}/*.parquet", as_of="2024-01-07")
    graph = yaml.safe_load((local / "dvc.yaml").read_text(encoding="utf-8"))
    assert f"{Path('landing').absolute()}" in graph["stages"]["ingest"]["deps"]
