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
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from parts.drift_rules import find_threshold, measure_psi, run_evidently
from parts.targets import Target, finish, show_targets
from parts.worlds import DAY, Step, World, list_every, make_world, replay, split_rows, train_model

from closedloop.core.drift import compare, find_drifted, sketch
from closedloop.core.simulator import SimulatorSpec, simulate

PARTS = ("held_back", "stretches", "detection", "estimates", "online_retail", "cost")
ASKED, LIMIT = 0.01, 0.015
SIZES = (500, 5_000)
REFERENCE_ROWS, WINDOWS_A_REFERENCE = 10_000, 200
WINDOW_DAYS = (7, 30, 90)
NEVER = "2100-01-01"
CHANGES = {"covariate_at": "2024-02-01", "harmless_at": "2024-04-01", "concept_at": "2024-06-01"}
TRAINED_AT = dt.datetime(2024, 1, 27, tzinfo=dt.UTC)
LAST_CHECK = dt.datetime(2024, 9, 23, tzinfo=dt.UTC)
CHECKS_ALLOWED = 2
OURS, PSI, RESAMPLED = "calibrated alarms (closedloop)", "PSI above 0.2", "resampled from the reference"
HALF, ANY = "Evidently preset, half of the columns", "Evidently preset, any column"
OUTCOMES_MIN, ERROR_LIMIT = 2_000, 0.02
CPU_LIMIT, MEMORY_LIMIT, GROWTH_LIMIT = 6.0, 1024.0, 1.5


# --- held_back --------------------------------------------------------------------------------------------------------


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


# --- stretches and detection ------------------------------------------------------------------------------------------


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
    with ProcessPoolExecutor(options.jobs) as pool:
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


# --- estimates --------------------------------------------------------------------------------------------------------


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


# --- online_retail ----------------------------------------------------------------------------------------------------


