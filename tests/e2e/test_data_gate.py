"""The data gate: each fault in the canonical tables fails the expectations that are about it, and no other."""

from __future__ import annotations

import hashlib

import pandas as pd
import pytest

from closedloop.tabular.tables import EVENT_SCHEMA, write_table

OWN_OUTPUTS = ("metrics/data_quality.json", "reports/data_docs/", "reports/data_quality.html")
CUSTOMERS = "data/raw/customers.parquet"


@pytest.fixture(scope="module")
def tiny_shop(make_project, tmp_path_factory):
    """Seven weeks of a small shop, ingested: large enough for its expectations."""
    made = make_project(tmp_path_factory.mktemp("tiny") / "project")
    made.change_params({"as_of": "2023-02-20", "simulator": {"customers": 6_000}})
    made.run("ingest")
    return made


@pytest.fixture
def shop(tiny_shop, tmp_path):
    return tiny_shop.copy(tmp_path / "project")


def edit_customers(shop, edit):
    """Rewrite the customers' table, as another writer would."""
    path = shop.root / CUSTOMERS
    write_table(path, edit(pd.read_parquet(path)))


def edit_day(shop, day, edit):
    """Rewrite one day of events."""
    path = shop.root / f"data/raw/events/{day}.parquet"
    write_table(path, edit(pd.read_parquet(path)), EVENT_SCHEMA)


def put(frame, place, column, value):
    """A copy with one value changed."""
    changed = frame.copy()
    changed.loc[frame.index[place], column] = value
    return changed


def rename_age(shop):
    edit_customers(shop, lambda rows: rows.rename(columns={"age": "customer_age"}))


def drop_gender(shop):
    edit_customers(shop, lambda rows: rows.drop(columns="gender"))


def set_age_400(shop):
    edit_customers(shop, lambda rows: put(rows, 3, "age", 400))


def forget_signup(shop):
    edit_customers(shop, lambda rows: put(rows, 3, "signup_at", pd.NaT))


def invent_segment(shop):
    edit_customers(shop, lambda rows: put(rows, 3, "segment", "vip"))


def repeat_customer(shop):
    edit_customers(shop, lambda rows: pd.concat([rows, rows.iloc[[3]]]))


def lose_most_customers(shop):
    edit_customers(shop, lambda rows: rows.head(900))
    kept = set(pd.read_parquet(shop.root / CUSTOMERS)["customer_id"])
    for path in (shop.root / "data/raw/events").glob("*.parquet"):
        events = pd.read_parquet(path)
        write_table(path, events[events["customer_id"].isin(kept)])


def refund_by_sign(shop):
    edit_day(shop, "2023-01-20", lambda rows: put(rows, int(rows["amount"].argmax()), "amount", -12.5))


def invent_event_type(shop):
    edit_day(shop, "2023-01-20", lambda rows: put(rows, 3, "event_type", "refund"))


def orphan_events(shop):
    edit_day(shop, "2023-01-20", lambda rows: put(rows, slice(5), "customer_id", "X00001"))


def lose_ids(shop):
    edit_day(shop, "2023-01-20", lambda rows: put(rows, slice(5), "customer_id", None))


def lose_a_day(shop):
    (shop.root / "data/raw/events/2023-01-20.parquet").unlink()


def lose_newest_days(shop):
    for day in (17, 18, 19):
        (shop.root / f"data/raw/events/2023-02-{day}.parquet").unlink()


def let_clock_run_ahead(shop):
    newest = pd.read_parquet(shop.root / "data/raw/events/2023-02-19.parquet")
    later = newest.assign(time=(newest["time"] + pd.Timedelta(days=1)).astype("datetime64[us, UTC]"))
    write_table(shop.root / "data/raw/events/2023-02-20.parquet", later, EVENT_SCHEMA)


