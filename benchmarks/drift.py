"""How often drift alarms though nothing changed, whether it notices what did, and how good its estimates are.

    python benchmarks/drift.py                      every part, about half an hour
    python benchmarks/drift.py --only detection     one part: held_back, stretches, detection, estimates,
                                                    online_retail (needs CLOSEDLOOP_REAL_DATA) or cost
    python benchmarks/drift.py --json FILE          also write every figure

held_back deals the rows of one simulated day into a reference and windows that share no row with it, so that every
alarm is a false one. stretches and detection train a model on a simulated shop and let the monitor's own functions
judge the months after it, without and with a change of regime, which the simulator's truth file dates; rules in common
use see the same windows. estimates compares expected with realised figures over two years. Exit status 1 and the name
of the first missed target.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from parts.drift_cost import CONTENDERS, run_contender, run_cost
from parts.drift_rules import find_threshold, measure_psi
from parts.drift_shop import ASKED, CHANGES, PSI, RESAMPLED, make_shop, run_detection, run_stretches
from parts.targets import Target, finish, show, show_targets
from parts.worlds import DAY, Step, list_every, make_world, replay, split_rows, train_model

from closedloop.core.monitoring.drift import compare, find_drifted, sketch
from closedloop.processes import exit_on_signals
from closedloop.simulator.shop import SimulatorSpec, simulate

LIMIT = 0.015
SIZES = (500, 5_000)
REFERENCE_ROWS, WINDOWS_A_REFERENCE = 10_000, 200
WINDOW_DAYS = (7, 30, 90)
OUTCOMES_MIN, ERROR_LIMIT = 2_000, 0.02


def make_pool(customers: int) -> pd.DataFrame:
    """One row a customer on one day, without any change of regime."""
    start, end = dt.date(2023, 1, 1), dt.date(2023, 4, 15)
    spec = SimulatorSpec(customers=customers, covariate_at=None, harmless_at=None, concept_at=None)
    shop = simulate(spec, start=start, end=end)
    rows = shop.customers.set_index("customer_id")[["age", "income", "segment"]]
    events = shop.events
    for days in WINDOW_DAYS:
        recent = events[events["time"] >= pd.Timestamp(end, tz="UTC") - pd.Timedelta(days=days)]
        for kind, some in recent.groupby("event_type"):
            grouped = some.groupby("customer_id")
            rows[f"{kind}_count_{days}d"] = grouped.size().reindex(rows.index).fillna(0.0)
            if kind == "purchase":
                rows[f"purchase_mean_{days}d"] = grouped["amount"].mean().reindex(rows.index)
    return rows[rows["purchase_count_90d"] > 0].reset_index(drop=True)


def count_alarms(pool: pd.DataFrame, size: int, windows: int) -> dict[str, float]:
    """Shares of windows in which each rule alarms."""
    rng = np.random.default_rng(size)
    alarms = dict.fromkeys(("calibrated", "calibrated, floor 0.1", PSI, RESAMPLED), 0)
    for _ in range(windows // WINDOWS_A_REFERENCE):
        order = rng.permutation(len(pool))
        own, rest = order[:REFERENCE_ROWS], order[REFERENCE_ROWS:]
        kinds = {"segment": ["budget", "standard", "premium"]}
        sketches = {name: sketch(pool[name].iloc[own], kinds.get(name)) for name in pool}
        codes = {name: found.encode(pool[name]) for name, found in sketches.items()}
        threshold = find_threshold(sketches, {name: each[own] for name, each in codes.items()}, size, ASKED, rng)
        for _ in range(WINDOWS_A_REFERENCE):
            rows = rng.choice(rest, size, replace=False)
            counts = {name: np.bincount(codes[name][rows], minlength=len(f.counts)) for name, f in sketches.items()}
            shifts = {name: compare(found, counts[name]) for name, found in sketches.items()}
            alarms["calibrated"] += bool(find_drifted(shifts, false_alarm_rate=ASKED, effect_min=0.0))
            alarms["calibrated, floor 0.1"] += bool(find_drifted(shifts, false_alarm_rate=ASKED, effect_min=0.1))
            alarms[PSI] += any(measure_psi(found.counts, counts[name]) > 0.2 for name, found in sketches.items())
            alarms[RESAMPLED] += max(shift.effect for shift in shifts.values()) > threshold
    return {rule: count / windows for rule, count in alarms.items()}


def run_held_back(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    pool = make_pool(options.customers)
    found = {size: count_alarms(pool, size, options.windows) for size in SIZES}
    title = f"{len(pool):,} rows, {len(pool.columns)} features, {REFERENCE_ROWS:,} reference, {ASKED:.1%} asked for"
    rows = {rule: [f"{found[size][rule]:.2%}" for size in SIZES] for rule in found[SIZES[0]]}
    show(f"False alarms: {title}", ["rule", *(f"{size:,} rows" for size in SIZES)], rows)
    targets = [
        Target(f"held_back: false alarms, {size:,} rows", found[size]["calibrated"], "<=", LIMIT) for size in SIZES
    ]
    return {"windows": options.windows, "false_alarms": found}, targets


def collect_errors(steps: list[Step]) -> list[dict[str, Any]]:
    """Expected beside realised figures of each window of closed outcomes."""
    found = []
    for step in steps:
        if real := step.evidence.get("realised"):
            row = {"at": step.evidence["outcomes_until"][:10], "rows": real["rows"]}
            row |= {f"{name}_realised": real[name] for name in ("accuracy", "brier")}
            found.append(row | {f"{name}_expected": real["expected"][name] for name in ("accuracy", "brier")})
    return found


def show_errors(title: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    errors = {
        name: np.array([abs(row[f"{name}_expected"] - row[f"{name}_realised"]) for row in rows])
        for name in ("accuracy", "brier")
    }
    table = {
        f"{name}, expected against realised": [f"{found.mean():.4f}", f"{found.max():.4f}", str(len(rows))]
        for name, found in errors.items()
    }
    show(title, ["figure", "mean absolute error", "largest", "windows"], table)
    return {f"{name}_{how}": float(getattr(found, how)()) for name, found in errors.items() for how in ("mean", "max")}


def run_estimates(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    """The simulator's two years, with a new model every 90 days, as far back as outcomes allow to train one."""
    last, concept = dt.datetime(2024, 12, 2, tzinfo=dt.UTC), dt.datetime(2024, 6, 1, tzinfo=dt.UTC)
    world = make_shop(7, options.estimate_customers, CHANGES, last, last - 20 * 30 * DAY)
    horizon = 30 * DAY
    steady: list[dict[str, Any]] = []
    blind: list[dict[str, Any]] = []
    snapshots = sorted(world.rows)
    for trained_at in snapshots[6::3]:
        checks = [at for at in snapshots if at >= trained_at]
        if len(checks) < 2:
            continue
        parts = split_rows(world, trained_at)
        model = train_model(world, parts)
        until = [
            row
            for row in collect_errors(replay(world, *model, checks, model_as_of=trained_at))
            if row["rows"] >= OUTCOMES_MIN
        ]
        for row in until[:3]:
            closed = dt.datetime.fromisoformat(row["at"]).replace(tzinfo=dt.UTC) + horizon
            learnt = parts["train"]["event_timestamp"].min().to_pydatetime()
            row["model"] = f"{trained_at:%Y-%m-%d}"
            (blind if learnt < concept < closed else steady).append(row)
    figures = {"steady": show_errors("Outside the change of concept", steady)}
    figures["blind"] = show_errors(
        "Trained before the change of concept, outcomes after it: no estimate can see it", blind
    )
    targets = [
        Target("estimates: mean error of the expected accuracy", figures["steady"]["accuracy_mean"], "<=", ERROR_LIMIT),
        Target(
            "estimates: largest error of the expected accuracy", figures["steady"]["accuracy_max"], "<=", ERROR_LIMIT
        ),
    ]
    return {**figures, "rows": {"steady": steady, "blind": blind}}, targets


