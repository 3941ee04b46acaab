"""What a pass over many predictions costs: the monitor, the exporter, and Evidently's preset on the same rows."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from closedloop.processes import run_process
from parts.drift_rules import run_evidently
from parts.drift_shop import TRAINED_AT, make_shop
from parts.targets import Target, show
from parts.worlds import DAY, split_rows, train_model

CONTENDERS = ("monitor", "exporter", "evidently")
CPU_LIMIT, MEMORY_LIMIT, GROWTH_LIMIT = 6.0, 1024.0, 1.5


def fill_store(url: str, rows: pd.DataFrame, names: list[str], model_name: str) -> None:
    """Each row a prediction of a customer of its own, with its outcome, by the model's released version."""
    from closedloop.core.release.entries import Deployment, Entry
    from closedloop.records import Outcome, Prediction, digest_position
    from closedloop.store.database import Database
    from closedloop.store.journal import Journal
    from closedloop.store.predictions import Predictions

    fixed = ("r", model_name, "1", "champion", "http", TRAINED_AT - DAY / 2)
    database = Database(url)
    database.upgrade()
    row = Deployment(model_name, 1, "1", "salt", TRAINED_AT - DAY)
    Journal(database).append_entry(
        Entry("promote", "a benchmark", row.updated_at, "the first version", row), after=None
    )
    store = Predictions(database)
    for start in range(0, len(rows), 50_000):
        chunk, records = rows[start : start + 50_000], list[Any]()
        values = chunk[names].astype(object).where(chunk[names].notna(), None).to_numpy()
        for number, (row, score) in enumerate(zip(values, chunk["score"].tolist(), strict=True), start):
            known = {"customer_id": f"{model_name} {number}", "features_as_of": TRAINED_AT - 31 * DAY}
            records.append(Prediction(digest_position(model_name, number), *fixed, tuple(row), score, 0, 0.5, **known))
        labels = zip(records, chunk["churned"], strict=True)
        store.insert(records + [Outcome(one.prediction_id, int(label), TRAINED_AT) for one, label in labels])
    database.close()


def run_contender(folder: Path, name: str, url: str) -> None:
    """One pass in this process: CPU beyond imports and loading, time, and this process's peak memory."""
    import scipy.stats  # noqa: F401
    import sqlalchemy  # noqa: F401

    if name == "evidently":
        import evidently.presets  # noqa: F401

        reference = pd.read_parquet(folder / "model/reference.parquet")
        window = pd.read_parquet(folder / "rows.parquet")
        act = partial(run_evidently, reference[list(window)], window)
    else:
        act = partial(check_store if name == "monitor" else scrape_store, folder, url)
    cpu, wall = time.process_time(), time.perf_counter()
    said = str(act())
    used, took = time.process_time() - cpu, time.perf_counter() - wall
    # not ru_maxrss: it begins with the memory of the process that started this one
    [peak] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    print(json.dumps({"cpu_s": round(used, 2), "wall_s": round(took, 2), "peak_mb": int(peak) // 1024, "said": said}))


def check_store(folder: Path, url: str) -> str:
    from closedloop.core.monitoring.policy import MonitoringPolicy
    from closedloop.loop.monitor.monitor import run_check
    from closedloop.serving.slots.slots import Slot
    from closedloop.store.checks import Checks
    from closedloop.store.database import Database
    from closedloop.store.samples import Samples

    database = Database(url)
    fixed = {"slot": Slot("1", str(folder / "model"), ""), "as_of": TRAINED_AT, "now": TRAINED_AT}
    check, _ = run_check(Checks(database), Samples(database), **fixed, policy=MonitoringPolicy())
    return f"{check.verdict}: {check.predictions:,} predictions, {check.outcomes:,} outcomes read"


def scrape_store(folder: Path, url: str) -> str:
    """What the exporter and the status screen read."""
    from closedloop.loop.status.overview import Sources, gather
    from closedloop.store.checks import Checks
    from closedloop.store.database import Database
    from closedloop.store.journal import Journal
    from closedloop.store.status_queries import StatusQueries

    database = Database(url)
    sources = Sources(Journal(database), Checks(database), StatusQueries(database))
    view = gather(sources, f"shop_{folder.name}", horizon_days=30, now=TRAINED_AT, as_of=TRAINED_AT)
    return (
        f"accuracy of {view.accuracy.whole:,} outcomes, {view.labelled.value:.0%} of {view.labelled.whole:,} labelled"
    )


def run_cost(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    from closedloop.contract import Lineage
    from closedloop.core.training.estimators import score
    from closedloop.stages.parts.model_folder import write_model

    found: dict[str, dict[str, Any]] = {}
    world = make_shop(7, 24_000, {}, TRAINED_AT, TRAINED_AT - 270 * DAY)
    parts = split_rows(world, TRAINED_AT)
    fitted, _ = train_model(world, parts)
    test = parts["test"].assign(score=score(fitted.pipeline, parts["test"]))
    names = [feature.name for feature in fitted.features]
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
    counts = (options.rows // 10, options.rows)
    with tempfile.TemporaryDirectory() as made:
        for count in counts:
            folder, model_name = Path(made) / f"{count}", f"shop_{count}"
            (folder / "model").mkdir(parents=True)
            write_model(
                folder / "model",
                fitted.pipeline,
                fitted.features,
                fitted.threshold,
                params=world.params,
                dataset=world.dataset.model_copy(update={"model_name": model_name}),
                test=parts["test"].astype({"churned": bool}),
                lineage=lineage,
            )
            drawn = test.sample(count, replace=True, random_state=count, ignore_index=True)
            drawn[[*names, "score"]].to_parquet(folder / "rows.parquet")
            fill_store(options.database or f"sqlite:///{folder / 'operations.db'}", drawn, names, model_name)
        for name in CONTENDERS:
            for count in counts:
                folder = Path(made) / f"{count}"
                url = options.database or f"sqlite:///{folder / 'operations.db'}"
                command = [sys.executable, sys.argv[0], "--contender", name, "--folder", str(folder), "--database", url]
                done = run_process(command, check=True, stdout=subprocess.PIPE, text=True)
                found[f"{name}, {count:,} rows"] = json.loads(done.stdout.strip().splitlines()[-1])
                print(f"{name}, {count:,} rows: {found[f'{name}, {count:,} rows']}", flush=True)
    table = {
        name: [f"{one['cpu_s']:.2f}", f"{one['wall_s']:.2f}", f"{one['peak_mb']:,}", one["said"]]
        for name, one in found.items()
    }
    show(f"One pass, {len(names)} features", ["who", "CPU s", "s", "peak MB", "what it said"], table)
    large, small = (found[f"monitor, {count:,} rows"] for count in reversed(counts))
    targets = [
        Target("cost: CPU s of a pass", large["cpu_s"], "<=", CPU_LIMIT),
        Target("cost: peak memory of a pass, MB", large["peak_mb"], "<=", MEMORY_LIMIT),
        Target("cost: ten times the rows, times the CPU", large["cpu_s"] / small["cpu_s"], "<=", GROWTH_LIMIT),
    ]
    return {"passes": found}, targets