BETWEEN = "expect_column_values_to_be_between"
IN_SET = "expect_column_values_to_be_in_set"
NOT_NULL = "expect_column_values_to_not_be_null"
UNIQUE = "expect_column_values_to_be_unique"
ROW_COUNT = "expect_table_row_count_to_be_between"
# fault, what fails, and what the message says: place, figure, limit
FAULTS = [
    (rename_age, {("customers", BETWEEN, "age")}, ["customers.age", '"age"', "min_value=16.0, max_value=110.0"]),
    (drop_gender, {("customers", IN_SET, "gender")}, ["customers.gender", '"gender"', "'female', 'male', 'other'"]),
    (set_age_400, {("customers", BETWEEN, "age")}, ["customers.age", "1 of 1,940 values", "max_value=110.0"]),
    (forget_signup, {("customers", NOT_NULL, "signup_at")}, ["customers.signup_at", "1 of 1,940 values"]),
    (invent_segment, {("customers", IN_SET, "segment")}, ["customers.segment", "1 of 1,940", "'premium'"]),
    (repeat_customer, {("customers", UNIQUE, "customer_id")}, ["customers.customer_id", "2 of 1,941 values"]),
    (lose_most_customers, {("customers", ROW_COUNT, None)}, ["customers:", "found 900", "min_value=1000"]),
    (refund_by_sign, {("events", BETWEEN, "amount")}, ["events.amount", "1 of 42,189 values", "min_value=0"]),
    (invent_event_type, {("events", IN_SET, "event_type")}, ["events.event_type", "1 of 42,189", "'ticket'"]),
    (orphan_events, {("events", IN_SET, "known_customer")}, ["events.known_customer", "5 of 42,189", "X00001"]),
    # an event without a customer has no known customer either
    (
        lose_ids,
        {("events", NOT_NULL, "customer_id"), ("events", IN_SET, "known_customer")},
        ["events.customer_id", "5 of 42,189 values"],
    ),
    (lose_a_day, {("days", BETWEEN, "gap_days")}, ["days.gap_days", "1 of 49 values", "max_value=1", "2023-01-21"]),
    (lose_newest_days, {("freshness", BETWEEN, "age_days")}, ["freshness.age_days", "max_value=1", "2023-02-16"]),
    (let_clock_run_ahead, {("freshness", BETWEEN, "age_days")}, ["freshness.age_days", "min_value=0", "2023-02-20"]),
]


def list_failures(shop, severity):
    report = shop.read_json("metrics/data_quality.json")
    return {
        (finding["table"], finding["expectation"], finding["column"])
        for finding in report["findings"]
        if not finding["success"] and finding["severity"] == severity
    }


def digest_files(shop):
    """Digest of every file that the stage may not touch."""
    files = (path for path in shop.root.rglob("*") if path.is_file())
    digests = {str(path.relative_to(shop.root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {name: digest for name, digest in digests.items() if not name.startswith(OWN_OUTPUTS)}


def test_the_tables_without_a_fault_pass(shop):
    assert "19 of 19 expectations hold, 0 warnings" in shop.run("validate").output


@pytest.mark.parametrize(("fault", "failures", "words"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS])
def test_a_fault_stops_the_line(shop, fault, failures, words):
    fault(shop)
    before = digest_files(shop)
    output = " ".join(shop.run("validate", status=2).output.split())
    assert f"GateFailed: data gate: failed critical expectations: {len(failures)} of 19" in output
    for word in words:
        assert word in output
    assert list_failures(shop, "critical") == failures
    report = shop.read_json("metrics/data_quality.json")
    assert report["failed_critical"] == len(failures)
    assert report["expectations"] == len(report["findings"]) == 19
    assert digest_files(shop) == before
    assert (shop.root / "reports/data_docs/index.html").is_file()


def test_nothing_is_trained_on_what_the_gate_refused(shop):
    assert "'closedloop validate' writes it" in " ".join(shop.run("train", status=1).output.split())
    let_clock_run_ahead(shop)
    shop.run("validate", status=2)
    output = " ".join(shop.run("train", status=2).output.split())
    assert "GateFailed: " in output
    assert "1 critical expectation failed, so nothing is trained" in output


def test_a_warning_is_reported_and_stops_nothing(shop):
    edit_day(shop, "2023-01-20", lambda rows: rows.head(50))
    assert "18 of 19 expectations hold, 1 warning" in shop.run("validate").output
    assert list_failures(shop, "warning") == {("days", BETWEEN, "events")}
    assert list_failures(shop, "critical") == set()


def test_at_most_twenty_failing_rows_are_listed_by_id(shop):
    edit_customers(shop, lambda rows: put(rows, slice(30), "age", 400))
    output = shop.run("validate", status=2).output
    wrong = pd.read_parquet(shop.root / CUSTOMERS).head(30)
    (finding,) = [one for one in shop.read_json("metrics/data_quality.json")["findings"] if not one["success"]]
    assert finding["failing"] == 30
    assert finding["rows"] == [{"age": 400.0, "customer_id": one} for one in wrong["customer_id"].head(20)]
    assert "30 of 1,940 values fail" in output
    assert wrong["customer_id"].iloc[0] in output


def test_a_gate_that_says_no_leaves_the_later_stages_results(shop_copy):
    before = digest_files(shop_copy)
    edit_customers(shop_copy, lambda rows: put(rows, 3, "age", 400))
    shop_copy.run("validate", status=2)
    after = digest_files(shop_copy)
    assert {name for name in before | after if before.get(name) != after.get(name)} == {CUSTOMERS}


def test_a_day_with_another_schema_is_refused_by_name(shop):
    path = shop.root / "data/raw/events/2023-01-20.parquet"
    write_table(path, pd.read_parquet(path).rename(columns={"amount": "price"}))
    output = " ".join(shop.run("validate", status=1).output.split())
    assert "DataError: data/raw/events/2023-01-20.parquet: " in output
    assert "price: double, no amount" in output
