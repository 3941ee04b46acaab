"""What a kept customer is worth: three sources, and clear words for what is none of them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from closedloop.config.invalid import describe_invalid
from closedloop.core.evaluation.value import CustomerValue, KeptCustomer

OFFER = {"offer_cost": 5, "save_rate": 0.2}


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (120, KeptCustomer(number=120)),
        ({"column": "income", "share": 0.01}, KeptCustomer(column="income", share=0.01)),
        ({"amount_of_days": 90}, KeptCustomer(amount_of_days=90, share=1.0)),
    ],
)
def test_three_sources_of_a_value(kept: Any, expected: KeptCustomer) -> None:
    value = CustomerValue.model_validate({"kept": kept, **OFFER})
    assert value.kept == expected
    assert value.capacity is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"kept": "income"},
            "kept: is a number, {column: NAME} or {amount_of_days: DAYS}, one of these, found 'in",
        ),
        ({"kept": {}}, "kept: is a number, {column: NAME} or {amount_of_days: DAYS}, one of these"),
        ({"kept": {"column": "income", "amount_of_days": 30}}, "one of these"),
        ({"kept": {"number": 100, "share": 0.3}}, "the last two may have a share"),
        ({"kept": {"colum": "income"}}, "kept.colum: unknown key"),
        ({"kept": 0}, "kept.number: Input should be greater than 0"),
        ({"kept": True}, "kept: is a number"),
        ({"offer_cost": -1}, "offer_cost: Input should be greater than or equal to 0"),
        ({"save_rate": 1.5}, "save_rate: Input should be less than or equal to 1"),
        ({"save_rate": 0}, "save_rate: Input should be greater than 0"),
        ({"capacity": 0}, "capacity: Input should be greater than or equal to 1"),
    ],
)
def test_what_is_no_value_is_refused_in_words(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as refused:
        CustomerValue.model_validate({"kept": 100, **OFFER, **change})
    assert told in describe_invalid(refused.value)


def test_every_key_says_what_it_is() -> None:
    fields = [*CustomerValue.model_fields.values(), *KeptCustomer.model_fields.values()]
    assert all(field.description for field in fields)
