"""Whether the policy backtest is fast, and whether what it picks on one year still holds on the next.

    python benchmarks/backtest.py                        both parts
    python benchmarks/backtest.py --only pick --seeds 3  one part: speed, pick
    python benchmarks/backtest.py --every 7              checks and snapshots by the week
    python benchmarks/backtest.py --json FILE            also write every figure

``speed`` is `closedloop backtest` on the shop as it is shipped: two years, 24,000 customers, six policies. ``pick`` has
a smaller shop of each seed with the shop's own changes of 2024: the policy picked on 2023, whose year knows none of
them, is judged on 2024, where every policy starts from the same new model. Exit status 1 and the name of the first
missed target.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from parts.targets import Target, finish, show, show_targets

from closedloop.config.settings import RetrainingSettings
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.core.release.policy import ReleasePolicy
from closedloop.loop.backtest.backtest import compare_loops, list_policies, run_policies
from closedloop.loop.backtest.history import History, choose_ticks, read_history
from closedloop.processes import exit_on_signals, open_pool, run_process

SECONDS_MAX, NEAR, SHARE_MIN = 300, 1.10, 0.8
YEAR_ENDS = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
ALL = ("speed", "pick")


def time_command(every: int | None) -> dict[str, Any]:
    """The command in a project folder of its own, as a person types it."""
    from closedloop.config.project import init_project

    with tempfile.TemporaryDirectory() as folder:
        init_project(Path(folder))
        command = [str(Path(sys.executable).with_name("closedloop")), "backtest", "--json"]
        began = time.perf_counter()
        asked = [*command, *(["--every", str(every)] if every else [])]
        done = run_process(asked, cwd=folder, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 1), "report": json.loads(done.stdout)}


def make_history(seed: int, customers: int, every: int | None) -> History:
    from closedloop.adapters.duckdb import DuckEngine
    from closedloop.config.dataset import load_dataset
    from closedloop.config.params import merge_values, parse_params
    from closedloop.config.yaml import read_yaml

    values = merge_values(read_yaml(Path("params.yaml")), {"seed": seed, "simulator": {"customers": customers}})
    dataset = load_dataset("shop", Path("configs/datasets"))
    with tempfile.TemporaryDirectory() as folder, DuckEngine(memory_limit="1GB", threads=1) as engine:
        params = parse_params(values, "benchmark")
        return read_history(params, dataset, engine, work_dir=Path(folder), every_days=every)


def judge_year(history: History, first: dt.datetime | None, until: dt.datetime) -> dict[str, Any]:
    """The backtest of the ticks from ``first`` on, as somebody sees it who looks at ``until``."""
    params = history.params.model_copy(update={"as_of": until.date()})
    known = dataclasses.replace(history, params=params, ticks=[at for at in history.ticks if at <= until])
    chosen = choose_ticks(known, None if first is None else first.date())
    loops = run_policies(
        chosen,
        list_policies(30),
        monitoring=MonitoringPolicy(),
        releasing=ReleasePolicy(),
        retraining=RetrainingSettings(),
    )
    return compare_loops(chosen, loops, until=until)


def run_seed(seed: int, *, customers: int, every: int | None) -> dict[str, Any]:
    history = make_history(seed, customers, every)
    before = judge_year(history, None, YEAR_ENDS)
    after = judge_year(history, YEAR_ENDS, history.params.as_of_at)
    losses = {name: own["log_loss"] for name, own in after["policies"].items()}
    best = min(losses, key=lambda name: losses[name])
    found = {"seed": seed, "picked": before["picked"], "sentence": before["sentence"], "best": best, "losses": losses}
    found["retrainings"] = {name: own["retrainings"] for name, own in after["policies"].items()}
    return found | {"ratio": losses[before["picked"]] / losses[best], "never": losses["never"] / losses[best]}


def describe(row: dict[str, Any]) -> list[str]:
    losses = [f"{loss:.4f}" for loss in row["losses"].values()]
    return [str(row["seed"]), row["picked"], row["best"], f"{row['ratio']:.3f}", f"{row['never']:.3f}", *losses]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=ALL)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--customers", type=int, default=6_000, help="of the shop of each seed")
    parser.add_argument("--every", type=int, help="days between checks, and between snapshots (default: the shop's)")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    targets: list[Target] = []
    if options.only in (None, "speed"):
        figures["speed"] = time_command(options.every)
        print(f"{figures['speed']['seconds']:.0f} s: {figures['speed']['report']['sentence']}")
        targets.append(
            Target("seconds of a backtest of the shop's two years", figures["speed"]["seconds"], "<=", SECONDS_MAX)
        )
    if options.only in (None, "pick"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # seeds run side by side
        work = partial(run_seed, customers=options.customers, every=options.every)
        with open_pool(options.jobs) as pool:
            rows = list(pool.map(work, range(options.first_seed, options.first_seed + options.seeds)))
        names = list(rows[0]["losses"])
        columns = ["seed", "picked on 2023", "best on 2024", "loss over the best's", "never's", *names]
        show("log loss on 2024", columns, {str(row["seed"]): describe(row) for row in rows})
        figures["pick"] = rows
        near = sum(row["ratio"] <= NEAR for row in rows) / len(rows)
        targets.append(Target("share of seeds whose pick is within 10% of the best one's loss", near, ">=", SHARE_MIN))
    show_targets(targets)
    return finish(options, ("seeds", "first_seed", "customers", "every"), figures, targets)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
