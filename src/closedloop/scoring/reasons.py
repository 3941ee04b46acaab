"""Reasons of a batch's rows, as columns: the strongest first, four columns each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from closedloop.scoring.columns import CheckedRows
from closedloop.serving.models import LoadedModel

# of reason k: its name, its feature that contributes most, that feature's value, and the reason's contribution
PARTS = {"reason_{}": str, "reason_{}_feature": str, "reason_{}_value": str, "reason_{}_contribution": float}
RAW_COLUMN, BASE_COLUMN = "raw_score", "base"


def describe_reasons(top: int) -> dict[str, type]:
    """The columns of ``top`` reasons, and what they hold; none for 0."""
    if not top:
        return {}
    return {RAW_COLUMN: float, BASE_COLUMN: float} | {
        name.format(number): kind for number in range(1, top + 1) for name, kind in PARTS.items()
    }


def list_reasons(model: LoadedModel, checked: CheckedRows, top: int) -> list[pa.Array]:
    """The columns that `describe_reasons` names, of rows that hold; null where a model has fewer reasons."""
    explainer = model.explainer
    contributions = explainer.weigh(checked.matrix)
    ranked = explainer.rank(contributions, top)
    rows = len(contributions)
    values = _list_values(checked.columns, ranked.feature)
    names, features = pa.array(explainer.names, pa.string()), pa.array(model.contract.feature_names, pa.string())
    columns = [pa.array(explainer.base + contributions.sum(axis=1)), pa.array(np.full(rows, explainer.base))]
    for place in range(top):
        if place >= ranked.reason.shape[1]:
            columns += [pa.nulls(rows, pa.string())] * 3 + [pa.nulls(rows, pa.float64())]
            continue
        columns.append(names.take(pa.array(ranked.reason[:, place])))
        columns.append(features.take(pa.array(ranked.feature[:, place])))
        columns.append(values[place])
        columns.append(pa.array(ranked.contribution[:, place]))
    return columns


def _list_values(columns: Sequence[pa.Array], features: np.ndarray) -> list[pa.Array]:
    """For each place among the reasons the values of its features as text; null where one is missing."""
    found = np.full(features.size, None, dtype=object)
    chosen = features.T.reshape(-1)
    rows = np.tile(np.arange(len(features)), features.shape[1])
    for feature in np.unique(chosen):
        here = np.flatnonzero(chosen == feature)
        values = columns[feature].take(pa.array(rows[here]))
        if pa.types.is_floating(values.type):
            values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
        found[here] = pc.cast(values, pa.string()).to_numpy(zero_copy_only=False)
    return [pa.array(part, pa.string()) for part in found.reshape(features.shape[1], -1)]
