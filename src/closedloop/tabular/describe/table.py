"""The config of a table: one row a customer, with a column that says who left."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from closedloop.config.dataset import COLUMN_PATTERN, RESERVED, ROW_NUMBER
from closedloop.core.evaluation.column_leaks import rank_columns, rank_pairs
from closedloop.core.evaluation.limits import GateLimits
from closedloop.core.evaluation.metrics import CALIBRATION_BINS
from closedloop.errors import DataError, count_noun
from closedloop.rules import find_code
from closedloop.tabular.describe.drafts import BETWEEN, Draft, day_after

SEED = 7  # of the rows that the search for leaks draws
ROWS_FEW, CLASS_ROWS_FEW, VALUES_LISTED = 500, 50, 10
LEAK = "a leak, unless it is known on the day of a prediction"


def fill_table(draft: Draft) -> None:
    """Add columns, cleaning, expectations, gates and parameters.

    Raises
    ------
    DataError
        If no column is left that could be a feature.
    """
    roles, content = draft.roles, draft.content
    labels = draft.spell(str(roles.label)).dropna()
    churned = labels.isin({find_code(text) for text in roles.churned})
    _leave_out_leaks(draft, churned)
    if not roles.numeric and not roles.categorical:
        raise DataError("no column is left that could be a feature; what was found is said above")
    names = _choose_names([*roles.numeric, *roles.categorical, roles.sensitive], set(draft.profiles))
    if roles.time is not None:
        content["timezone"] = "UTC"
        draft.comments["timezone"] = "of times that name no zone: is it this one?"
    content["columns"] = _list_columns(draft, names)
    draft.comments["columns"] = "Guesses: check each role. Is every feature known on the day of a prediction?"
    draft.add_cleaning([name for name in (roles.label, roles.time) if name is not None])
    rate = float(churned.mean())
    _note_rows(draft, churned)
    _expect_rows(draft, names, rate)
    _set_limits(draft, rate)
    params: dict[str, Any] = {"model": {"type": "logistic_regression"}}
    if roles.time is not None:
        params["as_of"] = day_after(draft.read_times())
    elif len(churned) < ROWS_FEW:
        params["split"] = {"test_fraction": 0.4}
    content["params"] = params


def _list_columns(draft: Draft, names: Mapping[str, str]) -> dict[str, Any]:
    roles = draft.roles
    columns: dict[str, Any] = {"rename": {old: new for old, new in names.items() if old != new}}
    columns |= {"entity_id": roles.entity_id or ROW_NUMBER, "time": roles.time}
    columns["numeric"] = [names[one] for one in roles.numeric]
    columns["categorical"] = [names[one] for one in roles.categorical]
    columns["sensitive"] = names[roles.sensitive] if roles.sensitive else None
    columns["label"] = {"column": roles.label, "churned": list(roles.churned), "stayed": list(roles.stayed)}
    return {key: value for key, value in columns.items() if value}


def _leave_out_leaks(draft: Draft, churned: pd.Series) -> None:
    """Take out columns that rank the label alone, as the gate `single_column` would; name pairs that do."""
    roles, limits, labels = draft.roles, GateLimits(), churned.to_numpy()
    typed = pd.DataFrame(
        {name: draft.read_numbers(name) for name in roles.numeric}
        | {name: draft.spell(name) for name in roles.categorical},
        index=draft.frame.index,
    ).loc[churned.index]
    for name, auc in rank_columns(typed, roles.numeric, roles.categorical, labels, seed=SEED).items():
        if auc >= limits.single_column_auc_max:
            (roles.numeric if name in roles.numeric else roles.categorical).remove(name)
            allowed = "then add it, and name it in gates.single_column_allowed"
            roles.left_out[name] = f"alone it ranks the label with ROC AUC {auc:.3f}: {LEAK} ({allowed})"
    for (one, other), auc in rank_pairs(typed, roles.numeric, roles.categorical, labels, seed=SEED).items():
        if auc >= limits.column_pair_auc_max:
            draft.note(f"{one!r} and {other!r} together rank the label with ROC AUC {auc:.3f}: {LEAK}")
    for name in [name for name in roles.left_out if name in draft.frame]:
        if 0 < draft.profiles[name].missing < len(draft.frame):
            blank = pd.DataFrame({name: draft.frame[name].isna().loc[churned.index].astype(str)})
            auc = rank_columns(blank, [], [name], labels, seed=SEED).get(name, 0.5)
            if auc >= limits.single_column_auc_max:
                roles.left_out[name] += f"; whether it is blank tells the label (ROC AUC {auc:.3f})"


def _note_rows(draft: Draft, churned: pd.Series) -> None:
    roles, smaller = draft.roles, int(min(churned.sum(), (~churned).sum()))
    sides = f"{'/'.join(roles.churned)} means churned ({churned.mean():.3f} of all), {'/'.join(roles.stayed)} stayed"
    draft.note(f"the label is {roles.label!r}: {sides}")
    if roles.entity_id is not None:
        draft.note(f"the customer's id is {roles.entity_id!r}")
    for name in (*roles.numeric, *roles.categorical):
        if missing := draft.profiles[name].missing:
            draft.note(f"{name!r}: {missing:,} of {count_noun(len(draft.frame), 'row')} blank; they stay missing")
    if len(churned) < ROWS_FEW or smaller < CLASS_ROWS_FEW:
        counts = f"{count_noun(len(churned), 'row')} with a label, {smaller} of the smaller class"
        draft.note(f"few rows ({counts}): the gates may refuse a fair model")
    keys = [name for name in (roles.entity_id, roles.time) if name is not None]
    if keys and (twice := int(draft.frame.dropna(subset=keys).drop_duplicates().duplicated(keys).sum())):
        rule = "the data gate will say no" if roles.time is None else "the newest counts online"
        draft.note(f"{' and '.join(map(repr, keys))}: rows that repeat one of another row: {twice:,}; {rule}")


def _expect_rows(draft: Draft, names: Mapping[str, str], rate: float) -> None:
    roles, rows = draft.roles, len(draft.frame)
    draft.expect("customers", "table_row_count_to_be_between", "critical", min_value=rows // 2, max_value=2 * rows)
    if roles.time is None:
        draft.expect("customers", "column_values_to_be_unique", "critical", column="customer_id")
    for name in roles.numeric:
        numbers = draft.read_numbers(name)
        bounds: dict[str, Any] = {"min_value": float(numbers.min()), "max_value": float(numbers.max())}
        draft.expect("customers", BETWEEN, column=names[name], **bounds)
    for name in roles.categorical:
        if draft.profiles[name].different <= VALUES_LISTED:
            values = list(draft.profiles[name].values)
            draft.expect("customers", "column_values_to_be_in_set", column=names[name], value_set=values)
    for name in (*roles.numeric, *roles.categorical):
        if not draft.profiles[name].missing:
            draft.expect("customers", "column_values_to_not_be_null", column=names[name])
    share: dict[str, Any] = {"min_value": round(rate / 2, 3), "max_value": round(min(1.0, rate * 1.5), 3)}
    draft.expect("customers", "column_mean_to_be_between", column="churned", **share)


def _set_limits(draft: Draft, rate: float) -> None:
    accuracy = max(0.5, int((max(rate, 1 - rate) - 0.05) * 100) / 100)
    lower = max(0.5, round(accuracy - 0.1, 2))
    gates = {"accuracy_min": accuracy, "f1_weighted_min": lower, "roc_auc_min": 0.6, "roc_auc_max": 0.98}
    error = round(math.hypot(0.1, estimate_chance_error(len(draft.frame) // 5, rate)), 2)
    draft.content["gates"] = gates | {"group_accuracy_min": lower, "calibration_error_max": error}
    draft.comments["gates"] = "Starting points: after the first run set them by what is honest for these data."


def estimate_chance_error(rows: int, rate: float) -> float:
    """The calibration error that scores which are true reach by chance, at its 95th percentile over sets of test rows.

    The error is the mean of ten gaps between the churn rate of a tenth and its mean score. Each gap has the deviation
    of a rate of so many rows; the percentile lies some 1.4 times above the expectation.
    """
    gap = math.sqrt(2 / math.pi * rate * (1 - rate) * CALIBRATION_BINS / max(rows, 1))
    return 1.4 * gap


def _choose_names(features: list[str | None], taken: set[str]) -> dict[str, str]:
    """A name for each feature that keeps the rules of names; the same where it does."""
    names: dict[str, str] = {}
    for old in (one for one in features if one is not None):
        new = old
        if COLUMN_PATTERN.fullmatch(old) is None or old.casefold() in RESERVED:
            new = " ".join(re.sub(r"[^\w \-./%&+()]+", " ", old).split())[:80] or "column"
            if COLUMN_PATTERN.fullmatch(new) is None or new.casefold() in RESERVED:
                new = f"column {new}".strip()
        others = {name.casefold() for name in (*names.values(), *(taken if new != old else ()))}
        plain, number = new, 2
        while new.casefold() in others:
            new, number = f"{plain[:90]}_{number}", number + 1
        names[old] = new
    return names
