"""Batch scoring side by side: `closedloop score`, mlflow.pyfunc and scikit-learn, from one file to another.

    python benchmarks/batch.py                 10 million rows, all targets
    python benchmarks/batch.py --rows N        another size
    python benchmarks/batch.py --json FILE     also write every figure

The models are the project's own (`make run` first), which is the shipped default, and a random forest of 100 trees of
depth 10, trained here on the same rows. Every contender reads the same Parquet file and writes customer, score,
decision and version into another, in a process of its own with as many threads (peak memory is that process's). None
logs its predictions; `closedloop score` checks every row against the contract and gives it a prediction id, the others
do neither. Scores are compared before any time is printed. Then a run is killed (kill -9) half-way and resumed.
Exit status 1 and the name of the first missed target.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from parts.models import DEFAULT, FOREST, draw_rows, prepare_models, require_project
from parts.targets import Target, finish, show_targets

from closedloop.processes import exit_on_signals, run_process, start_process

ROOT = Path(__file__).parent.parent
# of the default model against mlflow.pyfunc; of the forest against scikit-learn, whole and its predict_proba alone
PYFUNC_LIMIT, FOREST_LIMIT = 1.3, 0.8
MEMORY_MB_LIMIT, GROWTH_LIMIT, SCORE_LIMIT = 1000, 1.1, 1e-6
PIPELINE_LIMIT = 1e-4  # the parity gate's
SLICE_ROWS = 1_000_000
CONTENDERS = ("batch", "pyfunc", "sklearn")
OUTPUT = "{contender}-{model}.parquet"


# --- what is compared -------------------------------------------------------------------------------------------------


def prepare(project: Path, work: Path, rows: int, threads: int) -> None:
    """Both models as every contender wants them, and the rows."""
    contract, training = prepare_models(project, work, threads)
    print(f"{rows:,} rows: generating", file=sys.stderr, flush=True)
    generate(work / "input.parquet", contract, training, rows)


def generate(path: Path, contract: Any, training: Any, rows: int) -> None:
    """Rows that all contenders read."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(20_250_101)
    writer = None
    for start in range(0, rows, 250_000):
        count = min(250_000, rows - start)
        customers = [f"C{number:08d}" for number in range(start, start + count)]
        columns = {"customer_id": customers, **draw_rows(contract, training, count, rng)}
        table = pa.Table.from_pydict({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


# --- contenders -------------------------------------------------------------------------------------------------------


def run_contender(contender: str, model: str, work: Path, threads: int, *, resume: bool) -> None:
    """In the child: import and load first, then time the work; prints its figures."""
    import pandas as pd

    output = work / OUTPUT.format(contender=contender, model=model)
    if contender == "batch":
        from closedloop.scoring.batch import BatchOptions, score_batch
        from closedloop.serving.slots.slots import Slot

        options = BatchOptions(range_margin=1.0, id_key=b"benchmark", threads=threads, resume=resume)
        slot = Slot("1", str(work / model), "")

        def run() -> float:
            score_batch(str(work / "input.parquet"), str(output), slot, options, state_dir=work)
            return 0.0
    else:
        predict = load_predict(contender, work / model)

        def run() -> float:
            frame = pd.read_parquet(work / "input.parquet")
            start = time.perf_counter()
            scores = predict(frame)
            seconds = time.perf_counter() - start
            table = pd.DataFrame({"customer_id": frame["customer_id"], "score": scores})
            table["decision"], table["model_version"] = (scores >= 0.5).astype("int8"), "1"
            table.to_parquet(output, index=False)
            return seconds

    with MemoryWatch() as memory:
        wall, cpu = time.perf_counter(), time.process_time()
        predict_seconds = run()
        figures = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    figures["predict_seconds"] = predict_seconds
    figures["peak_mb"] = read_peak_mb()
    figures["memory_growth"] = memory.measure_growth()
    print(json.dumps(figures))


def load_predict(contender: str, folder: Path) -> Any:
    """A function from a frame to the probabilities of churn."""
    import numpy as np

    if contender == "pyfunc":
        import mlflow

        model = mlflow.pyfunc.load_model(str(folder / "mlflow"))
        return lambda frame: np.asarray(model.predict(frame))[:, 1]
    import mlflow.sklearn

    pipeline = mlflow.sklearn.load_model(str(folder / "mlflow"))
    # of all rows at once it would take half as long again
    return lambda frame: np.concatenate(
        [pipeline.predict_proba(frame[start : start + SLICE_ROWS])[:, 1] for start in range(0, len(frame), SLICE_ROWS)]
    )


def read_peak_mb() -> float:
    """This program's own peak: that of getrusage begins with its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


class MemoryWatch:
    """Resident memory over time."""

    def __enter__(self) -> MemoryWatch:
        self._pages: list[int] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def measure_growth(self) -> float:
        """The most in the last quarter of the time over the most in the second."""
        quarter = max(1, len(self._pages) // 4)
        return max(self._pages[-quarter:]) / max(self._pages[quarter : 2 * quarter] or self._pages)

    def _watch(self) -> None:
        while True:
            self._pages.append(int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]))
            if self._stopping.wait(0.1):
                return


# --- measuring --------------------------------------------------------------------------------------------------------


def describe_command(contender: str, model: str, work: Path, threads: int, *extra: str) -> list[str]:
    command = [sys.executable, __file__, "--contender", contender, "--model", model, "--work", str(work)]
    return [*command, "--threads", str(threads), *extra]


def build_environment(threads: int) -> dict[str, str]:
    from closedloop.config.environment import TELEMETRY_OFF, THREADS

    limits = {"OMP_NUM_THREADS": str(threads), "LOKY_MAX_CPU_COUNT": str(threads)}
    return {**os.environ, **TELEMETRY_OFF, **THREADS, **limits}


def measure(contender: str, model: str, work: Path, threads: int) -> dict[str, float]:
    """Run a contender once, in a process of its own."""
    print(f"  {model}: {contender} ...", file=sys.stderr, flush=True)
    command = describe_command(contender, model, work, threads)
    done = run_process(command, check=True, stdout=subprocess.PIPE, text=True, env=build_environment(threads))
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def kill_and_resume(model: str, work: Path, rows: int, threads: int) -> bool:
    """Whether a run that is killed half-way and resumed writes the same bytes as the one before."""
    from closedloop.scoring.batch import CHUNK_ROWS

    print(f"  {model}: batch, killed half-way and resumed ...", file=sys.stderr, flush=True)
    output = work / OUTPUT.format(contender="batch", model=model)
    before = hashlib.file_digest(output.open("rb"), "sha256").digest()
    output.unlink()
    parts = work / f".{output.name}.batch"
    environment = build_environment(threads)
    process = start_process(describe_command("batch", model, work, threads), env=environment)
    while process.poll() is None and len(list(parts.glob("*.part"))) < rows / CHUNK_ROWS / 2:
        time.sleep(0.05)
    process.kill()
    if process.wait() != -signal.SIGKILL or output.exists():
        raise SystemExit("the run was over before it could be killed: take more rows")
    finished = len(list(parts.glob("*.part")))
    run_process(describe_command("batch", model, work, threads, "--resume"), check=True, env=environment)
    print(f"  killed after {finished} parts", file=sys.stderr, flush=True)
    return hashlib.file_digest(output.open("rb"), "sha256").digest() == before


def compare_scores(model: str, work: Path) -> dict[str, float]:
    """Largest differences of the batch: to the pipelines, and to rows that are scored alone as the service does."""
    import numpy as np
    import pyarrow.parquet as pq

    from closedloop.serving.models import load_model

    found = {name: work / OUTPUT.format(contender=name, model=model) for name in CONTENDERS}
    columns = {
        name: pq.read_table(path, columns=["score", "decision"]) for name, path in found.items() if path.exists()
    }
    scores = {name: table["score"].to_numpy() for name, table in columns.items()}
    decisions = {name: table["decision"].to_numpy() for name, table in columns.items()}
    loaded = load_model(work / model, version="1", folder_sha256=None)
    places = np.linspace(0, len(scores["batch"]) - 1, 5000).astype(int)
    rows = pq.read_table(work / "input.parquet", columns=list(loaded.contract.feature_names)).take(places).to_pylist()
    alone = np.array([loaded.scorer.score(loaded.rules.pack_named([row]))[0] for row in rows])
    worst = {"alone": float(np.abs(scores["batch"][places] - alone).max())}
    worst["decisions_alone"] = int((decisions["batch"][places] != (alone >= loaded.contract.threshold)).sum())
    for name in scores.keys() - {"batch"}:
        worst[name] = float(np.abs(scores["batch"] - scores[name]).max())
        worst[f"decisions_{name}"] = int((decisions["batch"] != decisions[name]).sum())
    return worst


def judge(figures: dict[str, Any], *, resumed: bool) -> list[Target]:
    """The targets."""
    default, forest = figures[DEFAULT]["contenders"], figures[FOREST]["contenders"]
    differences = [figures[model]["differences"] for model in (DEFAULT, FOREST)]

    def ratio(runs: dict[str, Any], other: str, key: str = "wall_seconds") -> float:
        value: float = runs[other][key] / runs["batch"]["wall_seconds"]
        return value

    return [
        Target("default model: throughput of mlflow.pyfunc's", ratio(default, "pyfunc"), ">=", PYFUNC_LIMIT),
        Target("forest: throughput of scikit-learn's, file to file", ratio(forest, "sklearn"), ">=", FOREST_LIMIT),
        Target(
            "forest: all of it, of predict_proba alone in memory",
            ratio(forest, "sklearn", "predict_seconds"),
            ">=",
            FOREST_LIMIT,
        ),
        Target("peak memory, MB", max(runs["batch"]["peak_mb"] for runs in (default, forest)), "<=", MEMORY_MB_LIMIT),
        Target(
            "memory in the last quarter of that in the second",
            max(runs["batch"]["memory_growth"] for runs in (default, forest)),
            "<=",
            GROWTH_LIMIT,
        ),
        Target("score against the row alone", max(found["alone"] for found in differences), "<=", SCORE_LIMIT),
        Target("decisions unlike the row's alone", max(found["decisions_alone"] for found in differences), "<=", 0),
        Target(
            "score against the pipeline",
            max(value for found in differences for name, value in found.items() if name in CONTENDERS),
            "<=",
            PIPELINE_LIMIT,
        ),
        Target("killed half-way and resumed: same bytes", float(resumed), ">=", 1),
    ]


def show(rows: int, figures: dict[str, Any], targets: list[Target]) -> None:
    """Tables for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for model, found in figures.items():
        title = f"{model} model, {rows:,} rows, logging off on all sides"
        table = Table("contender", "wall s", "of it predict", "CPU s", "rows/s", "peak MB", title=title)
        for name, run in found["contenders"].items():
            predict = f"{run['predict_seconds']:.1f}" if run["predict_seconds"] else ""
            rate = f"{rows / run['wall_seconds']:,.0f}"
            cells = f"{run['wall_seconds']:.1f}", predict, f"{run['cpu_seconds']:.1f}", rate, f"{run['peak_mb']:.0f}"
            table.add_row(name, *cells)
        console.print(table)
    show_targets(targets)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="the fastest run counts, the largest peak")
    parser.add_argument("--project", type=Path, default=ROOT, help="a project folder in which `make run` has run")
    parser.add_argument("--temp-directory", type=Path)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    for hidden in ("--contender", "--model", "--work"):
        parser.add_argument(hidden, type=Path if hidden == "--work" else str, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    threads = arguments.threads
    if arguments.contender:
        run_contender(arguments.contender, arguments.model, arguments.work, threads, resume=arguments.resume)
        return 0
    require_project(parser, arguments.project)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="batch-", dir=arguments.temp_directory) as folder:
        work = Path(folder)
        prepare(arguments.project, work, arguments.rows, threads)
        for model, names in ((DEFAULT, ("batch", "pyfunc")), (FOREST, ("batch", "sklearn"))):
            runs: dict[str, dict[str, float]] = {}
            for _ in range(arguments.repeats):  # by turns, so that a busy minute of the machine hits both
                for name in names:
                    run = measure(name, model, work, threads)
                    best = min(runs.get(name, run), run, key=lambda found: found["wall_seconds"])
                    runs[name] = {**best, "peak_mb": max(runs.get(name, run)["peak_mb"], run["peak_mb"])}
            figures[model] = {"contenders": runs, "differences": compare_scores(model, work)}
        resumed = kill_and_resume(DEFAULT, work, arguments.rows, threads)
    targets = judge(figures, resumed=resumed)
    show(arguments.rows, figures, targets)
    return finish(arguments, ("rows", "threads", "repeats"), {"models": figures}, targets)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
