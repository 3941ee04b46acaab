"""Expectations on real Great Expectations: each kind that a shipped config uses passes, and fails with its reasons."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest

from closedloop.adapters.gx import ExpectationResult, run_expectations
from closedloop.config.dataset import ExpectationConfig, load_dataset

CONFIGS = Path(__file__).parents[2] / "configs/datasets"
AS_OF = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
ROW_IDS = {"customers": ["customer_id"], "events": ["customer_id", "time"]}


class Kind(NamedTuple):
    """A column's values in a good and in a bad table; what the bad one is said to hold, and the limit in words."""

    type: str
    limits: dict[str, Any]
    good: Any
    bad: Any
    found: str
    limit: str


KINDS = {
    "age": Kind(
        "expect_column_values_to_be_between",
        {"min_value": 16, "max_value": 110},
        16,
        15,
        "25 of 29 values fail",
        "min_value=16.0, max_value=110.0",
    ),
    "plan": Kind(
        "expect_column_values_to_be_in_set",
        {"value_set": ["free", "paid"]},
        "paid",
        "gold",
        "25 of 29 values fail",
        "value_set=['free', 'paid']",
    ),
    "code": Kind(
        "expect_column_values_to_match_regex",
        {"regex": r"^\d{5}$"},
        "12345",
        "123456",
        "25 of 29 values fail",
        r"regex=^\d{5}$",
    ),
    "since": Kind(
        "expect_column_values_to_not_be_null", {}, pd.Timestamp("2023-05-01"), None, "25 of 29 values fail", "(-)"
    ),
    "key": Kind("expect_column_values_to_be_unique", {}, None, "same", "25 of 29 values fail", "(-)"),
    "usage": Kind(
        "expect_column_mean_to_be_between",
        {"min_value": 0, "max_value": 2},
        2.0,
        12.0,
        "found 10.620689655172415",  # (25 * 12 + 4 * 2) / 29
        "min_value=0.0, max_value=2.0",
    ),
}
ROW_COUNT = "expect_table_row_count_to_be_between"


def build_table(rows: int, bad_rows: int) -> pd.DataFrame:
    """The first rows are bad in every column."""
    table = pd.DataFrame({"customer_id": [f"C{number:02}" for number in range(rows)]})
    for name, kind in KINDS.items():
        good = table["customer_id"].tolist() if kind.good is None else [kind.good] * rows
        table[name] = [kind.bad] * bad_rows + good[bad_rows:]
    return table


def expect(type_: str, table: str = "customers", severity: str = "critical", **kwargs: Any) -> ExpectationConfig:
    return ExpectationConfig(table=table, type=type_, severity=severity, kwargs=kwargs)  # type: ignore[arg-type]


EXPECTATIONS = (
    *(expect(kind.type, column=name, **kind.limits) for name, kind in KINDS.items()),
    expect(ROW_COUNT, min_value=30),
)


def run(
    folder: Path, tables: dict[str, pd.DataFrame], expectations: tuple[ExpectationConfig, ...]
) -> dict[str | None, ExpectationResult]:
    """Findings by column."""
    folder.mkdir()
    findings = run_expectations(tables, expectations, row_ids=ROW_IDS, docs_dir=folder, as_of=AS_OF)
    assert len(findings) == len(expectations)
    return {finding.column: finding for finding in findings}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, ExpectationResult]:
    return run(tmp_path_factory.mktemp("bad") / "docs", {"customers": build_table(29, 25)}, EXPECTATIONS)


def test_every_kind_in_a_shipped_config_is_tried_here() -> None:
    datasets = [load_dataset(path.stem, CONFIGS) for path in CONFIGS.glob("*.yaml")]
    used = {item.type for dataset in datasets for item in dataset.expectations}
    assert used == {kind.type for kind in KINDS.values()} | {ROW_COUNT}


