"""The config of a log of events: what counts as gone is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from closedloop.config.dataset import COLUMN_PATTERN
from closedloop.core.features.roles import choose_horizon
from closedloop.errors import DataError, count_noun
from closedloop.tabular.describe.drafts import BETWEEN, Draft, day_after

HALF = 0.5


def fill_log(draft: Draft) -> None:
    """Add columns, cleaning, label rule, expectations, gates and parameters.

    Raises
    ------
    DataError
        If the log covers too few days, or its event types cannot be names of features.
    """
    roles, content = draft.roles, draft.content
    times, ids = draft.read_times(), draft.spell(str(roles.entity_id))
    kinds = pd.Series(roles.label, index=ids.index) if roles.event_type is None else draft.spell(roles.event_type)
    amounts = draft.read_numbers(roles.amount) if roles.amount else pd.Series(np.nan, index=ids.index)
    horizon = choose_horizon(times[kinds == roles.label], ids)
    content["timezone"] = "UTC"
    columns = {key: getattr(roles, key) for key in ("entity_id", "time", "amount", "quantity", "event_type")}
    content["columns"] = {key: value for key, value in columns.items() if value}
    known = {name: amounts[kinds == name].notna().mean() > HALF for name in kinds.dropna().unique()}
    named = [name for name in sorted(known) if COLUMN_PATTERN.fullmatch(name)]
    if roles.label not in named:
        raise DataError(f"{roles.event_type!r}: {roles.label!r} cannot be a part of a feature's name: rename it")
    content["event_types"] = {name: {"has_amount": True} if known[name] else {} for name in named}
    draft.add_cleaning([str(roles.time)])
    rule: dict[str, Any] = {"event_type": roles.label, "horizon_days": horizon, "active_days": 2 * horizon}
    content["label"] = rule | {"snapshot_every_days": horizon, "warmup_days": 2 * horizon}
    _expect_events(draft, times, amounts)
    content["gates"] = {"accuracy_min": 0.55, "f1_weighted_min": 0.5, "roc_auc_min": 0.6, "roc_auc_max": 0.95}
    content["gates"] |= {"group_accuracy_min": 0.5, "calibration_error_max": 0.15}
    windows = sorted({max(1, horizon // 4), horizon, 2 * horizon})
    content["params"] = {
        "as_of": day_after(times),
        "features": {"window_days": windows, "recency_cap_days": 2 * horizon, "tenure_cap_days": 2 * horizon},
        "model": {"type": "hist_gradient_boosting", "params": {"max_iter": 60, "max_leaf_nodes": 8}},
    }
    _comment(draft, horizon)
    _note_events(draft, times, amounts)


def _comment(draft: Draft, horizon: int) -> None:
    days = count_noun(horizon, "day")
    draft.comments |= {
        "timezone": "of times that name no zone: is it this one?",
        "columns": "Guesses: check each role. What describes customers comes from a customers_source.",
        "event_types": "types that become features: take out what says nothing",
        "label": f"churned: no {draft.roles.label} in the {days} after a snapshot; most gaps are shorter",
        "gates": "Starting points: after the first run set them by what is honest for these data.",
        "params": "as_of: the midnight after the last event; take the one before it if the last day is not whole",
    }


def _note_events(draft: Draft, times: pd.Series, amounts: pd.Series) -> None:
    roles = draft.roles
    customers, rows = draft.frame[roles.entity_id].nunique(), len(draft.frame)
    span = f"{times.min():%Y-%m-%d} to {times.max():%Y-%m-%d}"
    draft.note(f"a log of events: {count_noun(rows, 'row')} of {count_noun(customers, 'customer')}, {span}")
    draft.note(f"the customer's id is {roles.entity_id!r}, the time {roles.time!r}")
    if negative := int((amounts <= 0).sum()):
        advice = "cleaning.require_positive or cleaning.cancellation would drop them"
        draft.note(f"{roles.amount!r}: rows with 0 or less: {negative:,}; {advice}")


def _expect_events(draft: Draft, times: pd.Series, amounts: pd.Series) -> None:
    days = times.dropna().dt.floor("D").drop_duplicates().sort_values()
    gap = int(max(1, days.diff().dt.days.max()))
    draft.expect("events", "column_values_to_not_be_null", "critical", column="customer_id")
    draft.expect("days", BETWEEN, column="gap_days", max_value=gap)
    draft.expect("freshness", BETWEEN, column="age_days", min_value=0, max_value=gap)
    if amounts.notna().any() and draft.roles.quantity is None:
        bounds: dict[str, Any] = {"min_value": float(amounts.min()), "max_value": float(amounts.max())}
        draft.expect("events", BETWEEN, column="amount", **bounds)
