"""How long a stage takes to start, against the import of the heavy tool that it needs.

A stage has started when its command has read params, data set config and settings, and has imported its own modules
and its tool. The figure is CPU time of a fresh process, the smaller of several runs taken in turn with the bare import,
so that a busy machine hits both.

    python benchmarks/startup.py --json FILE
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from closedloop.processes import exit_on_signals, run_process

ROOT = Path(__file__).parent.parent
LIMIT = 1.3
START = "from pathlib import Path; import closedloop.cli.main; from closedloop.bootstrap import {names}; "
START += "run = load_run(Path('params.yaml')); import closedloop.stages.{module}; "
# Ibis imports the half of itself, DuckDB and Arrow on first use
FIRST_TABLE = "import ibis; ibis.duckdb.connect().sql('SELECT 1 AS one').to_pyarrow()"
# stage: (module, what bootstrap gives it, what builds the heavy tool, the bare tool)
STAGES = {
    "validate": ("validate", "load_run", "import great_expectations", "import great_expectations"),
    "features": (
        "features",
        "load_run, build_engine",
        "import closedloop.stages.features; build_engine(run).close(); " + FIRST_TABLE,
        FIRST_TABLE,
    ),
    "training_set": (
        "training_set",
        "load_run, build_features",
        "build_features(run); import feast",
        "import feast",
    ),
    "train": (
        "train",
        "load_run, build_tracking",
        "build_tracking(run); import mlflow, sklearn.ensemble, closedloop.core.training.estimators",
        "import mlflow, sklearn.ensemble",
    ),
    "evaluate": (
        "evaluate",
        "load_run, build_tracking",
        "build_tracking(run); import mlflow, sklearn.ensemble",
        "import mlflow, sklearn.ensemble",
    ),
    "register": ("register", "load_run, build_tracking", "build_tracking(run); import mlflow", "import mlflow"),
}


def measure_cpu_seconds(code: str) -> float:
    """CPU seconds, user and system, of a fresh interpreter that runs ``code``."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    before = os.times()
    run_process([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows, missed = [], []
    print(f"{'stage':<14}{'tool s':>8}{'stage s':>9}{'ratio':>7}   target <= {LIMIT}")
    for stage, (module, names, tool, bare) in STAGES.items():
        code = START.format(names=names, module=module) + tool
        pairs = [(measure_cpu_seconds(bare), measure_cpu_seconds(code)) for _ in range(options.repeats)]
        bare_seconds, stage_seconds = (min(side) for side in zip(*pairs, strict=True))
        ratio = stage_seconds / bare_seconds
        rows.append({"stage": stage, "tool_cpu_s": bare_seconds, "stage_cpu_s": stage_seconds, "ratio": ratio})
        print(f"{stage:<14}{bare_seconds:>8.2f}{stage_seconds:>9.2f}{ratio:>7.2f}", flush=True)
        if ratio > LIMIT:
            missed.append(f"{stage}: starts in {ratio:.2f} times its tool's import, target {LIMIT}")
    if options.json:
        options.json.write_text(json.dumps({"limit": LIMIT, "stages": rows}, indent=2) + "\n", encoding="utf-8")
    if missed:
        print(f"MISSED {missed[0]}")
        return 1
    return 0


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
