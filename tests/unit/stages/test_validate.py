"""What the data gate asks of columns that the config says nothing about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.config.dataset import DatasetConfig
from closedloop.config.layout import Layout
from closedloop.config.params import merge_values, parse_params
from closedloop.errors import GateFailed
from closedloop.files import write_json
from closedloop.stages.validate import SHARE, list_expectations, validate
from closedloop.tabular.tables import write_table

ROWS = 150
MEMBERS: dict[str, Any] = {
    "name": "members",
    "model_name": "members_churn",
    "description": "Members.",
    "kind": "table",
    "source": {"type": "csv"},
    "columns": {
        "entity_id": "id",
        "numeric": ["fee", "nothing"],
        "categorical": ["plan", "country", "unknown"],
        "sensitive": "gender",
        "label": {"column": "left", "churned": "1", "stayed": "0"},
    },
    "expectations": [],
}
PARAMS = parse_params({"dataset": "members", "as_of": "2024-06-01", "seed": 1, "model": {"type": "random_forest"}}, "p")


def run(folder: Path, config: dict[str, Any], **columns: Any) -> dict[str, Any]:
    """A plain table but for these columns, through the gate."""
    number = np.arange(ROWS)
    plain = {
        "customer_id": number.astype(str),
        "fee": number / 7,
        "nothing": np.nan,
        "plan": np.where(number % 3, "a", "b"),
    }
    plain |= {"country": "PT", "unknown": None, "gender": np.where(number % 2, "f", "m"), "churned": number % 5 == 0}
    write_table(folder / "raw/customers.parquet", pd.DataFrame({**plain, **columns}))
    write_json(folder / "raw/ingest.json", {"rows_read": ROWS, "rows_kept": ROWS, "rows_dropped": 0, "dropped": []})
    layout = Layout(
        raw=folder / "raw",
        data_docs=folder / "docs",
        data_quality_page=folder / "page.html",
        data_quality=folder / "quality.json",
    )
    return validate(PARAMS, DatasetConfig.model_validate(config), layout)


def test_columns_that_say_nothing_are_warned_of(tmp_path, caplog):
    report = run(tmp_path, MEMBERS)
    failed = {finding["column"] for finding in report["findings"] if not finding["success"]}
    assert failed == {"nothing", "country", "unknown"}
    assert (report["failed_critical"], report["failed_warning"]) == (0, 3)
    assert "customers.country: expect_column_unique_value_count_to_be_between (min_value=2" in caplog.text
    assert "a column with the same value for every customer carries no information" in caplog.text


def test_an_identifier_among_the_categories_stops_the_line(tmp_path):
    emails = [f"m{number // 1.05:.0f}@example.com" for number in range(ROWS)]  # now and then one occurs twice
    assert 0.9 < len(set(emails)) / ROWS < 1
    with pytest.raises(GateFailed, match=r"(?s)1 of 9.*customers\.plan: .*an identifier is no feature: remove it from"):
        run(tmp_path, MEMBERS, plan=emails)
    # whoever wants it says so
    own = {"table": "customers", "type": SHARE, "kwargs": {"column": "plan", "max_value": 1.0}}
    assert run(tmp_path, merge_values(MEMBERS, {"expectations": [own]}), plan=emails)["failed_critical"] == 0


def test_a_few_customers_may_all_differ():
    config = DatasetConfig.model_validate(MEMBERS)
    few, enough = (pd.DataFrame({"fee": np.arange(rows) / 7}) for rows in (99, 100))
    assert SHARE not in {one.type for one in list_expectations(config, few)}
    assert SHARE in {one.type for one in list_expectations(config, enough)}


def test_an_identifier_among_the_numbers_stops_the_line_unless_the_config_wants_it(tmp_path):
    numbers = np.arange(ROWS) * 3.0 + 40_000
    with pytest.raises(GateFailed, match=r"(?s)1 of 10.*customers\.fee: .*an identifier is no feature"):
        run(tmp_path, MEMBERS, fee=numbers)
    own = {"table": "customers", "type": SHARE, "kwargs": {"column": "fee", "max_value": 1.0}}
    assert run(tmp_path, merge_values(MEMBERS, {"expectations": [own]}), fee=numbers)["failed_critical"] == 0
