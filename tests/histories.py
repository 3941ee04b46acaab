"""Histories of a known concept for the offline loop: the same customers at each snapshot, outcomes drawn anew."""

from __future__ import annotations

import dataclasses
import datetime as dt
from pathlib import Path

import numpy as np
import pandas as pd

from closedloop.config.dataset import load_dataset
from closedloop.config.featureset import FeatureSet
from closedloop.config.params import parse_params
from closedloop.config.yaml import read_yaml
from closedloop.loop.backtest.history import History

ROOT = Path(__file__).parents[1]
BEGAN = dt.datetime(2023, 1, 2, tzinfo=dt.UTC)
EVERY = dt.timedelta(days=30)
COLUMNS = ("x0", "x1", "purchase_recency_days")


def draw_history(
    *,
    changed_from: int | None = None,
    first_tick: int = 5,
    snapshots: int = 13,
    customers: int = 900,
    seed: int = 1,
    horizon_days: int = 30,
) -> History:
    """Monthly snapshots; from number ``changed_from`` on, the columns mean the opposite risk of churn."""
    values = read_yaml(ROOT / "params.yaml") | {"seed": seed, "as_of": f"{BEGAN + snapshots * EVERY:%Y-%m-%d}"}
    values["model"] = {**values["model"], "type": "logistic_regression"}
    values["evaluation"] = {"bootstrap_samples": 200, "level": 0.95}
    shop = load_dataset("shop", ROOT / "configs/datasets")
    open_gates = {"accuracy_min": 0.0, "f1_weighted_min": 0.0, "roc_auc_min": 0.5, "calibration_error_max": 1.0}
    rule = {"snapshot_every_days": EVERY.days, "horizon_days": horizon_days}
    dataset = shop.model_copy(
        update={
            "gates": shop.gates.model_copy(update=open_gates),
            "label": shop.label.model_copy(update=rule) if shop.label else None,
        }
    )
    draw, rows = np.random.default_rng(seed), {}
    ids = [f"C{number}" for number in range(customers)]
    for number in range(snapshots):
        at = BEGAN + number * EVERY
        x0, x1 = draw.normal(size=(2, customers))
        sign = -1 if changed_from is not None and number >= changed_from else 1
        chance = 1 / (1 + np.exp(0.8 - sign * (1.6 * x0 - 0.8 * x1)))
        rows[at] = pd.DataFrame(
            {
                "customer_id": ids,
                "event_timestamp": at,
                "x0": x0,
                "x1": x1,
                "purchase_recency_days": draw.uniform(0, 60, customers),
                "churned": (draw.random(customers) < chance).astype(object),
            }
        )
    params = parse_params(values, "a test")
    ticks = sorted(rows)[first_tick:]
    return History(params, dataset, FeatureSet(COLUMNS, (), "drawn"), rows, ticks, EVERY.days)


def hide_future(history: History, now: dt.datetime) -> History:
    """The same history with outcomes drawn by lot where they are not known at ``now``, and no row from after it."""
    draw, rows = np.random.default_rng(0), {}
    for at, some in history.rows.items():
        if at <= now:
            known = at + history.horizon <= now
            rows[at] = some if known else some.assign(churned=(draw.random(len(some)) < 0.5).astype(object))
    return dataclasses.replace(history, rows=rows, ticks=[at for at in history.ticks if at <= now])
