"""Sources to canonical tables, on files small enough to work out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sqlalchemy

from closedloop.config.dataset import DatasetConfig
from closedloop.config.layout import Layout
from closedloop.config.params import merge_values, parse_params
from closedloop.errors import DataError
from closedloop.stages.ingest import ingest
from closedloop.tabular.tables import read_table

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
        Layout(raw=tmp_path / "raw", ingest_metrics=tmp_path / "metrics/ingest.json"),
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
    with pytest.raises(DataError, match=r"no event before as_of 2024-06-01 is left \(1 row read, 1 at or after as_of"):
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


def write_codes(folder: Path) -> Path:
    """The same codes as whole numbers, and as floats since one is missing."""
    folder.mkdir()
    rows = pd.DataFrame({"id": [1, 2], "plan": [1, 2], "paid": [1, 1], "gender": [0, 1], "left": [1, 0]})
    rows.to_parquet(folder / "a.parquet")
    later = pd.DataFrame(
        {
            "id": [3.0, 4.0, 5.0],
            "plan": [1.0, 2.0, None],
            "paid": 1.0,
            "gender": [0.0, 1.0, None],
            "left": [1.0, 0.0, 1.0],
        }
    )
    later.to_parquet(folder / "b.parquet")
    return folder


CODES = merge_values(
    PLANS, {"source": {"type": "parquet"}, "columns": {"label": {"column": "left", "churned": "1", "stayed": "0"}}}
)


def test_a_missing_code_in_one_file_makes_no_new_category(tmp_path):
    run(tmp_path, CODES, write_codes(tmp_path / "codes"))
    customers = read(tmp_path, "customers.parquet")
    assert customers["customer_id"].tolist() == ["1", "2", "3", "4", "5"]
    assert customers["plan"].tolist() == ["1", "2", "1", "2", None]
    assert customers["gender"].tolist() == ["0", "1", "0", "1", None]
    assert customers["churned"].tolist() == [True, False, True, False, True]


def test_the_same_word_in_two_encodings_of_its_marks_is_one_category(tmp_path):
    (tmp_path / "codes").mkdir()
    for name, plan in (("a", "Ge\u0301ne\u0301ve"), ("b", "G\u00e9n\u00e9ve")):
        frame = pd.DataFrame({"id": [f"{name}1"], "plan": [plan], "paid": [1], "gender": ["f"], "left": [1]})
        frame.to_csv(tmp_path / f"codes/{name}.csv", index=False)
    run(tmp_path, {**CODES, "source": {"type": "csv"}}, tmp_path / "codes")
    assert read(tmp_path, "customers.parquet")["plan"].tolist() == ["G\u00e9n\u00e9ve"] * 2


def test_codes_of_half_width_are_spelt_as_any_other_and_keep_their_digits(tmp_path):
    frame = pd.DataFrame({"id": [1, 2], "plan": [0.1, None], "paid": 1, "gender": "f", "left": [1, 0]})
    narrow = frame.astype({"id": "float32", "plan": "float32"})
    narrow.to_parquet(tmp_path / "plans.parquet")
    run(tmp_path, CODES, tmp_path / "plans.parquet")
    assert read(tmp_path, "customers.parquet")["plan"].tolist() == ["0.1", None]
    narrow.assign(id=np.array([1, 2**24 + 1], dtype="float32")).to_parquet(tmp_path / "plans.parquet")
    with pytest.raises(DataError, match=r"row 2, column 'id': 1\.6777216e\+07 may have lost digits"):
        run(tmp_path, CODES, tmp_path / "plans.parquet")


def test_where_the_comma_is_the_decimal_mark_a_code_may_have_one_too(tmp_path):
    """So a column of whole numbers beside a blank is written."""
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes/a.csv").write_text("id;plan;paid;gender;left\n1;2;1;0;1\n2;1;1;1;0\n", encoding="utf-8")
    (tmp_path / "codes/b.csv").write_text("id;plan;paid;gender;left\n3,0;2,0;1,5;;1,0\n", encoding="utf-8")
    run(tmp_path, {**CODES, "source": {"type": "csv", "delimiter": ";", "decimal": ","}}, tmp_path / "codes")
    found = read(tmp_path, "customers.parquet")
    assert (found["customer_id"].tolist(), found["plan"].tolist()) == (["1", "2", "3"], ["2", "1", "2"])
    assert found["paid"].tolist() == [1, 1, 1.5]


@pytest.mark.parametrize("rename", [{}, {"tarif\u00e9": "tariff"}])
def test_a_header_in_another_encoding_of_its_marks_has_the_configs_names(tmp_path, rename):
    (tmp_path / "a.csv").write_text("id,tarife\u0301,paid,gender,left\n1,x,1,f,yes\n", encoding="utf-8")
    name = rename.get("tarif\u00e9", "tarif\u00e9")
    columns = {**PLANS["columns"], "categorical": [name], "rename": rename}
    run(tmp_path, {**PLANS, "columns": columns}, tmp_path / "a.csv")
    assert read(tmp_path, "customers.parquet")[name].tolist() == ["x"]


def test_a_database_and_a_csv_spell_codes_as_parquet_does(tmp_path, monkeypatch):
    write_codes(tmp_path / "codes")
    frames = [pd.read_parquet(tmp_path / f"codes/{name}.parquet") for name in "ab"]
    monkeypatch.setenv("PLANS_DATABASE", f"sqlite:///{tmp_path / 'plans.db'}")
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'plans.db'}")
    for name, frame in zip("ab", frames, strict=True):
        frame.to_sql(name, engine, index=False)
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    engine.dispose()
    query = "SELECT * FROM a UNION ALL SELECT * FROM b"
    table = {**CODES, "source": {"type": "sql", "url_variable": "PLANS_DATABASE", "query": query}}
    written = []
    for config, source in (
        (CODES, tmp_path / "codes"),
        (table, None),
        ({**CODES, "source": {"type": "csv"}}, tmp_path / "[ab].csv"),
    ):
        run(tmp_path, config, source)
        written.append((tmp_path / "raw/customers.parquet").read_bytes())
    assert len(set(written)) == 1


def test_an_event_type_written_as_a_float_is_the_type_that_was_listed(tmp_path):
    pd.DataFrame({"who": [1, 2], "what": [1, 2], "at": "2024-01-01"}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"who": [1.0, None], "what": [1.0, None], "at": "2024-02-01"}).to_parquet(tmp_path / "b.parquet")
    config = {
        **ORDERS,
        "source": {"type": "parquet"},
        "columns": {"entity_id": "who", "time": "at", "event_type": "what"},
        "event_types": {"1": {}, "3": {}},
        "cleaning": {},
        "label": {**ORDERS["label"], "event_type": "1"},
    }
    report = run(tmp_path, config, tmp_path / "*.parquet")
    assert read(tmp_path, "events")["event_type"].tolist() == ["1", "2", "1"]
    assert report["event_types_ignored"] == {"2": 1}


def test_a_listed_event_type_that_never_occurs_is_told(tmp_path, caplog):
    path = tmp_path / "log.csv"
    path.write_text("who,what,at\n1,order,2024-01-01 11:00:00\n", encoding="utf-8")
    config = {
        **ORDERS,
        "columns": {"entity_id": "who", "time": "at", "event_type": "what"},
        "event_types": {"order": {}, "visit": {}},
        "cleaning": {},
        "label": {**ORDERS["label"], "event_type": "order"},
    }
    run(tmp_path, config, path)
    assert "event_types: no event is of type visit" in caplog.text


@pytest.mark.parametrize("name", ["csv", "parquet"])
def test_a_line_is_a_duplicate_by_its_values_and_not_by_their_places(tmp_path, name):
    """The first line is in both files, whose columns stand in another order; the second line differs."""
    first = pd.DataFrame(
        [["1", "17", "2023-01-02 09:00:00", 2, 3], ["2", "17", "2023-01-03 09:00:00", 4, 1]],
        columns=["Invoice", "Customer", "At", "Price", "Pieces"],
    )
    second = first.assign(Price=[2.0, 1.0], Pieces=[3, 4])[["Pieces", "Invoice", "Customer", "At", "Price"]]
    for number, frame in enumerate((first, second)):
        path = tmp_path / f"{number}.{name}"
        frame.to_csv(path, index=False) if name == "csv" else frame.to_parquet(path)
    if name == "csv":
        (tmp_path / "1.csv").write_text((tmp_path / "1.csv").read_text().replace(".0", ""))
    report = run(tmp_path, merge_values(ORDERS, {"source": {"type": name}}), tmp_path / f"*.{name}")
    assert report["rows_dropped"] == 1
    dropped = read(tmp_path, "dropped.parquet")
    assert dropped[["source", "row"]].to_numpy().tolist() == [[f"1.{name}", 1]]


def test_a_table_without_ids_is_numbered_through_its_files(tmp_path):
    folder = tmp_path / "plans"
    folder.mkdir()
    (folder / "a.csv").write_text("plan,paid,gender,left\na,1,f,yes\nb,2,m,no\n", encoding="utf-8")
    (folder / "b.csv").write_text("plan,paid,gender,left\na,1,f,yes\na,1,f,yes\n", encoding="utf-8")
    config = merge_values(PLANS, {"columns": {"entity_id": "row_number"}})
    run(tmp_path, config, folder)
    assert read(tmp_path, "customers.parquet")["customer_id"].tolist() == ["1", "2", "3", "4"]
    run(tmp_path, merge_values(config, {"cleaning": {"drop_duplicates": True}}), folder)
    assert read(tmp_path, "customers.parquet")["customer_id"].tolist() == ["1", "2"]


def test_odd_names_are_read_under_others(tmp_path):
    path = tmp_path / "plans.csv"
    path.write_text('id,"plan #1, ""old""",paid:eur,gender,left\n1,a,2,f,yes\n', encoding="utf-8")
    config = merge_values(PLANS, {"columns": {"rename": {'plan #1, "old"': "plan", "paid:eur": "paid"}}})
    run(tmp_path, config, path)
    assert read(tmp_path, "customers.parquet")[["plan", "paid"]].to_numpy().tolist() == [["a", 2.0]]


