"""Which snapshots train and test, and which rows go where."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from closedloop.config.dataset import load_dataset
from closedloop.config.layout import Layout
from closedloop.config.params import SplitParams, parse_params
from closedloop.errors import ConfigError, DataError
from closedloop.stages.training_set import (
    assign_parts,
    draw_parts,
    read_labels,
    require_classes,
    select_snapshots,
    split_table_by_time,
)

TELCO, SHOP = (load_dataset(name, Path(__file__).parents[3] / "configs/datasets") for name in ("telco", "shop"))
MONTHS = [dt.datetime(2024, month, 1, tzinfo=dt.UTC) for month in range(1, 7)]


def params_with(**data):
    return parse_params(
        {"dataset": "shop", "as_of": "2025-01-01", "seed": 1, "model": {"type": "random_forest"}, "data": data}, "test"
    )


def test_without_dates_every_snapshot_is_used():
    assert select_snapshots(params_with(), MONTHS) == MONTHS


def test_both_dates_are_included():
    chosen = select_snapshots(params_with(start_date="2024-02-01", end_date="2024-04-01"), MONTHS)
    assert [time.month for time in chosen] == [2, 3, 4]


def test_dates_without_a_snapshot_are_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"start_date 2024-07-01.*6 from 2024-01-01 to 2024-06-01"):
        select_snapshots(params_with(start_date="2024-07-01"), MONTHS)


def test_a_table_with_time_is_split_by_whole_days_newest_last():
    days = pd.Series(pd.to_datetime(["2024-01-01"] * 6 + ["2024-01-02"] * 2 + ["2024-01-03"] * 2, utc=True))
    parts = split_table_by_time(days, validation_fraction=0.2, test_fraction=0.2)
    assert parts.tolist() == ["train"] * 6 + ["validation"] * 2 + ["test"] * 2


@pytest.mark.parametrize(
    ("days", "said"), [(["01"], "of 2024-01-01; "), (["01", "02"], "of 2024-01-01 and 2024-01-02; ")]
)
def test_a_table_of_one_day_or_two_is_refused_with_the_remedy(days, said):
    times = pd.Series(pd.to_datetime([f"2024-01-{day}" for day in days] * 20, utc=True))
    with pytest.raises(DataError, match=said + r".*needs at least 3: give rows of more days, or take columns.time out"):
        split_table_by_time(times, validation_fraction=0.2, test_fraction=0.2)


def write_customers(folder, **columns):
    layout = Layout(raw=folder)
    values = {"customer_id": ["a", "b", "c"], "churned": [True, False, True], **columns}
    pd.DataFrame(values).to_parquet(folder / "customers.parquet")
    return layout


def test_dates_choose_a_tables_days(tmp_path):
    days = pd.to_datetime(["2024-01-01", "2024-01-02", "2024-01-03"], utc=True)
    layout = write_customers(tmp_path, event_timestamp=days)
    for data, ids in (({}, "abc"), ({"start_date": "2024-01-02"}, "bc"), ({"end_date": "2024-01-02"}, "ab")):
        assert "".join(read_labels(params_with(**data), TELCO, None, layout)["customer_id"]) == ids


def test_dates_of_a_table_without_days_are_refused(tmp_path):
    layout = write_customers(tmp_path)
    with pytest.raises(ConfigError, match=r"the table has no columns\.time"):
        read_labels(params_with(start_date="2024-01-02"), TELCO, None, layout)


def test_the_split_by_time_does_not_depend_on_the_order_of_the_rows():
    days = pd.Series(pd.date_range("2024-01-01", periods=50, tz="UTC").repeat(3))
    shuffled = days.sample(frac=1, random_state=1)
    parts = split_table_by_time(days, validation_fraction=0.2, test_fraction=0.2)
    assert split_table_by_time(shuffled, validation_fraction=0.2, test_fraction=0.2).sort_index().equals(parts)
    assert np.isclose((parts == "test").mean(), 0.2)


@pytest.mark.parametrize(("every", "ages"), [(30, [0]), (14, [0, 14]), (7, [0, 7, 14]), (15, [0])])
def test_customers_held_out_are_tested_on_the_snapshots_within_half_a_horizon(every, ages):
    days = pd.date_range("2024-12-02", periods=6, freq=f"-{every}D", tz="UTC")
    labels = pd.DataFrame({"customer_id": [str(one) for one in range(200)] * 6, "event_timestamp": days.repeat(200)})
    params = params_with()
    parts = assign_parts(
        params.model_copy(update={"split": params.split.model_copy(update={"by": "customer"})}), SHOP, labels
    )
    for part, expected in (("test", ages), ("validation", [0]), ("train", [every * place for place in range(6)])):
        found = labels.loc[parts == part, "event_timestamp"]
        assert sorted({(days[0] - day).days for day in found}) == expected


@pytest.mark.parametrize(("churned", "found"), [([True, True], "2 rows, all of one class"), ([], "no rows")])
def test_a_part_without_both_classes_is_refused(churned, found):
    labels = pd.DataFrame(
        {
            "part": ["train"] * 2 + ["validation"] * 2 + ["test"] * len(churned),
            "churned": [True, False, True, False, *churned],
        }
    )
    with pytest.raises(DataError, match=f"the test part has {found}"):
        require_classes(labels)


def make_parts(train: int = 3_000, test: int = 1_200) -> pd.DataFrame:
    labels = pd.DataFrame({"customer_id": [f"C{number}" for number in range(train + test)]})
    labels["event_timestamp"] = pd.Timestamp("2024-01-01", tz="UTC").as_unit("us")
    labels["churned"] = np.arange(len(labels)) % 3 == 0
    return labels.assign(part=["train"] * train + ["test"] * test)


def with_bound(rows_max: int | None):
    return params_with().model_copy(update={"split": SplitParams(rows_max=rows_max)})


def test_each_part_is_drawn_within_the_bound_and_says_how_many_there_were():
    labels = make_parts()
    drawn, known_rows = draw_parts(with_bound(2_000), labels)
    assert drawn["part"].value_counts().to_dict() == {"train": 2_000, "test": 1_200}
    assert known_rows == {"train": 3_000, "test": 1_200}
    assert drawn.groupby("part")["row_weight"].sum().to_dict() == pytest.approx({"train": 3_000, "test": 1_200})
    assert drawn["customer_id"].is_monotonic_increasing == labels["customer_id"].is_monotonic_increasing
    other, _ = draw_parts(with_bound(2_000), labels.sample(frac=1, random_state=1))
    assert set(other["customer_id"]) == set(drawn["customer_id"])


@pytest.mark.parametrize("rows_max", [None, 3_000])
def test_a_bound_that_no_part_passes_leaves_the_labels_as_they_are(rows_max):
    labels = make_parts()
    drawn, known_rows = draw_parts(with_bound(rows_max), labels)
    assert drawn is labels
    assert known_rows == {}
