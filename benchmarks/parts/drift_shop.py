"""A simulated shop with and without a change of regime, and what the monitor and other rules say of it."""

from __future__ import annotations

import argparse
import datetime as dt
from functools import partial
from typing import Any

import numpy as np

from closedloop.core.monitoring.drift import compare
from closedloop.processes import open_pool
from parts.drift_rules import find_threshold, measure_psi, run_evidently
from parts.targets import Target, show
from parts.worlds import DAY, Step, World, list_every, make_world, replay, split_rows, train_model

ASKED = 0.01
NEVER = "2100-01-01"
CHANGES = {"covariate_at": "2024-02-01", "harmless_at": "2024-04-01", "concept_at": "2024-06-01"}
TRAINED_AT = dt.datetime(2024, 1, 27, tzinfo=dt.UTC)
LAST_CHECK = dt.datetime(2024, 9, 23, tzinfo=dt.UTC)
CHECKS_ALLOWED = 2
OURS, PSI, RESAMPLED = "calibrated alarms (closedloop)", "PSI above 0.2", "resampled from the reference"
HALF, ANY = "Evidently preset, half of the columns", "Evidently preset, any column"


def make_shop(seed: int, customers: int, changes: dict[str, str], last: dt.datetime, first: dt.datetime) -> World:
    simulator = {"customers": customers, **dict.fromkeys(CHANGES, NEVER), **changes}
    end = last + 31 * DAY
    return make_world(
        "shop", {"as_of": f"{end:%Y-%m-%d}", "seed": seed, "simulator": simulator}, list_every(first, last, 30)
    )


def judge_seed(seed: int, *, customers: int, kinds: tuple[str, ...], evidently_seeds: int) -> list[dict[str, Any]]:
    """The monitor's verdicts of the months after one training, in a world of each kind, beside other rules'."""
    found: list[dict[str, Any]] = []
    model: Any = None
    for kind in kinds:
        changes = {name: day for name, day in CHANGES.items() if name == f"{kind}_at"}
        world = make_shop(seed, customers, changes, LAST_CHECK, TRAINED_AT - 270 * DAY)
        # what lies before a change is the same in each world: one model serves them all
        model = model or train_model(world, split_rows(world, TRAINED_AT))
        checks = list_every(TRAINED_AT, LAST_CHECK, 30)
        steps = replay(world, *model, checks, model_as_of=TRAINED_AT)
        at = [dt.datetime.fromisoformat(one["at"]).replace(tzinfo=dt.UTC) for one in world.truth]
        full = next(k for k in range(1, len(checks)) if not at or checks[k - 1] >= at[0])
        asked = range(0, len(steps), 2) if kind == "none" else range(full, min(full + CHECKS_ALLOWED, len(steps)))
        rng = np.random.default_rng(seed)
        for k, step in enumerate(steps):
            row = {"seed": seed, "kind": kind, "check": k, "at": f"{step.at:%Y-%m-%d}", "full_window": full}
            row |= {
                "changed": bool(at) and step.at >= at[0],
                "rows": len(step.window),
                "verdict": step.decision.verdict,
            }
            row |= {"reasons": list(step.decision.reasons), "alarms": {}}
            if k in asked:
                row["alarms"] = ask_rules(model[1], step, rng, evidently=seed <= evidently_seeds)
            found.append(row)
    return found


def ask_rules(baseline: Any, step: Step, rng: np.random.Generator, *, evidently: bool) -> dict[str, bool]:
    codes = {
        name: found.encode(baseline.frame[name]) for name, found in baseline.sketches.items() if name in baseline.frame
    }
    sketches = {name: baseline.sketches[name] for name in codes}
    counts = {name: found.count(step.window[name]) for name, found in sketches.items()}
    threshold = find_threshold(sketches, codes, len(step.window), ASKED, rng)
    found = {
        OURS: step.evidence["drift"]["breach"],
        PSI: any(measure_psi(found.counts, counts[name]) > 0.2 for name, found in sketches.items()),
        RESAMPLED: max(compare(found, counts[name]).effect for name, found in sketches.items()) > threshold,
    }
    if evidently:
        preset = run_evidently(baseline.frame, step.window[list(sketches)])
        found |= {HALF: preset["share"] >= 0.5, ANY: preset["count"] > 0}
    return found


