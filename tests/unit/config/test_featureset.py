"""The name of a feature service: one meaning, one name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from closedloop.config.dataset import DatasetConfig
from closedloop.config.featureset import list_features
from closedloop.config.params import merge_values, parse_params
from closedloop.errors import ConfigError

PARAMS = parse_params(
    {"dataset": "orders", "as_of": "2024-05-31", "seed": 7, "model": {"type": "logistic_regression"}}, "params.yaml"
)
EVENTS: dict[str, Any] = {
    "name": "orders",
    "model_name": "orders_churn",
    "description": "Order lines.",
    "kind": "events",
    "source": {"type": "csv", "path": "orders.csv"},
    "customers_source": {"type": "csv", "path": "customers.csv"},
    "timezone": "UTC",
    "columns": {
        "entity_id": "customer",
        "time": "ordered_at",
        "amount": "price",
        "quantity": "pieces",
        "event_type": "action",
        "since": "signed_up",
        "numeric": ["age"],
    },
    "event_types": {"purchase": {"has_amount": True}},
    "cleaning": {"cancellation": {"column": "invoice", "prefix": "C"}, "require_positive": ["price", "pieces"]},
    "label": {"event_type": "purchase", "horizon_days": 30, "active_days": 90, "snapshot_every_days": 30},
    "expectations": [],
}
TABLE: dict[str, Any] = {
    "name": "lines",
    "model_name": "lines_churn",
    "description": "Customers.",
    "kind": "table",
    "source": {"type": "csv", "path": "customers.csv"},
    "columns": {
        "entity_id": "customer",
        "numeric": ["age"],
        "label": {"column": "left", "churned": "Yes", "stayed": "No"},
    },
    "expectations": [],
}
TIMED = merge_values(TABLE, {"timezone": "UTC", "columns": {"time": "seen_at"}})


def name_service(values: dict[str, Any], change: dict[str, Any] | None = None) -> str:
    return list_features(PARAMS, DatasetConfig.model_validate(merge_values(values, change or {}))).service


def reverse(value: Any) -> Any:
    return {key: reverse(value[key]) for key in reversed(value)} if isinstance(value, dict) else value


@pytest.mark.parametrize(
    ("values", "change"),
    [
        *((EVENTS, {"columns": {role: "another"}}) for role in ("time", "amount", "quantity", "event_type", "since")),
        *((EVENTS, {"columns": {role: None}}) for role in ("quantity", "event_type", "since")),
        (EVENTS, {"timezone": "Europe/London"}),
        (EVENTS, {"timezone": None}),
        (EVENTS, {"cleaning": {"drop_missing_id": False}}),
        (EVENTS, {"cleaning": {"drop_duplicates": True}}),
        (EVENTS, {"cleaning": {"cancellation": None}}),
        (EVENTS, {"cleaning": {"cancellation": {"column": "another"}}}),
        (EVENTS, {"cleaning": {"cancellation": {"prefix": "D"}}}),
        (EVENTS, {"cleaning": {"require_positive": ["price"]}}),
        (EVENTS, {"cleaning": {"require_value": ["price"]}}),
        (EVENTS, {"source": {"time_format": "%d.%m.%Y"}}),
        (TABLE, {"cleaning": {"drop_duplicates": True}}),
        (TABLE, {"columns": {"time": "seen_at"}}),
        (TIMED, {"columns": {"time": "another"}}),
        (TIMED, {"timezone": "Europe/London"}),
    ],
)
def test_what_changes_the_meaning_of_a_feature_changes_the_name(values, change):
    assert name_service(values, change) != name_service(values)
    assert name_service(values, change).startswith(f"{values['model_name']}_")


@pytest.mark.parametrize("values", [EVENTS, TABLE, TIMED])
def test_the_order_of_keys_is_no_meaning(values):
    assert name_service(reverse(values)) == name_service(values)


@pytest.mark.parametrize(
    ("values", "change"),
    [
        (EVENTS, {"description": "Another.", "source": {"path": "moved.csv"}, "gates": {"accuracy_min": 0.9}}),
        (EVENTS, {"cleaning": {"drop_missing_id": True, "require_positive": ["pieces", "price"]}}),
        (TABLE, {"cleaning": {}, "timezone": "Europe/London"}),  # it has no times
        (TABLE, {"columns": {"amount": "price"}}),  # nor events
    ],
)
def test_what_is_a_default_or_does_not_apply_changes_nothing(values, change):
    assert name_service(values, change) == name_service(values)


def test_reasons_sum_features_whose_names_fit_a_pattern():
    config = DatasetConfig.model_validate(merge_values(EVENTS, {"reasons": {"orders": ["purchase_*"]}}))
    found = list_features(PARAMS, config)
    assert found.reasons == {"orders": tuple(name for name in found.numeric if name.startswith("purchase_"))}
    assert len(found.reasons["orders"]) > 2
    assert found.service == name_service(EVENTS)  # the features mean what they meant


@pytest.mark.parametrize(
    ("reasons", "told"),
    [
        ({"orders": "purchase_cout_30d"}, "reasons.orders: 'purchase_cout_30d' is no feature; features are"),
        ({"a": "purchase_*", "b": "purchase_recency_days"}, "reasons.b: purchase_recency_days is in reasons.a already"),
        ({"age": "purchase_*"}, "reasons.age: is the name of a feature that is not in it"),
    ],
)
def test_reasons_that_cannot_be_are_refused(reasons, told):
    config = DatasetConfig.model_validate(merge_values(EVENTS, {"reasons": reasons}))
    with pytest.raises(ConfigError, match=re.escape(f"configs/datasets/orders.yaml: {told}")):
        list_features(PARAMS, config)
