"""Sources to canonical tables, on files small enough to work out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from closedloop.adapters.tables import read_table
from closedloop.dataset import DatasetConfig
from closedloop.errors import DataError
from closedloop.params import merge_values, parse_params
from closedloop.stages.ingest import ingest

ORDERS = {
    "name": "orders",
    "model_name": "orders_churn",
    "description": "Order lines.",
    "kind": "events",
    "source": {"type": "csv"},
    "timezone": "Europe/London",
    "columns": {"entity_id": "Customer", "time": "At", "amount": "Price", "quantity": "Pieces"},
    "event_types": {"purchase": {"has_amount": True}},
    "cleaning": {
        "drop_missing_id": True,
        "drop_duplicates": True,
        "cancellation": {"column": "Invoice", "prefix": "C"},
        "require_positive": ["Price", "Pieces"],
    },
    "label": {"event_type": "purchase", "horizon_days": 30, "active_days": 60, "snapshot_every_days": 30},
    "expectations": [],
}
PLANS = {
    "name": "plans",
    "model_name": "plans_churn",
    "description": "One row a customer.",
    "kind": "table",
    "source": {"type": "csv"},
    "columns": {
        "entity_id": "id",
        "numeric": ["paid"],
        "categorical": ["plan"],
        "sensitive": "gender",
        "label": {"column": "left", "churned": "yes", "stayed": "no"},
    },
    "expectations": [],
}
HEADER = "Invoice,Customer,At,Price,Pieces\n"
JANUARY = HEADER + (
    "1,17850.0,2024-01-10 09:00:00,2.50,4\n"  # kept: 10.00
    "1,17850.0,2024-01-10 09:00:00,2.50,4\n"  # duplicate
    "C2,17850.0,2024-01-11 09:00:00,2.50,-4\n"  # cancellation and no positive quantity
    "3,,2024-01-12 09:00:00,0,1\n"  # no id and no positive price
    "4,A7,2024-01-12 09:00:00,1.00,1\n"
)
JUNE = HEADER + (
    "4,A7,2024-01-12 09:00:00,1.00,1\n"  # duplicate of a line in another file
    "5,A7,2024-06-01 00:30:00,0.10,3\n"  # London is an hour ahead: 31 May in UTC
    "6,17850.0,2024-06-01 01:00:00,5,1\n"  # 1 June 00:00 in UTC: at as_of
    "7,B9,2024-06-02 12:00:00,5,1\n"  # after as_of
)


def run(tmp_path: Path, config: dict[str, Any], source: Path | None, **data: Any) -> dict[str, Any]:
    params = parse_params(
        {
            "dataset": config["name"],
            "as_of": "2024-06-01",
            "seed": 1,
            "model": {"type": "random_forest"},
            "data": {"source": source and str(source), **data},
        },
        "params.yaml",
    )
    return ingest(
        params,
        DatasetConfig.model_validate(config),
        raw_dir=tmp_path / "raw",
        metrics_path=tmp_path / "metrics/ingest.json",
    )


def read(tmp_path: Path, name: str) -> pd.DataFrame:
    return read_table(tmp_path / "raw" / name, made_by="closedloop ingest")


@pytest.fixture
def orders(tmp_path) -> Path:
    folder = tmp_path / "orders"
    folder.mkdir()
    (folder / "2024-01.csv").write_text(JANUARY, encoding="utf-8")
    (folder / "2024-06.csv").write_text(JUNE, encoding="utf-8")
    return folder


def test_events_are_in_utc_with_price_times_quantity_and_text_ids(tmp_path, orders):
    run(tmp_path, ORDERS, orders)
    events = read(tmp_path, "events")
    assert str(events["time"].dtype) == "datetime64[us, UTC]"
    assert events.assign(time=events["time"].astype(str)).to_numpy().tolist() == [
        ["17850", "purchase", "2024-01-10 09:00:00+00:00", 10.0],
        ["A7", "purchase", "2024-01-12 09:00:00+00:00", 1.0],
        ["A7", "purchase", "2024-05-31 23:30:00+00:00", pytest.approx(0.3)],
    ]
    assert [path.stem for path in sorted((tmp_path / "raw/events").iterdir())] == [
        "2024-01-10",
        "2024-01-12",
        "2024-05-31",
    ]


def test_what_happens_at_or_after_as_of_is_counted_and_written_nowhere(tmp_path, orders):
    report = run(tmp_path, ORDERS, orders)
    assert report["rows_at_or_after_as_of"] == 2
    assert report["events"] == 3
    assert read(tmp_path, "events")["time"].max() < pd.Timestamp("2024-06-01", tz="UTC")
    assert read(tmp_path, "customers.parquet")["customer_id"].tolist() == ["17850", "A7"]  # B9 is not known yet


def test_every_dropped_row_is_kept_with_its_place_and_all_its_reasons(tmp_path, orders):
    report = run(tmp_path, ORDERS, orders)
    dropped = read(tmp_path, "dropped.parquet")
    reasons = ["missing_id", "cancellation", "Price_not_positive", "Pieces_not_positive", "duplicate"]
    assert dropped.columns.tolist() == ["source", "row", "customer_id", *reasons]
    assert [
        (row.source, row.row, row.customer_id, [reason for reason in reasons if getattr(row, reason)])
        for row in dropped.itertuples()
    ] == [
        ("2024-01.csv", 2, "17850", ["duplicate"]),
        ("2024-01.csv", 3, "17850", ["cancellation", "Pieces_not_positive"]),
        ("2024-01.csv", 4, None, ["missing_id", "Price_not_positive"]),
        ("2024-06.csv", 1, "A7", ["duplicate"]),
    ]
    assert (report["rows_read"], report["rows_kept"], report["rows_dropped"]) == (9, 5, 4)
    counted = {entry["rule"]: (entry["rows"], entry["first_reason"], entry["also"]) for entry in report["dropped"]}
    assert counted == {
        "missing_id": (1, 1, {"Price_not_positive": 1}),
        "cancellation": (1, 1, {"Pieces_not_positive": 1}),
        "Price_not_positive": (1, 0, {"missing_id": 1}),
        "Pieces_not_positive": (1, 0, {"cancellation": 1}),
        "duplicate": (2, 2, {}),
    }


def test_without_its_rule_a_cancellation_would_pass_for_a_purchase(tmp_path, orders):
    kept = run(tmp_path, merge_values(ORDERS, {"cleaning": {"cancellation": None, "require_positive": []}}), orders)
    assert kept["events"] == 4
    events = read(tmp_path, "events")
    assert events["amount"].tolist()[1] == -10.0


def test_event_types_come_from_their_column(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("who,what,at\n1, visit ,2024-01-01 10:00:00\n1,order,2024-01-01 11:00:00\n", encoding="utf-8")
    config = {
        **ORDERS,
        "columns": {"entity_id": "who", "time": "at", "event_type": "what"},
        "event_types": {"visit": {}, "order": {}},
        "cleaning": {},
        "label": {**ORDERS["label"], "event_type": "order"},
    }
    run(tmp_path, config, path)
    events = read(tmp_path, "events")
    assert events["event_type"].tolist() == ["order", "visit"]
    assert events["amount"].isna().all()


def test_the_same_source_gives_the_same_bytes(tmp_path, orders):
    run(tmp_path, ORDERS, orders)
    first = {path.name: path.read_bytes() for path in (tmp_path / "raw").rglob("*") if path.is_file()}
    run(tmp_path, ORDERS, orders)
    assert {path.name: path.read_bytes() for path in (tmp_path / "raw").rglob("*") if path.is_file()} == first
    assert (tmp_path / "raw/ingest.json").read_bytes() == (tmp_path / "metrics/ingest.json").read_bytes()


def test_how_lines_are_spread_over_files_changes_no_event(tmp_path, orders):
    run(tmp_path, ORDERS, orders)
    first = {path.name: path.read_bytes() for path in (tmp_path / "raw/events").iterdir()}
    whole = tmp_path / "whole.csv"
    whole.write_text(JANUARY + JUNE.removeprefix(HEADER), encoding="utf-8")
    run(tmp_path, ORDERS, whole)
    assert {path.name: path.read_bytes() for path in (tmp_path / "raw/events").iterdir()} == first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("8,A7,2024-01-20 09:00:00,1.0,two\n", r"2024-07\.csv, row 1, column 'Pieces': must be a number, found 'two'"),
        ("8,A7,20/01/2024,1.0,2\n", r"2024-07\.csv, row 1, column 'At': must be a date or time"),
    ],
)
def test_a_value_that_cannot_be_read_stops_it_and_leaves_what_was_there(tmp_path, orders, line, message):
    run(tmp_path, ORDERS, orders)
    before = sorted(path.name for path in (tmp_path / "raw").rglob("*"))
    (orders / "2024-07.csv").write_text(HEADER + line, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        run(tmp_path, ORDERS, orders)
    assert sorted(path.name for path in (tmp_path / "raw").rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics", "orders", "raw"]


def test_a_source_without_rows_is_refused(tmp_path):
    path = tmp_path / "empty.csv"
    path.write_text(HEADER, encoding="utf-8")
    with pytest.raises(DataError, match=r"data\.source: there are column names, but no rows"):
        run(tmp_path, ORDERS, path)
    path.write_text(HEADER + "1,A,2025-01-01 09:00:00,1,1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no event before as_of 2024-06-01 is left \(1 rows read, 1 at or after as_of"):
        run(tmp_path, ORDERS, path)
    assert not (tmp_path / "raw").exists()


WITH_CUSTOMERS = merge_values(
    ORDERS,
    {
        "customers_source": {"type": "csv"},
        "columns": {"numeric": ["age"], "categorical": ["town"], "sensitive": "gender", "since": "joined"},
    },
)


def test_customers_have_a_source_of_their_own(tmp_path, orders):
    path = tmp_path / "customers.csv"
    path.write_text(
        "Customer,age,town,gender,joined\n"
        "A7,,London,f,2023-01-01\n"
        "17850.0,44, Leeds ,,2023-02-01\n"
        "C1,20,London,m,2024-06-01 01:00:00\n",  # joins at as_of
        encoding="utf-8",
    )
    report = run(tmp_path, WITH_CUSTOMERS, orders, customers_source=str(path))
    customers = read(tmp_path, "customers.parquet")
    assert customers["customer_id"].tolist() == ["17850", "A7"]
    assert customers["town"].tolist() == ["Leeds", "London"]
    assert customers["age"].fillna(-1).tolist() == [44.0, -1.0]
    assert customers["gender"].tolist() == [None, "f"]
    assert str(customers["joined"].dtype) == "datetime64[us, UTC]"
    assert report["customers"] == 2
    assert report["blank_values"] == {"age": 1, "gender": 1}


def test_a_customers_source_without_rows_is_refused(tmp_path, orders):
    path = tmp_path / "customers.csv"
    path.write_text("Customer,age,town,gender,joined\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"data\.customers_source: there are column names, but no rows"):
        run(tmp_path, WITH_CUSTOMERS, orders, customers_source=str(path))


TABLE = "id,plan,paid,gender,left\n2.0, basic ,10.5,f,yes\n10, , ,m,no\n"


def test_a_table_is_one_row_a_customer(tmp_path):
    path = tmp_path / "plans.csv"
    path.write_text(TABLE, encoding="utf-8")
    report = run(tmp_path, PLANS, path)
    customers = read(tmp_path, "customers.parquet")
    assert customers["customer_id"].tolist() == ["10", "2"]  # text, sorted as text
    assert customers["plan"].tolist() == [None, "basic"]
    assert customers["paid"].fillna(-1).tolist() == [-1.0, 10.5]
    assert customers["churned"].tolist() == [False, True]
    assert report["blank_values"] == {"plan": 1, "paid": 1}
    assert report["customers"] == 2


def test_a_table_with_times_keeps_what_was_before_as_of(tmp_path):
    path = tmp_path / "plans.csv"
    path.write_text(
        "id,plan,paid,gender,left,day\n1,a,1,f,yes,2024-05-31 23:59\n2,a,1,f,no,2024-06-01\n", encoding="utf-8"
    )
    config = merge_values(PLANS, {"timezone": "UTC", "columns": {"time": "day"}})
    report = run(tmp_path, config, path)
    assert report["rows_at_or_after_as_of"] == 1
    assert read(tmp_path, "customers.parquet")["event_timestamp"].astype(str).tolist() == ["2024-05-31 00:00:00+00:00"]


def test_a_label_that_is_neither_is_named(tmp_path):
    path = tmp_path / "plans.csv"
    path.write_text(TABLE + "3,basic,1,f,unknown\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"plans\.csv, row 3, column 'left': must be 'yes' \(churned\) or 'no'"):
        run(tmp_path, PLANS, path)


def test_without_ids_to_drop_a_blank_one_is_left_for_the_data_gate(tmp_path, orders):
    config = merge_values(ORDERS, {"cleaning": {"drop_missing_id": False, "require_positive": []}})
    run(tmp_path, config, orders)
    assert read(tmp_path, "events")["customer_id"].isna().sum() == 1
    assert read(tmp_path, "customers.parquet")["customer_id"].tolist() == ["17850", "A7"]