def run_online_retail(_: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    """June to November 2011 against half of the customers of 12 June; the other half is June's window."""
    from closedloop.core.folds import hash_shares
    from closedloop.featureset import build_window_spec

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


# --- cost -------------------------------------------------------------------------------------------------------------


def fill_store(folder: Path, rows: pd.DataFrame, names: list[str], count: int) -> None:
    """A store of ``count`` predictions with outcomes, one a customer, and the same rows as a table."""
    from closedloop.adapters.store import Store
    from closedloop.records import Outcome, Prediction, digest_position

    drawn = rows.sample(count, replace=True, random_state=count, ignore_index=True)
    drawn[[*names, "score"]].to_parquet(folder / "rows.parquet")
    values = drawn[names].astype(object).where(drawn[names].notna(), None).to_numpy()
    scores = drawn["score"].tolist()
    fixed = ("r", "shop_churn", "1", "champion", "http", TRAINED_AT - DAY / 2)
    store = Store(f"sqlite:///{folder / 'operations.db'}")
    store.upgrade()
    for start in range(0, count, 50_000):
        stop = min(start + 50_000, count)
        ids = [digest_position("benchmark", number) for number in range(start, stop)]
        records: list[Any] = [
            Prediction(
                ids[number - start],
                *fixed,
                tuple(values[number]),
                scores[number],
                0,
                0.5,
                customer_id=f"c{number}",
                features_as_of=TRAINED_AT - 31 * DAY,
            )
            for number in range(start, stop)
        ]
        known = drawn["churned"].iloc[start:stop]
        records += [Outcome(one, int(churned), TRAINED_AT) for one, churned in zip(ids, known, strict=True)]
        store.insert(records)
    store.close()


def run_contender(folder: Path, name: str) -> None:
    """One pass in this process: CPU beyond imports and loading, and this process's peak memory."""
    if name == "closedloop":
        import scipy.stats  # noqa: F401
        import sqlalchemy  # noqa: F401

        from closedloop.adapters.checks import Checks
        from closedloop.adapters.samples import Samples
        from closedloop.loop.monitor import Rules, run_check

        url = f"sqlite:///{folder / 'operations.db'}"
        started = time.process_time()
        check, _ = run_check(
            Checks(url),
            Samples(url),
            model_dir=folder.parent / "model",
            version="1",
            as_of=TRAINED_AT,
            now=TRAINED_AT,
            rules=Rules(),
        )
        said = f"{check.verdict}: {check.predictions:,} predictions, {check.outcomes:,} outcomes read"
    else:
        import evidently.presets  # noqa: F401

        reference = pd.read_parquet(folder.parent / "model/reference.parquet")
        window = pd.read_parquet(folder / "rows.parquet")
        started = time.process_time()
        said = str(run_evidently(reference[list(window)], window))
    used = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cpu_s": round(used, 2), "peak_mb": round(peak), "said": said}))


def run_cost(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    from closedloop.contract import Lineage
    from closedloop.core.estimators import score
    from closedloop.stages.model_folder import write_model

    found: dict[str, dict[str, Any]] = {}
    world = make_shop(7, 24_000, {}, TRAINED_AT, TRAINED_AT - 270 * DAY)
    parts = split_rows(world, TRAINED_AT)
    fitted, _ = train_model(world, parts)
    test = parts["test"].assign(score=score(fitted.pipeline, parts["test"]))
    names = [feature.name for feature in fitted.features]
    with tempfile.TemporaryDirectory() as made:
        (model := Path(made) / "model").mkdir()
        lineage = Lineage(
            dataset="shop",
            as_of=TRAINED_AT.date(),
            git_commit="0" * 40,
            git_dirty=False,
            data_md5={},
            params_md5="",
            train_snapshots=(),
            validation_snapshots=(),
            test_snapshots=(),
        )
        write_model(
            model,
            fitted.pipeline,
            features=fitted.features,
            threshold=fitted.threshold,
            params=world.params,
            dataset=world.dataset,
            feature_service="benchmark",
            test=parts["test"].astype({"churned": bool}),
            lineage=lineage,
        )
        for count in (counts := (options.rows // 10, options.rows)):
            (folder := Path(made) / str(count)).mkdir()
            fill_store(folder, test, names, count)
        for name in ("closedloop", "evidently"):
            for count in counts:
                command = [sys.executable, __file__, "--contender", name, "--folder", str(Path(made) / str(count))]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[f"{name}, {count:,} rows"] = json.loads(done.stdout.strip().splitlines()[-1])
                print(f"{name}, {count:,} rows: {found[f'{name}, {count:,} rows']}", flush=True)
    table = {name: [f"{one['cpu_s']:.2f}", f"{one['peak_mb']:,}", one["said"]] for name, one in found.items()}
    show(f"One pass, {len(names)} features", ["who", "CPU s", "peak MB", "what it said"], table)
    large, small = (found[f"closedloop, {count:,} rows"] for count in (options.rows, options.rows // 10))
    targets = [
        Target("cost: CPU s of a pass", large["cpu_s"], "<=", CPU_LIMIT),
        Target("cost: peak memory of a pass, MB", large["peak_mb"], "<=", MEMORY_LIMIT),
        Target("cost: ten times the rows, times the CPU", large["cpu_s"] / small["cpu_s"], "<=", GROWTH_LIMIT),
    ]
    return {"passes": found}, targets


# --- all of it --------------------------------------------------------------------------------------------------------


def show(title: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console().print(table)


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
    parser.add_argument("--contender", choices=("closedloop", "evidently"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # seeds run side by side
    if options.contender:
        run_contender(options.folder, options.contender)
        return 0
    figures: dict[str, Any] = {}
    targets: list[Target] = []
    for part in [options.only] if options.only else PARTS:
        wall, cpu = time.perf_counter(), os.times()
        figures[part], reached = globals()[f"run_{part}"](options)
        spent = sum(os.times()[:4]) - sum(cpu[:4])
        figures[part]["wall_s"], figures[part]["cpu_s"] = round(time.perf_counter() - wall, 1), round(spent, 1)
        print(f"{part}: {figures[part]['wall_s']:.0f} s, {spent:.0f} s CPU")
        targets += reached
    show_targets(targets)
    settings = ("windows", "customers", "seeds", "evidently_seeds", "shop_customers", "estimate_customers", "rows")
    return finish(options, settings, figures, targets)


if __name__ == "__main__":
    sys.exit(main())
