"""Which rows go, and for which reasons."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from closedloop.core.features.cleaning import (
    NOTHING_SEEN,
    CleaningRules,
    add_hashes,
    count_broken_rules,
    find_broken_rules,
    hash_rows,
    is_blank,
)

RULES = CleaningRules(
    drop_missing_id=True,
    cancellation_column="invoice",
    cancellation_prefix="C",
    require_positive=("price", "quantity"),
)
COLUMNS = ["invoice", "id", "price", "quantity"]


def frame(*rows: tuple[str | None, ...]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=COLUMNS, dtype=object)


def broken_of(rows: pd.DataFrame, rules: CleaningRules = RULES, seen: np.ndarray = NOTHING_SEEN) -> pd.DataFrame:
    numbers = {column: pd.to_numeric(rows[column]) for column in rules.require_positive}
    ids = rows["id"].mask(is_blank(rows["id"]), None)
    return find_broken_rules(rows, rules, ids, numbers, hashes=hash_rows(rows), seen=seen)


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
    broken = broken_of(frame(row)).iloc[0]
    assert [rule for rule in broken.index if broken[rule]] == reasons


def test_a_row_without_a_value_that_is_required_is_dropped_and_says_which():
    rows = pd.DataFrame({"id": ["1", "2", "3"], "left": ["yes", " ", None]})
    broken = find_broken_rules(rows, CleaningRules(require_value=("left",)), rows["id"], {})
    assert broken["left_blank"].tolist() == [False, True, True]


def test_rules_that_are_switched_off_have_no_column():
    rows = frame((None, None, None, None))
    broken = find_broken_rules(rows, CleaningRules(drop_missing_id=False), rows["id"], {})
    assert broken.columns.tolist() == []
    assert not broken.any(axis=1).any()


def test_a_duplicate_is_a_row_equal_in_every_column_to_one_before_it():
    rows = frame(("1", "7", "2", "3"), ("1", "7", "2", "3"), ("1", "7", "2", "4"), ("1", "7", "2", "3"))
    assert broken_of(rows)["duplicate"].tolist() == [False, True, False, True]


@pytest.mark.parametrize("other", [7, 7.0, "7.0", " 7", Decimal("7.00"), "7.0E0", np.float32(7)])
def test_a_duplicate_may_have_another_type_in_another_file(other):
    """A column becomes one of floats where a value is missing, and a CSV file keeps that as 7.0."""
    first, second = (pd.DataFrame({"id": [one], "note": [None]}) for one in ("7", other))
    assert hash_rows(first).tolist() == hash_rows(second).tolist()
    assert hash_rows(first).tolist() != hash_rows(pd.DataFrame({"id": ["7a"], "note": [None]})).tolist()


def test_blank_cells_are_equal_to_each_other():
    rows = frame(("1", None, "2", "3"), ("1", None, "2", "3"), ("1", "7", None, "3"))
    assert broken_of(rows)["duplicate"].tolist() == [False, True, False]


def test_a_duplicate_of_an_earlier_chunk_is_found():
    first, second = frame(("1", "7", "2", "3"), ("2", "7", "2", "3")), frame(("2", "7", "2", "3"), ("3", "7", "2", "3"))
    assert broken_of(second, seen=add_hashes(NOTHING_SEEN, hash_rows(first)))["duplicate"].tolist() == [True, False]


@given(
    st.lists(st.tuples(*[st.sampled_from(["1", "2", None])] * 4), min_size=1, max_size=30),
    st.integers(min_value=0, max_value=30),
)
def test_where_a_chunk_ends_changes_no_verdict(rows, cut):
    whole = frame(*rows)
    head, tail = whole.iloc[:cut].reset_index(drop=True), whole.iloc[cut:].reset_index(drop=True)
    parts = [broken_of(head), broken_of(tail, seen=add_hashes(NOTHING_SEEN, hash_rows(head)))]
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True), broken_of(whole))
    assert broken_of(whole)["duplicate"].tolist() == whole.duplicated().tolist()


def test_hashes_of_many_chunks_stay_in_order_and_complete():
    chunks = [frame((str(number), "7", "2", "3")) for number in range(50)]
    seen = NOTHING_SEEN
    for chunk in chunks:
        assert not broken_of(chunk, seen=seen)["duplicate"].any()
        seen = add_hashes(seen, hash_rows(chunk))
    assert all(broken_of(chunk, seen=seen)["duplicate"].all() for chunk in chunks)
    assert (seen[1:] > seen[:-1]).all()


def test_finding_broken_rules_changes_none_of_its_arguments():
    rows, seen = frame(("C1", None, "0", "1"), ("C1", None, "0", "1")), NOTHING_SEEN
    before = rows.copy()
    broken_of(rows, seen=seen)
    pd.testing.assert_frame_equal(rows, before)
    assert len(seen) == 0


def test_overlaps_are_counted_for_both_rules_and_the_first_reason_once():
    # by hand: rows without an id 0, 1, 2; cancellations 1, 2, 3; both 1, 2
    broken = pd.DataFrame({"missing_id": [1, 1, 1, 0, 0], "cancellation": [0, 1, 1, 1, 0], "price": [0, 0, 1, 0, 0]})
    entries = count_broken_rules(broken.astype(bool))
    assert entries == [
        {"rule": "missing_id", "rows": 3, "first_reason": 3, "also": {"cancellation": 2, "price": 1}},
        {"rule": "cancellation", "rows": 3, "first_reason": 1, "also": {"missing_id": 2, "price": 1}},
        {"rule": "price", "rows": 1, "first_reason": 0, "also": {"missing_id": 1, "cancellation": 1}},
    ]


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=40))
def test_first_reasons_add_up_to_the_rows_dropped(hits):
    broken = pd.DataFrame(hits, columns=["a", "b", "c"], dtype=bool)
    entries = count_broken_rules(broken)
    assert sum(int(entry["first_reason"]) for entry in entries) == sum(any(hit) for hit in hits)
    assert [entry["rows"] for entry in entries] == [sum(hit[place] for hit in hits) for place in range(3)]


def test_neither_the_order_of_columns_nor_their_type_makes_rows_differ():
    text = frame(("1", "7", "2", "3"), ("1", "7", "3", "2"))
    assert hash_rows(text[COLUMNS[::-1]]).tolist() == hash_rows(text).tolist()
    assert len(set(hash_rows(text))) == 2  # 2 and 3 exchanged is another row
    whole = pd.DataFrame({"id": [1, 2], "n": [10**17, 5], "on": [True, False]})
    beside_null = pd.DataFrame(
        {"id": [1.0, 2.0, np.nan], "n": pd.array([10**17, 5, None], dtype="Int64"), "on": [True, False, True]}
    )
    assert hash_rows(beside_null)[:2].tolist() == hash_rows(whole).tolist()


def test_the_same_values_under_other_names_are_another_row():
    assert hash_rows(pd.DataFrame({"a": ["1"], "b": ["2"]})) != hash_rows(pd.DataFrame({"a": ["1"], "c": ["2"]}))


def test_blank_is_null_empty_or_white_space():
    values = pd.Series(["", " \t", None, float("nan"), "0", "nan", 0])
    assert is_blank(values).tolist() == [True, True, True, True, False, False, False]
