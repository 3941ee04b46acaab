"""How cost grows with the customers: CPU time and peak memory of each stage, with the fitted exponent.

    python benchmarks/growth.py                              10, 30, 100, 300 thousand and a million customers
    python benchmarks/growth.py --customers 3000 6000 12000  other sizes
    python benchmarks/growth.py --stages ingest features     some stages, with those that they need before them
    python benchmarks/growth.py --json FILE                  also write every figure

The shop is simulated for a year at each size. A stage is a process of its own, and its peak memory that process's. What
a stage takes at any size (imports, mostly) is taken off before the fit: the same stage on a shop of 300 customers. The
exponent is the slope of the logarithm of CPU time over that of the customers; 1 is cost in proportion. Exit status 1
and the name of the first missed target.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from parts.targets import Target, finish, show, show_targets

from closedloop.processes import exit_on_signals, run_process

ROOT = Path(__file__).parent.parent
CUSTOMERS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
STAGES = ("ingest", "validate", "features", "training-set", "train", "evaluate")
EXPONENT_LIMIT, SMALLEST = 1.1, 300
USED = "used: "
RUN = f"""
import atexit, resource, sys
def tell():
    used = resource.getrusage(resource.RUSAGE_SELF)
    print("{USED}", used.ru_utime + used.ru_stime, used.ru_maxrss, file=sys.stderr)
atexit.register(tell)
from closedloop.cli.main import main
main()
"""
CHANGES: dict[str, Any] = {
    "as_of": "2024-01-01",
    "split": {"train_snapshots_max": 4},
    "features": {"window_days": [7, 30], "aggregations": ["count", "days", "sum"]},
    "evaluation": {"bootstrap_samples": 200},
}


def create_project(folder: Path, customers: int) -> None:
    """The files that stages read, with a shop of so many customers."""
    folder.mkdir()
    for name in ("configs", "feature_repo"):
        shutil.copytree(ROOT / name, folder / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section, values in {**CHANGES, "simulator": {"customers": customers}}.items():
        params[section] = {**params[section], **values} if isinstance(values, dict) else values
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def run_stage(folder: Path, stage: str) -> dict[str, float]:
    """CPU seconds and peak megabytes of a stage; a gate may refuse, since a small shop passes few of them."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    ran = run_process(
        [sys.executable, "-c", RUN, stage], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if ran.returncode not in (0, 2):
        sys.exit(f"{folder.name} customers, {stage}: exit status {ran.returncode}\n{ran.stderr[-2000:]}")
    cpu, peak = ran.stderr.rsplit(USED, 1)[1].split()
    return {"cpu_s": float(cpu), "peak_mb": float(peak) / 1024}


def fit_exponent(customers: list[int], seconds: list[float], start: float) -> float:
    """The slope of log(seconds beyond the start) over log(customers).

    >>> round(fit_exponent([1, 10, 100], [3.0, 21.0, 201.0], 1.0), 3)
    1.0
    """
    beyond = np.maximum(np.array(seconds) - start, 1e-3)
    return float(np.polyfit(np.log(customers), np.log(beyond), 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, nargs="+", default=list(CUSTOMERS))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, dict[int, dict[str, float]]] = {stage: {} for stage in arguments.stages}
    with tempfile.TemporaryDirectory() as place:
        for customers in (SMALLEST, *sorted(arguments.customers)):
            folder = Path(place) / f"{customers}"
            create_project(folder, customers)
            for stage in arguments.stages:
                found[stage][customers] = run_stage(folder, stage)
                print(f"{customers:>9,} {stage:<13} {found[stage][customers]}", flush=True)
            shutil.rmtree(folder)
    sizes = sorted(arguments.customers)
    exponents = {
        stage: fit_exponent(sizes, [one[size]["cpu_s"] for size in sizes], one[SMALLEST]["cpu_s"])
        for stage, one in found.items()
    }
    rows = {
        stage: [f"{exponents[stage]:.2f}", *(f"{one[size]['cpu_s']:.1f}, {one[size]['peak_mb']:,.0f}" for size in one)]
        for stage, one in found.items()
    }
    columns = ["stage", "exponent", *(f"{size:,}: CPU s, MB" for size in (SMALLEST, *sizes))]
    show("Cost by customers", columns, rows)
    targets = [Target(f"exponent of {stage}", value, "<=", EXPONENT_LIMIT) for stage, value in exponents.items()]
    show_targets(targets)
    figures = {"stages": {stage: {str(size): one for size, one in sizes_.items()} for stage, sizes_ in found.items()}}
    return finish(arguments, ("customers", "stages"), figures | {"exponents": exponents}, targets)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
