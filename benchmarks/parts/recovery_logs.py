"""Logs on which a loop recovers, or has no reason to: the simulated shop, and rows drawn from a known concept."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from closedloop.loop.backtest.history import History, space_snapshots
from parts.drift_shop import CHANGES, NEVER
from parts.worlds import DAY, list_every, make_world

CONCEPT_AT = dt.datetime(2024, 6, 1, tzinfo=dt.UTC)
FIRST_MODEL_DAYS, FOLLOWED_DAYS, UNCHANGED_DAYS = 90, 214, 243
COLUMNS = tuple(f"x{number}" for number in range(5))
SLOPES = np.array([0.9, -0.7, 0.5, -0.3, 0.2])


@dataclass(frozen=True)
class Log(History):
    """A history with the moment of its change; None: nothing changes."""

    change: dt.datetime | None = None


def make_shop_log(seed: int, customers: int, every: int, *, changed: bool) -> Log:
    """The shop with the change of concept alone on 1 June 2024, or without any change; it grows in both."""
    from closedloop.config.featureset import list_features

    first = CONCEPT_AT - FIRST_MODEL_DAYS * DAY
    last = first + ((FIRST_MODEL_DAYS + FOLLOWED_DAYS if changed else UNCHANGED_DAYS) // every) * every * DAY
    began = first - ((first - dt.datetime(2023, 4, 1, tzinfo=dt.UTC)).days // every) * every * DAY
    dates = dict.fromkeys(CHANGES, NEVER) | ({"concept_at": f"{CONCEPT_AT:%Y-%m-%d}"} if changed else {})
    simulator = {"customers": customers, **dates}
    overrides = {"as_of": f"{last + 31 * DAY:%Y-%m-%d}", "seed": seed, "simulator": simulator}
    overrides |= {"evaluation": {"bootstrap_samples": 400}}
    world = make_world("shop", overrides, list_every(began, last, every))
    features = list_features(world.params, world.dataset)
    dataset = space_snapshots(world.dataset, every)
    ticks, change = list_every(first, last, every), CONCEPT_AT if changed else None
    return Log(world.params, dataset, features, world.rows, ticks, every, change)


def make_drawn_log(kind: str, seed: int, every: int, *, customers: int = 1_000) -> Log:
    """The same customers at every snapshot, their churn drawn anew: each month a share of them is replaced.

    ``base_rate``: from the change on they churn more often, and nothing else changes. ``birth``: the test snapshot of
    the first model is the first one with another rate, so that the model is wrong from its birth. ``nothing``: nothing
    changes.
    """
    from closedloop.config.dataset import load_dataset
    from closedloop.config.featureset import FeatureSet
    from closedloop.config.params import parse_params
    from closedloop.config.yaml import read_yaml

    values = read_yaml(Path("params.yaml")) | {"seed": seed}
    values["evaluation"] = {**values["evaluation"], "bootstrap_samples": 400}
    params = parse_params(values, "benchmark")
    shop = load_dataset("shop", Path("configs/datasets"))
    # the shop's limits are for the shop: a few hundred rows of this concept prove no AUC of .75
    gates = shop.gates.model_copy(update=dict.fromkeys(("accuracy_min", "f1_weighted_min", "roc_auc_min"), 0.0))
    gates = gates.model_copy(update={"calibration_error_max": 1.0, "rate_difference_max": 1.0})
    dataset = space_snapshots(shop.model_copy(update={"gates": gates}), every)
    first = CONCEPT_AT - 12 * every * DAY if every < 30 else CONCEPT_AT - 90 * DAY
    snapshots = list_every(first - 364 // every * every * DAY, first + 364 // every * every * DAY, every)
    tested = first - -(-dataset.label.horizon_days // every) * every * DAY  # the newest that has closed by then
    moved_at = {"base_rate": CONCEPT_AT, "birth": tested, "nothing": None}[kind]
    generator = np.random.default_rng(seed)
    ids, values_of = np.arange(customers), generator.normal(size=(customers, len(COLUMNS)))
    label_event = f"{dataset.label.event_type}_recency_days"
    rows = {}
    for at in snapshots:
        replaced = generator.random(customers) < 0.2 * every / 30
        ids = np.where(replaced, ids + customers, ids)
        values_of = np.where(replaced[:, None], generator.normal(size=values_of.shape), values_of)
        intercept = 0.3 if moved_at is not None and at >= moved_at else -0.9
        chance = 1 / (1 + np.exp(-(intercept + values_of @ SLOPES)))
        some = pd.DataFrame(values_of, columns=list(COLUMNS))
        some[label_event] = np.abs(values_of[:, 0]) * 10
        some.insert(0, "customer_id", [f"C{one}" for one in ids])
        some.insert(1, "event_timestamp", at)
        rows[at] = some.assign(churned=generator.random(customers) < chance)
    features = FeatureSet((*COLUMNS, label_event), (), "drawn")
    change = {"base_rate": CONCEPT_AT, "birth": first, "nothing": None}[kind]
    return Log(params, dataset, features, rows, list_every(first, snapshots[-1], every), every, change)