def test_good_rows_meet_every_expectation(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    findings = run(docs, {"customers": build_table(30, 0)}, EXPECTATIONS)
    assert {column: finding.success for column, finding in findings.items()} == dict.fromkeys([*KINDS, None], True)
    assert [finding.rows for finding in findings.values()] == [[]] * len(EXPECTATIONS)
    assert (docs / "index.html").is_file()


@pytest.mark.parametrize("column", KINDS)
def test_bad_rows_are_named_with_column_figure_and_limit(column: str, bad: dict[str | None, ExpectationResult]) -> None:
    kind, finding = KINDS[column], bad[column]
    assert not finding.success
    assert finding.severity == "critical"
    assert (finding.table, finding.expectation) == ("customers", kind.type)
    sentence = finding.sentence()
    assert sentence.startswith(f"customers.{column}: {kind.type} (")
    assert kind.limit in sentence
    assert f": {kind.found}" in sentence
    if kind.type.startswith("expect_column_values_"):
        assert (finding.failing, finding.checked) == (25, 29)
        # twenty of the 25, each by its id
        assert [row["customer_id"] for row in finding.rows] == [f"C{number:02}" for number in range(20)]
        assert sentence.count("customer_id=") == 3
        assert "customer_id=C00" in sentence
    else:
        assert finding.rows == []


def test_a_tables_row_count_is_named_with_its_limit(bad: dict[str | None, ExpectationResult]) -> None:
    finding = bad[None]
    assert not finding.success
    assert finding.sentence() == f"customers: {ROW_COUNT} (min_value=30): found 29"


def test_findings_are_written_as_json_whatever_their_rows_hold(tmp_path: Path) -> None:
    time = pd.Timestamp("2024-01-01 12:00", tz="UTC")
    events = pd.DataFrame({"customer_id": ["anna", None], "time": [time, pd.NaT], "amount": [-1.5, -2.5]})
    events["known"], events["fee"] = [False, False], [float("nan"), float("nan")]
    wanted = (
        expect("expect_column_values_to_be_between", "events", column="amount", min_value=0),
        expect("expect_column_values_to_be_in_set", "events", column="known", value_set=[True]),
        expect("expect_column_values_to_not_be_null", "events", column="fee"),
    )
    findings = run(tmp_path / "docs", {"events": events}, wanted)
    written = json.loads(json.dumps({column: asdict(finding) for column, finding in findings.items()}, allow_nan=False))
    first = {"customer_id": "anna", "time": "2024-01-01T12:00:00+00:00"}
    assert written["amount"]["rows"][0] == {"amount": -1.5, **first}
    assert written["known"]["rows"][0] == {"known": False, **first}
    assert written["fee"]["rows"][0] == {"fee": "None", **first}
    assert [finding["failing"] for finding in written.values()] == [2, 2, 2]


def test_a_warning_is_told_apart_and_stops_nothing(tmp_path: Path) -> None:
    tables = {"customers": build_table(30, 25), "events": build_table(30, 0)}
    wanted = (
        expect("expect_column_values_to_be_between", severity="warning", column="age", min_value=16),
        expect("expect_column_values_to_be_in_set", "events", column="plan", value_set=["paid"]),
    )
    tables["events"]["time"] = AS_OF
    findings = run(tmp_path / "docs", tables, wanted)
    assert {(one.table, one.severity, one.success) for one in findings.values()} == {
        ("customers", "warning", False),
        ("events", "critical", True),
    }


def test_a_column_without_any_value_holds_nothing(tmp_path: Path) -> None:
    """Great Expectations leaves missing values out, and would call it a success."""
    table = build_table(30, 0).assign(age=None, plan=None, code=None)
    wanted = tuple(expect(KINDS[name].type, column=name, **KINDS[name].limits) for name in ("age", "plan", "code"))
    findings = run(tmp_path / "docs", {"customers": table}, wanted)
    assert {name: finding.success for name, finding in findings.items()} == {"age": False, "plan": False, "code": False}
    assert findings["plan"].sentence() == (
        "customers.plan: expect_column_values_to_be_in_set (value_set=['free', 'paid']): 30 of 30 values fail"
    )


def test_mostly_allows_a_share_and_counts_it(tmp_path: Path) -> None:
    table = build_table(30, 3).assign(half=[None] * 15 + [1.0] * 15)
    wanted = tuple(expect("expect_column_values_to_not_be_null", column=name, mostly=0.9) for name in ("since", "half"))
    findings = run(tmp_path / "docs", {"customers": table}, wanted)
    assert (findings["since"].success, findings["since"].failing) == (True, 3)
    assert (findings["half"].success, findings["half"].failing) == (False, 15)
    assert "customers.half: expect_column_values_to_not_be_null (mostly=0.9): 15 of 30 values fail" in (
        findings["half"].sentence()
    )


@pytest.mark.parametrize("type_", ["expect_column_values_to_be_unique", "expect_column_mean_to_be_between"])
def test_a_column_that_is_missing_fails_and_is_named(type_: str, tmp_path: Path) -> None:
    findings = run(tmp_path / "docs", {"customers": build_table(30, 0)}, (expect(type_, column="income"),))
    assert not findings["income"].success
    assert 'The column "income" in BatchData does not exist' in findings["income"].sentence()
    assert findings["income"].rows == []