def test_words_that_may_mean_a_missing_value_are_told_or_taken_for_one(tmp_path, caplog):
    path = tmp_path / "plans.csv"
    path.write_text("id,plan,paid,gender,left\n1,NULL,1,?,yes\n2,NULL,1,f,no\n3,a,1,\\N,no\n", encoding="utf-8")
    report = run(tmp_path, PLANS, path)
    assert report["missing_words"] == {"plan": {"NULL": 2}, "gender": {"?": 1, "\\N": 1}}
    assert "column plan holds NULL (2): if that means a missing value, name it in source.na_values" in caplog.text
    taken = run(tmp_path, merge_values(PLANS, {"source": {"na_values": ["NULL", "?", "\\N"]}}), path)
    assert (taken["missing_words"], taken["blank_values"]) == ({}, {"plan": 2, "gender": 2})


def test_a_decimal_comma_between_semicolons(tmp_path):
    path = tmp_path / "plans.csv"
    path.write_text("id;plan;paid;gender;left\n1;a;10,5;f;yes\n", encoding="cp1252")
    config = merge_values(PLANS, {"source": {"delimiter": ";", "decimal": ",", "encoding": "cp1252"}})
    run(tmp_path, config, path)
    assert read(tmp_path, "customers.parquet")["paid"].tolist() == [10.5]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("2e+16,a,1,f,yes", "column 'id': 2e\\+16 may have lost digits"),
        ("a\0b,a,1,f,yes", "column 'id': must be a text of 1 to 200 printable characters"),
        ("1,a\0b,1,f,yes", "column 'plan': must not hold control characters"),
    ],
)
def test_an_id_or_code_that_cannot_be_kept_is_refused_with_its_place(tmp_path, cells, message):
    path = tmp_path / "plans.csv"
    path.write_text(f"id,plan,paid,gender,left\n{cells}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"plans\.csv, row 1, {message}"):
        run(tmp_path, PLANS, path)


SHOP = {**ORDERS, "name": "shop", "source": {"type": "simulator"}, "timezone": "UTC", "cleaning": {}}


def simulate_shop(folder: Path, **simulator: Any) -> tuple[pd.DataFrame, Layout]:
    """The events of a shop of 300 customers in February 2023."""
    given = {"as_of": "2023-03-01", "simulator": {"customers": 300, "start_date": "2023-01-15", **simulator}}
    layout = Layout(raw=folder / "raw", ingest_metrics=folder / "ingest.json")
    params = parse_params({"dataset": "shop", "seed": 7, "model": {"type": "random_forest"}, **given}, "params.yaml")
    ingest(params, DatasetConfig.model_validate(SHOP), layout)
    events = pd.concat([pd.read_parquet(path) for path in sorted((layout.raw / "events").glob("*.parquet"))])
    return events, layout


def test_the_simulated_shop_calls_the_treated_customers_of_each_list(tmp_path: Path) -> None:
    before, _ = simulate_shop(tmp_path / "without")
    names = sorted(before["customer_id"].unique())
    calls = tmp_path / "calls"
    calls.mkdir()
    arms = ["treated" if place % 2 else "held_out" for place in range(len(names))]
    listed = pd.DataFrame({"customer_id": names, "arm": arms, "campaign": "2023-02-10"})
    listed.to_parquet(calls / "2023-02-10.parquet")
    after, _ = simulate_shop(tmp_path / "with", calls=str(calls))

    def split(events: pd.DataFrame, arm: str) -> pd.DataFrame:
        return events[events["customer_id"].isin(set(listed.loc[listed["arm"] == arm, "customer_id"]))]

    day = pd.Timestamp("2023-02-10", tz="UTC")
    early = [rows[rows["time"] < day].reset_index(drop=True) for rows in (before, after)]
    pd.testing.assert_frame_equal(*early)
    alone = [split(rows, "held_out") for rows in (before, after)]
    did = [sorted(zip(rows["customer_id"], rows["event_type"], rows["time"].dt.date, strict=True)) for rows in alone]
    assert did[0] == did[1]
    bought = [int((split(rows, "treated")["event_type"] == "purchase").sum()) for rows in (before, after)]
    assert bought[1] > bought[0]


def test_lists_to_call_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"simulator.calls: .*nowhere: there is no such folder"):
        simulate_shop(tmp_path, calls=str(tmp_path / "nowhere"))


