"""The contract's rules: how ids and codes are spelt."""

from __future__ import annotations

import ast
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from closedloop import rules
from closedloop.rules import FeatureRule, normalise_code
from closedloop.scoring import edge_script


@pytest.mark.parametrize(("module", "packages"), [(rules, {"numpy"}), (edge_script, {"numpy", "onnxruntime", "rules"})])
def test_an_edge_machine_needs_no_other_package(module: Any, packages: set[str]) -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names -= {"closedloop.rules"} if module is edge_script else set()  # in the package; on an edge machine `rules`
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == packages


@pytest.mark.parametrize("value", [7, 7.0, "7", "7.0", "7.00", " 7.0 ", Decimal("7.00"), np.int8(7), np.float32(7)])
def test_a_whole_number_has_one_spelling_whatever_type_its_column_had(value: Any) -> None:
    assert normalise_code(value) == "7"


@pytest.mark.parametrize(
    "text", ["A1", "007", "007.0", "1.5", "1.10", "1E5", "+7.0", "v1.0", "1.0.0", "nan", "\u0661.0", "a b", "C\n1", "-"]
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert normalise_code(text) == text


TWO_CHARACTERS, ONE_CHARACTER = "Ge\u0301ne\u0301ve", "G\u00e9n\u00e9ve"  # as macOS may write it, and others do


def test_a_letter_and_its_mark_are_one_character() -> None:
    assert normalise_code(f" {TWO_CHARACTERS} ") == normalise_code(ONE_CHARACTER) == ONE_CHARACTER


@pytest.mark.parametrize("category", [TWO_CHARACTERS, ONE_CHARACTER])
@pytest.mark.parametrize("sent", [TWO_CHARACTERS, ONE_CHARACTER])
def test_a_category_is_found_however_its_marks_are_written(category: str, sent: str) -> None:
    """Also by the contract of a model that was trained before, which packs it as it stands there."""
    rule = FeatureRule({"name": "city", "nullable": False, "kind": "categorical", "categories": ["a", category]}, 1.0)
    assert rule.read(sent) == category


@pytest.mark.parametrize("value", [None, "", "  ", float("nan"), np.float32("nan")])
def test_what_is_missing_has_no_spelling(value: Any) -> None:
    assert normalise_code(value) is None


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (1.5, "1.5"),
        (np.float32(1.1), "1.1"),
        (Decimal("1.50"), "1.5"),
        (-0.0, "0"),
        ("-0.0", "0"),
        (True, "True"),
        (2**53 - 1.0, "9007199254740991"),
        (2**62 + 1, "4611686018427387905"),
        (Decimal(2**62 + 1), "4611686018427387905"),
        ("4611686018427387905", "4611686018427387905"),
        ("1.2345678E7", "12345678"),
        ("-1.0E7", "-10000000"),
        ("1.2345678e7", "12345678"),
        ("2e16", "2e16"),  # as short hashes are
        ("1.23456789E7", "1.23456789E7"),
        ("1.5E999999999", "1.5E999999999"),
        ("12E3", "12E3"),
    ],
)
def test_numbers_keep_all_their_digits(value: Any, code: str) -> None:
    assert normalise_code(value) == code


@pytest.mark.parametrize(
    "value", [2.0**53, -(2.0**53), 2e16, np.float32(2**24), "2e+16", "1.23457E+11", "9007199254740993.0", "2.0E16"]
)
def test_a_number_that_may_have_lost_digits_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="may have lost digits; store such ids as text or as 64-bit integers"):
        normalise_code(value)


@pytest.mark.parametrize("value", [float("inf"), Decimal("NaN"), [1], {"a": 1}, b"7", 1j])
def test_what_is_no_text_and_no_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="is neither text nor a finite number"):
        normalise_code(value)


@given(st.integers(-(2**53) + 1, 2**53 - 1))
def test_integers_floats_and_their_texts_are_alike(number: int) -> None:
    spelt = {normalise_code(value) for value in (number, float(number), str(number), f"{number}.0", Decimal(number))}
    assert spelt == {str(number)}


@given(st.one_of(st.text(), st.integers(), st.floats(-(2**52), 2**52)))
def test_a_spelling_is_its_own_spelling(value: Any) -> None:
    try:
        code = normalise_code(value)
    except ValueError:
        return
    assert normalise_code(code) == code
