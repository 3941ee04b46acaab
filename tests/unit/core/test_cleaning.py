"""Which rows go, and for which reasons."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from closedloop.core.cleaning import CleaningRules, add_hashes, count_dirt, find_dirt, is_blank, normalise_ids

NOTHING_SEEN = np.array([], dtype="uint64")
RULES = CleaningRules(
    entity_id="id",
    drop_missing_id=True,
    drop_duplicates=True,
    cancellation_column="invoice",
    cancellation_prefix="C",
    require_positive=("price", "quantity"),
)
COLUMNS = ["invoice", "id", "price", "quantity"]


def frame(*rows: tuple[str | None, ...]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=COLUMNS, dtype=object)


def dirt_of(rows: pd.DataFrame, rules: CleaningRules = RULES, seen: np.ndarray = NOTHING_SEEN) -> pd.DataFrame:
    numbers = {column: pd.to_numeric(rows[column]) for column in rules.require_positive}
    return find_dirt(rows, rules, numbers, seen)


@pytest.mark.parametrize(
    ("row", "reasons"),
    [
        (("1", "7", "2.5", "3"), []),
        (("1", None, "2.5", "3"), ["missing_id"]),
        (("1", "  ", "2.5", "3"), ["missing_id"]),
        (("C1", "7", "2.5", "3"), ["cancellation"]),
        (("1C", "7", "2.5", "3"), []),
        (("c1", "7", "2.5", "3"), []),
        ((None, "7", "2.5", "3"), []),
        (("1", "7", "0", "3"), ["price_not_positive"]),
        (("1", "7", None, "3"), ["price_not_positive"]),
        (("1", "7", "2.5", "-3"), ["quantity_not_positive"]),
        (("C1", None, "-1", "-1"), ["missing_id", "cancellation", "price_not_positive", "quantity_not_positive"]),
    ],
)
def test_each_rule_hits_its_rows_and_no_other(row, reasons):
    dirt = dirt_of(frame(row)).iloc[0]
    assert [rule for rule in dirt.index if dirt[rule]] == reasons


def test_rules_that_are_switched_off_have_no_column():
    rules = CleaningRules(entity_id="id", drop_missing_id=False)
    dirt = dirt_of(frame((None, None, None, None)), rules)
    assert dirt.columns.tolist() == []
    assert not dirt.any(axis=1).any()


def test_a_duplicate_is_a_row_equal_in_every_column_to_one_before_it():
    rows = frame(("1", "7", "2", "3"), ("1", "7", "2", "3"), ("1", "7", "2", "4"), ("1", "7", "2", "3"))
    assert dirt_of(rows)["duplicate"].tolist() == [False, True, False, True]


def test_blank_cells_are_equal_to_each_other():
    rows = frame(("1", None, "2", "3"), ("1", None, "2", "3"), ("1", "7", None, "3"))
    assert dirt_of(rows)["duplicate"].tolist() == [False, True, False]


def test_a_duplicate_of_an_earlier_chunk_is_found():
    first, second = frame(("1", "7", "2", "3"), ("2", "7", "2", "3")), frame(("2", "7", "2", "3"), ("3", "7", "2", "3"))
    assert dirt_of(second, seen=add_hashes(NOTHING_SEEN, first))["duplicate"].tolist() == [True, False]


@given(
    st.lists(st.tuples(*[st.sampled_from(["1", "2", None])] * 4), min_size=1, max_size=30),
    st.integers(min_value=0, max_value=30),
)
def test_where_a_chunk_ends_changes_no_verdict(rows, cut):
    whole = frame(*rows)
    head, tail = whole.iloc[:cut].reset_index(drop=True), whole.iloc[cut:].reset_index(drop=True)
    parts = [dirt_of(head), dirt_of(tail, seen=add_hashes(NOTHING_SEEN, head))]
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True), dirt_of(whole))
    assert dirt_of(whole)["duplicate"].tolist() == whole.duplicated().tolist()


def test_hashes_of_many_chunks_stay_in_order_and_complete():
    chunks = [frame((str(number), "7", "2", "3")) for number in range(50)]
    seen = NOTHING_SEEN
    for chunk in chunks:
        assert not dirt_of(chunk, seen=seen)["duplicate"].any()
        seen = add_hashes(seen, chunk)
    assert all(dirt_of(chunk, seen=seen)["duplicate"].all() for chunk in chunks)
    assert (seen[1:] > seen[:-1]).all()


def test_find_dirt_changes_none_of_its_arguments():
    rows, seen = frame(("C1", None, "0", "1"), ("C1", None, "0", "1")), NOTHING_SEEN
    before = rows.copy()
    dirt_of(rows, seen=seen)
    pd.testing.assert_frame_equal(rows, before)
    assert len(seen) == 0


def test_overlaps_are_counted_for_both_rules_and_the_first_reason_once():
    # by hand: rows without an id 0, 1, 2; cancellations 1, 2, 3; both 1, 2
    dirt = pd.DataFrame({"missing_id": [1, 1, 1, 0, 0], "cancellation": [0, 1, 1, 1, 0], "price": [0, 0, 1, 0, 0]})
    entries = count_dirt(dirt.astype(bool))
    assert entries == [
        {"rule": "missing_id", "rows": 3, "first_reason": 3, "also": {"cancellation": 2, "price": 1}},
        {"rule": "cancellation", "rows": 3, "first_reason": 1, "also": {"missing_id": 2, "price": 1}},
        {"rule": "price", "rows": 1, "first_reason": 0, "also": {"missing_id": 1, "cancellation": 1}},
    ]


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=40))
def test_first_reasons_add_up_to_the_rows_dropped(hits):
    dirt = pd.DataFrame(hits, columns=["a", "b", "c"], dtype=bool)
    entries = count_dirt(dirt)
    assert sum(int(entry["first_reason"]) for entry in entries) == sum(any(hit) for hit in hits)
    assert [entry["rows"] for entry in entries] == [sum(hit[place] for hit in hits) for place in range(3)]


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        (["17850.0", "17850", " 17850 "], ["17850", "17850", "17850"]),
        (["007", "A-1.0", "12.5", "1.00"], ["007", "A-1.0", "12.5", "1.00"]),
        (["", " ", None], [None, None, None]),
        ([17850, 2], ["17850", "2"]),
        ([17850.0, np.nan], ["17850", None]),
    ],
)
def test_ids_become_text_whatever_a_spreadsheet_made_of_them(values, ids):
    assert normalise_ids(pd.Series(values)).tolist() == ids


def test_blank_is_null_empty_or_white_space():
    values = pd.Series(["", " \t", None, float("nan"), "0", "nan", 0])
    assert is_blank(values).tolist() == [True, True, True, True, False, False, False]
