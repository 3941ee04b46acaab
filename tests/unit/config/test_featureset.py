"""The name of a feature service: one meaning, one name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from closedloop.config.dataset import DatasetConfig
from closedloop.config.featureset import list_features, list_value_columns
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


def read_value(values: dict[str, Any], kept: Any, params: dict[str, Any] | None = None) -> tuple[str, ...]:
    value = {"kept": kept, "offer_cost": 5, "save_rate": 0.2}
    changed = parse_params(merge_values(PARAMS.model_dump(), params or {}), "params.yaml")
    return list_value_columns(changed, DatasetConfig.model_validate(merge_values(values, {"value": value})))


def test_a_value_is_read_from_features_that_there_are():
    refund = merge_values(EVENTS, {"event_types": {"refund": {"has_amount": True}, "visit": {}}})
    for columns in (read_value(EVENTS, {"column": "age"}), read_value(refund, {"amount_of_days": 30})):
        assert set(columns) <= set(list_features(PARAMS, DatasetConfig.model_validate(refund)).numeric)
    assert read_value(refund, {"amount_of_days": 30}) == ("purchase_sum_30d", "refund_sum_30d")
    assert read_value(EVENTS, 100) == ()
    assert list_value_columns(PARAMS, DatasetConfig.model_validate(EVENTS)) == ()


@pytest.mark.parametrize(
    ("days", "params", "told"),
    [
        (60, {}, "60 is no window; features.window_days has 7, 30, 90"),
        (30, {"features": {"aggregations": ["count"]}}, "needs sums over windows; add sum to features.aggregations"),
    ],
)
def test_an_amount_without_a_window_is_refused(days, params, told):
    with pytest.raises(ConfigError, match=re.escape(f"orders.yaml: value.kept.amount_of_days: {told}")):
        read_value(EVENTS, {"amount_of_days": days}, params)


def test_a_threshold_by_profit_needs_a_value():
    asked = parse_params(merge_values(PARAMS.model_dump(), {"model": {"threshold": "profit"}}), "params.yaml")
    with pytest.raises(ConfigError, match="threshold profit needs the section value in"):
        list_features(asked, DatasetConfig.model_validate(EVENTS))


@pytest.mark.parametrize(
    ("values", "kept", "told"),
    [
        (EVENTS, {"column": "income"}, "value.kept.column 'income' is no numeric attribute; columns.numeric has age"),
        (TABLE, {"amount_of_days": 30}, "value.kept.amount_of_days needs an event type with has_amount: true"),
    ],
)
def test_a_value_from_a_column_that_there_is_not_is_refused(values, kept, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        read_value(values, kept)
