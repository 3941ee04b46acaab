"""Campaigns in the simulated shop: what the monitor says of them, and whether their reports tell the truth.

    python benchmarks/campaigns.py                20 shops of 12,000 customers, 10 campaigns in each
    python benchmarks/campaigns.py --seeds N      another number of shops
    python benchmarks/campaigns.py --json FILE    also write every figure

One model is trained on the first shop; each shop is simulated twice from its seed, without offers and with an offer to
every active customer, so that it is known of each what happens with and without one. A campaign then takes the fifth of
the customers with the highest scores, holds out a tenth of them by its own salt, and its treated customers have the
outcome with an offer. The monitor judges the month after: the campaign, the same month without a record of the actions,
the campaign without a hold-out, and a change by which every customer keeps as if there had been an offer, beside a
campaign that does nothing. Exit status 1 and the name of the first missed target.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from parts.drift_shop import TRAINED_AT, make_shop
from parts.targets import Target, finish, show, show_targets
from parts.worlds import DAY, split_rows, train_model

from closedloop.core.actions.arms import TREATED, choose_customers
from closedloop.core.actions.effect import measure_effect
from closedloop.core.actions.untreated import find_untreated
from closedloop.core.monitoring.evidence import measure_outcomes
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.core.monitoring.verdict import decide
from closedloop.core.training.estimators import score
from closedloop.processes import exit_on_signals
from closedloop.simulator.shop import Offers, SimulatorSpec, simulate

ACCEPT = 0.35  # of those who get an offer; about 30 % of the leavers are kept, since some were to come back anyway
CAPACITY_SHARE, HOLDOUT, SALTS = 0.18, 0.1, 10
MODES = ("campaign", "no record", "no hold-out", "change")


def prepare(customers: int, seeds: list[int]) -> list[pd.DataFrame]:
    """Each shop's customers at the snapshot: ``score``, and whether they leave without (``base``) and with an offer."""
    first = make_shop(seeds[0], customers, {}, TRAINED_AT, TRAINED_AT - 270 * DAY)
    fitted, baseline = train_model(first, split_rows(first, TRAINED_AT))
    return [find_outcomes(seed, customers, fitted).assign(threshold=baseline.threshold) for seed in seeds]


def find_outcomes(seed: int, customers: int, fitted: Any) -> pd.DataFrame:
    world = make_shop(seed, customers, {}, TRAINED_AT, TRAINED_AT)
    rows = world.rows[TRAINED_AT]
    people = rows[["customer_id"]].assign(score=score(fitted.pipeline, rows), base=rows["churned"].astype(bool))
    given = world.params.simulator
    changes = {name: getattr(given, name) for name in ("covariate_at", "harmless_at", "concept_at")}
    spec = SimulatorSpec(seed=seed, customers=customers, **changes)
    offers = Offers(TRAINED_AT.date(), frozenset(people["customer_id"]), ACCEPT)
    until = (TRAINED_AT + 30 * DAY).date()
    events = simulate(spec, start=given.start_date, end=until, offers=[offers]).events
    bought = events.loc[(events["event_type"] == "purchase") & (events["time"] >= TRAINED_AT), "customer_id"]
    return people.assign(offered=~people["customer_id"].isin(set(bought)))


def choose(people: pd.DataFrame, salt: str, holdout: float) -> pd.DataFrame:
    candidates = people.rename(columns={"score": "probability"}).assign(expected_value=np.nan, kept_value=np.nan)
    capacity = round(CAPACITY_SHARE * len(people))
    return choose_customers(candidates, capacity=capacity, holdout=holdout, salt=salt)


def report(people: pd.DataFrame, salt: str, *, works: bool) -> dict[str, Any]:
    """What the report of a campaign says, and the truth: what offers do to all whom it chose."""
    chosen = choose(people, salt, HOLDOUT)
    is_treated = chosen["arm"] == TREATED
    offered = chosen["offered"] if works else chosen["base"]
    found = measure_effect(chosen.assign(outcome=np.where(is_treated, offered, chosen["base"]).astype(float)))
    truth = float(chosen["base"].mean() - offered.mean())
    assert found.effect is not None
    covers = found.effect.low <= truth <= found.effect.high
    return {"effect": found.effect._asdict(), "truth": truth, "covers": covers, "verdict": found.verdict}