def test_a_customer_on_two_lists_of_a_day_is_called_once(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()
    names = [f"C{number:06d}" for number in range(60)]
    listed = pd.DataFrame({"customer_id": names, "arm": "treated", "campaign": "2023-02-10"})
    listed.to_parquet(calls / "a.parquet")
    once, _ = simulate_shop(tmp_path / "once", calls=str(calls))
    listed.to_parquet(calls / "b.parquet")
    twice, _ = simulate_shop(tmp_path / "twice", calls=str(calls))
    pd.testing.assert_frame_equal(once, twice)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arm": None}, r"a\.parquet: .*arm"),
        ({"campaign": "soon"}, r"a\.parquet: campaign 'soon': expected its date"),
        ({"customer_id": "7590-VHVEG"}, r"a\.parquet: customer_id '7590-VHVEG': no customer of the simulated shop"),
    ],
)
def test_a_list_to_call_that_is_none_of_the_shops_is_an_error(tmp_path: Path, changed: Any, message: str) -> None:
    row = {"customer_id": "C000001", "arm": "treated", "campaign": "2023-02-10"} | changed
    rows = pd.DataFrame({name: [value] for name, value in row.items() if value is not None})
    calls = tmp_path / "calls"
    calls.mkdir()
    rows.to_parquet(calls / "a.parquet")
    with pytest.raises(DataError, match=message):
        simulate_shop(tmp_path / "shop", calls=str(calls))
