"""Files of outcomes, row by row; tests/e2e/test_dated_table.py stores them."""

from __future__ import annotations

import pandas as pd

from closedloop.config.dataset import DatasetConfig
from closedloop.loop.monitor.outcome_file import read_outcome_file

VISITS = DatasetConfig.model_validate(
    {
        "name": "visits",
        "model_name": "visits_churn",
        "description": "Members of a gym, as each was on a day.",
        "kind": "table",
        "source": {"type": "csv", "delimiter": ";", "time_format": "%d.%m.%Y"},
        "timezone": "UTC",
        "columns": {
            "entity_id": "member",
            "time": "day",
            "numeric": ["months"],
            "label": {"column": "left", "churned": "yes", "stayed": "no"},
        },
        "expectations": [],
    }
)


def test_days_are_written_as_the_data_set_writes_them(tmp_path):
    (tmp_path / "own.csv").write_text("member;day;left\nM1;03.02.2024;yes\n", encoding="utf-8")
    (tmp_path / "mixed.csv").write_text("member;day;outcome\nM1;03.02.2024;1\n", encoding="utf-8")
    (tmp_path / "plain.csv").write_text("member,day,outcome\nM1,2024-02-03,1\n", encoding="utf-8")
    for name in ("own.csv", "mixed.csv", "plain.csv"):
        [found] = read_outcome_file(tmp_path / name, VISITS)
        assert found.to_dict("records") == [
            {"customer_id": "M1", "outcome": True, "day": pd.Timestamp("2024-02-03", tz="UTC")}
        ]


def test_a_label_column_that_is_called_outcome_has_the_data_sets_own_values(tmp_path):
    columns = VISITS.columns.model_copy(
        update={"label": VISITS.columns.label.model_copy(update={"column": "outcome"}), "time": None}
    )
    (tmp_path / "own.csv").write_text("member;outcome\nM1;yes\nM2;no\n", encoding="utf-8")
    [found] = read_outcome_file(tmp_path / "own.csv", VISITS.model_copy(update={"columns": columns}))
    assert found["outcome"].tolist() == [True, False]