def judge(people: pd.DataFrame, mode: str, seed: int) -> dict[str, Any]:
    """The monitor's verdict on the month after a campaign."""
    chosen = choose(people, f"{seed}", 0.0 if mode == "no hold-out" else HOLDOUT).set_index("customer_id")
    arms = people["customer_id"].map(chosen["arm"])
    kept = people["offered"] if mode == "change" else np.where(arms == TREATED, people["offered"], people["base"])
    at = pd.Timestamp(TRAINED_AT)
    rows = people.assign(outcome=np.asarray(kept).astype(int), at=at, reported_by="label rule")
    held_out = int((chosen["arm"] != TREATED).sum())
    actions = chosen.reset_index()[["customer_id", "arm"]].assign(acted_at=at, horizon_days=30)
    actions["weight"] = len(chosen) / held_out if held_out else np.nan
    untreated = find_untreated(rows, actions.head(0) if mode == "no record" else actions, time="at")
    policy, baseline = MonitoringPolicy(), Baseline(float(people["threshold"].iloc[0]))
    evidence = measure_outcomes(baseline, untreated.take(rows), policy) | {"actions": untreated.tell()}
    at_check = TRAINED_AT + 31 * DAY
    found = decide(evidence, [], [], policy, as_of=at_check, since=TRAINED_AT, model_as_of=TRAINED_AT)
    gain = evidence.get("realised", {}).get("gain", {})
    saved = 1 - float(np.asarray(kept).sum() / people["base"].sum())
    return {"seed": seed, "mode": mode, "verdict": found.verdict, "gain": gain, "saved_of_all_leavers": saved}


class Baseline:
    """What `measure_outcomes` reads of a model's baseline."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    seeds = list(range(1, options.seeds + 1))
    shops = prepare(options.customers, seeds)
    checks = [judge(people, mode, seed) for seed, people in zip(seeds, shops, strict=True) for mode in MODES]
    salts = [f"{seed} {number}" for seed in seeds for number in range(SALTS)]
    reports: dict[bool, list[dict[str, Any]]] = {}
    for works in (True, False):
        reports[works] = [report(shops[n // SALTS], salt, works=works) for n, salt in enumerate(salts)]
    verdicts = {mode: [one["verdict"] for one in checks if one["mode"] == mode] for mode in MODES}
    columns = ("none", "alert", "retrain", "cannot tell")
    table = {mode: [str(found.count(name)) for name in columns] for mode, found in verdicts.items()}
    show(f"The monitor's verdict of the month after, {len(seeds)} shops", ["what went on", *columns], table)
    covered = {works: float(np.mean([one["covers"] for one in found])) for works, found in reports.items()}
    said = {works: [one["verdict"] for one in found] for works, found in reports.items()}
    truths = [one["truth"] for one in reports[True]]
    kept = [float(1 - (shop["offered"] & shop["base"]).sum() / shop["base"].sum()) for shop in shops]
    print(f"offers keep {np.mean(kept):.1%} of the leavers; effect on the chosen {np.mean(truths):.1%} of them")
    for works, found in said.items():
        print(
            f"{'with' if works else 'without'} effect: { ({name: found.count(name) for name in sorted(set(found))}) }"
        )
    count, null = len(seeds), len(salts)
    targets = [
        Target("a campaign that saves 30 %: shops that retrain", verdicts["campaign"].count("retrain"), "<=", 0),
        Target("an equal change: shops that retrain at once", verdicts["change"].count("retrain") / count, ">=", 1.0),
        Target(
            "without a hold-out: shops that cannot tell", verdicts["no hold-out"].count("cannot tell") / count, ">=", 1
        ),
        Target("intervals that cover the true effect", covered[True], ">=", 0.9),
        Target("campaigns without effect: undecided", said[False].count("undecided") / null, ">=", 0.9),
    ]
    figures = {"checks": checks, "reports": {str(works): found for works, found in reports.items()}, "kept": kept}
    return figures, targets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--customers", type=int, default=12_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures, targets = measure(options)
    show_targets(targets)
    return finish(options, ["seeds", "customers"], figures, targets)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