def run_online_retail(_: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    """June to November 2011 against half of the customers of 12 June; the other half is June's window."""
    from closedloop.config.featureset import build_window_spec
    from closedloop.core.training.splits import hash_shares

    source = Path(os.environ.get("CLOSEDLOOP_REAL_DATA", "")) / "online-retail"
    if not source.is_dir():
        raise SystemExit("online_retail: set CLOSEDLOOP_REAL_DATA to the folder that holds online-retail/")
    snapshots = list_every(dt.datetime(2011, 3, 14, tzinfo=dt.UTC), dt.datetime(2011, 11, 9, tzinfo=dt.UTC), 30)
    march, june = snapshots[0], snapshots[3]
    world = make_world("online_retail", {"data": {"source": str(source)}}, snapshots)
    half = hash_shares(world.rows[june]["customer_id"], "benchmark") < 0.5
    reference, other = world.rows[june][half], world.rows[june][~half]
    model = train_model(world, {"train": world.rows[march], "validation": world.rows[snapshots[1]], "test": reference})
    steps = replay(world._replace(rows={**world.rows, june: other}), *model, snapshots[3:], model_as_of=june)
    log_begins, spec = dt.datetime(2010, 12, 1, tzinfo=dt.UTC), build_window_spec(world.params, world.dataset)
    table, tenure, truncated = {}, 0, 0
    for step in steps:
        drift = step.evidence["drift"]
        tenure += "tenure_days" in drift["drifted"]
        reach = {name: days for days in spec.window_days for name in drift["drifted"] if name.endswith(f"_{days}d")}
        truncated += any(june - days * DAY < log_begins for days in reach.values())
        named = [f"{name} {drift['features'][name]['effect']:.2f}" for name in drift["drifted"]]
        table[f"{step.at:%Y-%m-%d}"] = [f"{len(step.window):,}", step.decision.verdict, ", ".join(named) or "-"]
    show("Online Retail against 12 June 2011", ["window", "customers", "verdict", "drifted (effect)"], table)
    early = train_model(
        world, {"train": world.rows[march], "validation": world.rows[snapshots[1]], "test": world.rows[march]}
    )
    naive = replay(world, *early, snapshots[3:], model_as_of=june)
    cut = {name for step in naive for name in step.evidence["drift"]["drifted"]}
    print(f"Against 14 March, whose windows of 180 days are cut short by the log's beginning: {', '.join(sorted(cut))}")
    errors = show_errors("Online Retail, closed outcomes", rows := collect_errors(steps))
    targets = [
        Target("online_retail: alarms of tenure", tenure, "<=", 0),
        Target("online_retail: alarms of truncated windows", truncated, "<=", 0),
    ]
    said = {f"{step.at:%Y-%m-%d}": [step.decision.verdict, *step.decision.reasons] for step in steps}
    return {"windows": table, "said": said, "against_march": sorted(cut), "estimates": errors, "rows": rows}, targets


PARTS = {
    "held_back": run_held_back,
    "stretches": run_stretches,
    "detection": run_detection,
    "estimates": run_estimates,
    "online_retail": run_online_retail,
    "cost": run_cost,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--windows", type=int, default=10_000, help="held_back: of each size; a multiple of 200")
    parser.add_argument("--customers", type=int, default=100_000, help="held_back: customers of the shop")
    parser.add_argument("--seeds", type=int, default=20, help="stretches and detection")
    parser.add_argument("--shop-customers", type=int, default=6_000, help="stretches and detection")
    parser.add_argument("--evidently-seeds", type=int, default=20, help="of these, Evidently is asked as well")
    parser.add_argument("--jobs", type=int, default=2, help="stretches and detection: seeds at a time")
    parser.add_argument("--estimate-customers", type=int, default=24_000, help="estimates")
    parser.add_argument("--rows", type=int, default=1_000_000, help="cost: stored predictions")
    parser.add_argument("--database", default="", help="cost: an empty PostgreSQL database (default: SQLite files)")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # seeds run side by side
    if options.contender:
        run_contender(options.folder, options.contender, options.database)
        return 0
    figures: dict[str, Any] = {}
    targets: list[Target] = []
    for part in [options.only] if options.only else PARTS:
        wall, cpu = time.perf_counter(), os.times()
        figures[part], reached = PARTS[part](options)
        spent = sum(os.times()[:4]) - sum(cpu[:4])
        figures[part]["wall_s"], figures[part]["cpu_s"] = round(time.perf_counter() - wall, 1), round(spent, 1)
        print(f"{part}: {figures[part]['wall_s']:.0f} s, {spent:.0f} s CPU")
        targets += reached
    show_targets(targets)
    settings = ("windows", "customers", "seeds", "evidently_seeds", "shop_customers", "estimate_customers", "rows")
    return finish(options, settings, figures, targets)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
