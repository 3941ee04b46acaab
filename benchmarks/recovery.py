"""How soon the loop recovers from a change, how much of the avoidable loss it avoids, and whether it keeps still.

    python benchmarks/recovery.py                          every part at the weekly pace
    python benchmarks/recovery.py --only shop --seeds 3    one part: shop, unchanged, base_rate, birth, nothing
    python benchmarks/recovery.py --every 30               the pace of `make loop`
    python benchmarks/recovery.py --json FILE              also write every figure

The loop runs offline, as in `closedloop backtest`: the monitor, the gates and the release decide by the product's own
functions on rows whose features were computed once; every customer asks once a day. Beside it stand a model that is
never retrained (frozen), one that is retrained every month without a gate, and an oracle trained on the world after the
change. Exit status 1 and the name of the first missed target.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from parts.recovery_logs import Log, make_drawn_log, make_shop_log
from parts.recovery_loop import list_losses, serve_monthly, serve_oracle
from parts.targets import Target, finish, show, show_targets
from parts.worlds import DAY

from closedloop.config.settings import RetrainingSettings
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.core.release.policy import ReleasePolicy
from closedloop.loop.backtest.models import Trainer
from closedloop.loop.backtest.offline import Loop
from closedloop.processes import exit_on_signals, open_pool

NEAR, SETTLED_DAYS = 0.25, 28
ALL = ("shop", "unchanged", "base_rate", "birth", "nothing")


def run_seed(seed: int, *, part: str, every: int, customers: int) -> dict[str, Any]:
    """One log of one seed: losses of all four arms after the change, and what the loop did."""
    if part in ("shop", "unchanged"):
        log = make_shop_log(seed, customers, every, changed=part == "shop")
    else:
        log = make_drawn_log(part, seed, every)
    trainer = Trainer(log, RetrainingSettings())
    first = trainer.train_first()
    loop = Loop(trainer, first, MonitoringPolicy(), ReleasePolicy())
    loop.run()
    losses = {"loop": list_losses(log, [scores for _, _, scores in loop.served])}
    losses["frozen"] = list_losses(log, [first.score(at) for at in log.ticks])
    oracle = serve_oracle(log) if log.change is not None else []
    if oracle:
        losses["oracle"] = list_losses(log, oracle)
    if part == "shop":
        losses["monthly"] = list_losses(log, serve_monthly(log, trainer, first))
    after = np.array([log.change is None or at >= log.change for at in log.ticks])
    events = [(f"{one.at:%Y-%m-%d}", one.what, one.why) for one in loop.events]
    found: dict[str, Any] = {"seed": seed, "rows": len(log.rows[log.ticks[-1]]), "events": events}
    found["losses"] = {name: float(each[after].mean()) for name, each in losses.items()}
    found["promoted"] = sum(what == "promoted" for _, what, _ in loop.events)
    found["once"] = asked_once(loop)
    found["asked"] = sum(what == "retrain" for _, what, _ in loop.events)
    if log.change is not None:
        gap = found["losses"]["frozen"] - found["losses"]["oracle"]
        found["avoided"] = (found["losses"]["frozen"] - found["losses"]["loop"]) / gap
        found["days"] = find_days(log, loop, losses)
        found["brier_gap"] = measure_brier_gap(log, loop, oracle)
    return found


def asked_once(loop: Loop) -> bool:
    """Whether a version was promoted, and nothing was asked for after that."""
    happened = [what for _, what, _ in loop.events]
    return "promoted" in happened and "retrain" not in happened[happened.index("promoted") :]


def find_days(log: Log, loop: Loop, losses: dict[str, np.ndarray]) -> int | None:
    """Days from the change until another version serves that stands near the oracle over the four weeks that follow."""
    assert log.change is not None
    ticks = np.array(log.ticks)
    for at, model, _ in loop.served:
        if at < log.change or model is loop.served[0][1]:
            continue
        some = (ticks >= at) & (ticks < at + SETTLED_DAYS * DAY)
        gap = losses["frozen"][some].mean() - losses["oracle"][some].mean()
        if losses["loop"][some].mean() - losses["oracle"][some].mean() <= NEAR * gap:
            return (at - log.change).days
    return None


def measure_brier_gap(log: Log, loop: Loop, oracle: list[np.ndarray]) -> float:
    """Brier score of what is served from two horizons after the change on, above that of the oracle."""
    assert log.change is not None
    gaps = []
    for (at, _, scores), best in zip(loop.served, oracle, strict=True):
        if at >= log.change + 2 * log.horizon:
            truth = log.rows[at]["churned"].to_numpy(np.float64)
            gaps.append(((truth - scores) ** 2).mean() - ((truth - best) ** 2).mean())
    return float(np.mean(gaps))


def judge(part: str, rows: list[dict[str, Any]]) -> list[Target]:
    """What each part must show."""
    if part == "shop":
        days = [np.inf if row["days"] is None else row["days"] for row in rows]
        return [
            Target(
                "shop: share of the avoidable loss avoided, median", np.median([r["avoided"] for r in rows]), ">=", 0.6
            ),
            Target("shop: days until what is served is near the oracle, median", float(np.median(days)), "<=", 75),
        ]
    if part in ("unchanged", "nothing"):
        return [
            Target(f"{part}: share of seeds with a promotion", np.mean([r["promoted"] > 0 for r in rows]), "<=", 0.05)
        ]
    if part == "base_rate":
        name = "base_rate: Brier score above the oracle's from two horizons on, median"
        return [Target(name, float(np.median([row["brier_gap"] for row in rows])), "<=", 0.005)]
    return [
        Target(
            "birth: share of seeds recalibrated, and not asked again", np.mean([r["once"] for r in rows]), ">=", 0.95
        )
    ]


def describe(row: dict[str, Any]) -> list[str]:
    cells = [
        f"{row['losses'][name]:.4f}" if name in row["losses"] else "-"
        for name in ("frozen", "monthly", "loop", "oracle")
    ]
    avoided, days = row.get("avoided"), row.get("days")
    cells += ["-" if avoided is None else f"{avoided:.2f}", "-" if days is None else str(days)]
    return [*cells, str(row["asked"]), str(row["promoted"])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=ALL)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--customers", type=int, default=6_000, help="of the shop")
    parser.add_argument("--every", type=int, default=7, help="days between ticks, and between snapshots")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time")
    parser.add_argument("--events", action="store_true", help="print what happened")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # seeds run side by side
    figures: dict[str, Any] = {}
    targets: list[Target] = []
    for part in [options.only] if options.only else ALL:
        wall = time.perf_counter()
        work = partial(run_seed, part=part, every=options.every, customers=options.customers)
        with open_pool(options.jobs) as pool:
            rows = list(pool.map(work, range(options.first_seed, options.first_seed + options.seeds)))
        columns = ["seed", "frozen", "monthly", "loop", "oracle", "avoided", "days", "asked", "promoted"]
        show(f"{part}: log loss from the change on", columns, {str(row["seed"]): describe(row) for row in rows})
        if options.events:
            for row in rows:
                print(*(f"{row['seed']:>3}  {at}  {what}: {why}" for at, what, why in row["events"]), sep="\n")
        figures[part] = {"rows": rows, "wall_s": round(time.perf_counter() - wall, 1)}
        print(f"{part}: {figures[part]['wall_s']:.0f} s")
        targets += judge(part, rows)
    show_targets(targets)
    return finish(options, ("seeds", "first_seed", "customers", "every"), figures, targets)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