def count_seeds(rows: list[dict[str, Any]], rule: str, kind: str) -> str:
    """Of the seeds of which a rule was asked, those with an alarm."""
    asked = [row for row in rows if rule in row["alarms"] and row["kind"] == kind]
    return f"{len({row['seed'] for row in asked if row['alarms'][rule]})} of {len({row['seed'] for row in asked})}"


def judge_seeds(options: argparse.Namespace, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    work = partial(judge_seed, customers=options.shop_customers, kinds=kinds, evidently_seeds=options.evidently_seeds)
    with open_pool(options.jobs) as pool:
        return [row for rows in pool.map(work, range(1, options.seeds + 1)) for row in rows]


def run_stretches(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    rows = judge_seeds(options, ("none",))
    asked = [row for row in rows if row["alarms"]]
    table = {}
    for rule in (OURS, PSI, RESAMPLED, HALF, ANY):
        found = [row["alarms"][rule] for row in asked if rule in row["alarms"]]
        table[rule] = [f"{sum(found)} of {len(found)}"]
    title = f"No change of regime: {options.seeds} seeds, {len(asked)} windows of about {rows[0]['rows']:,} customers"
    show(title, ["rule", "windows with an alarm"], table)
    verdicts = {name: sum(row["verdict"] == name for row in rows) for name in ("none", "watch", "alert", "retrain")}
    show(f"Verdicts of {len(rows)} checks", ["verdict", "checks"], {name: [str(n)] for name, n in verdicts.items()})
    targets = [Target("stretches: checks that retrain", verdicts["retrain"], "<=", 0)]
    return {"verdicts": verdicts, "windows": {name: cells[0] for name, cells in table.items()}, "rows": rows}, targets


def score_detection(rows: list[dict[str, Any]], kind: str) -> list[int | None]:
    """For each seed the checks from when a change could be seen to when it was noticed; None: not in time.

    A covariate shift can be seen in the first full window, and is noticed by any verdict but none. A concept shift can
    be seen in the first window of closed outcomes, one check later, and is noticed by a retraining. 1 is the first
    check.
    """
    found: list[int | None] = []
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed and row["kind"] == kind]
        visible = own[0]["full_window"] + (kind == "concept")
        wanted = ("retrain",) if kind == "concept" else ("watch", "alert", "retrain")
        hits = [row["check"] for row in own if row["changed"] and row["verdict"] in wanted]
        late = max(hits[0] - visible + 1, 0) if hits else None
        found.append(late if late is not None and late <= CHECKS_ALLOWED else None)
    return found


def run_detection(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    kinds = ("covariate", "harmless", "concept")
    rows = judge_seeds(options, kinds)
    delays = {kind: score_detection(rows, kind) for kind in ("covariate", "concept")}
    noticed = {kind: sum(one is not None for one in found) for kind, found in delays.items()}
    retrained = {
        kind: len(
            {row["seed"] for row in rows if row["kind"] == kind and row["changed"] and row["verdict"] == "retrain"}
        )
        for kind in kinds
    }
    early = [row for row in rows if not row["changed"]]
    table = {rule: [count_seeds(rows, rule, kind) for kind in kinds] for rule in (OURS, PSI, RESAMPLED, HALF, ANY)}
    show("Seeds with an alarm in the first two full windows", ["rule", *kinds], table)
    table = {"noticed within 2 checks": [f"{noticed[k]} of {options.seeds}" if k in noticed else "-" for k in kinds]}
    table["retrains"] = [f"{retrained[kind]} of {options.seeds}" for kind in kinds]
    show("The monitor's verdicts", ["verdict", *kinds], table)
    quiet = np.mean([row["verdict"] == "none" for row in early])
    print(f"{quiet:.1%} of the {len(early)} checks before a change say none")
    targets = [
        Target(f"detection: {kind} shifts noticed within 2 checks", noticed[kind] / options.seeds, ">=", 1.0)
        for kind in noticed
    ]
    targets.append(Target("detection: harmless changes that retrain", retrained["harmless"], "<=", 0))
    return {"delays": delays, "retrained": retrained, "quiet_before": float(quiet), "rows": rows}, targets
