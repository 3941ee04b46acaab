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
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEFAULT, FOREST = "default", "forest"
FOREST_PARAMS = {"n_estimators": 100, "max_depth": 10}
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
    import numpy as np
    import pandas as pd

    from closedloop.adapters.skops import load_pipeline
    from closedloop.contract import read_contract
    from closedloop.core.estimators import build_pipeline, round_thresholds

    folder = project / "models/candidate"
    contract = read_contract(folder)
    names = list(contract.feature_names)
    training = pd.read_parquet(project / "data/training/train.parquet")
    print(f"{rows:,} rows: generating", file=sys.stderr, flush=True)
    generate(work / "input.parquet", contract, training, rows)
    write_model(work / DEFAULT, load_pipeline(project / "models/pipeline/pipeline.skops"), contract, training[names])
    forest = build_pipeline(
        contract.features,
        model_type="random_forest",
        model_params={**FOREST_PARAMS, "n_jobs": threads},
        normalize=False,
        feature_selection=None,
        seed=7,
    )
    forest.fit(training[names], training["churned"].to_numpy(dtype=np.bool_))
    write_model(work / FOREST, round_thresholds(forest), contract, training[names])


def generate(path: Path, contract: Any, training: Any, rows: int) -> None:
    """Training rows, drawn at random; amounts vary so that hardly any two rows are alike."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(20_250_101)
    writer = None
    for start in range(0, rows, 250_000):
        count = min(250_000, rows - start)
        drawn = training.iloc[rng.integers(0, len(training), count)]
        columns: dict[str, Any] = {"customer_id": [f"C{number:08d}" for number in range(start, start + count)]}
        for feature in contract.features:
            values = drawn[feature.name].to_numpy()
            if feature.kind == "numeric" and any(word in feature.name for word in ("sum", "mean", "income")):
                values = (values * rng.uniform(0.95, 1.05, count)).clip(feature.minimum, feature.maximum)
            columns[feature.name] = values
        table = pa.Table.from_pydict({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def write_model(folder: Path, pipeline: Any, contract: Any, training: Any) -> None:
    """A pipeline as a contract folder and as an MLflow model."""
    import mlflow
    import pandas as pd
    from mlflow.models import infer_signature

    from closedloop.adapters.onnx import export_model
    from closedloop.adapters.skops import TRUSTED_TYPES
    from closedloop.contract import CONTRACT_FILE, MODEL_FILE, REFERENCE_FILE, digest_file

    folder.mkdir(parents=True)
    export_model(pipeline, folder / MODEL_FILE, len(contract.features))
    training.head(1000).to_parquet(folder / REFERENCE_FILE)
    golden = pd.DataFrame([row.features for row in contract.golden_rows])
    scores = pipeline.predict_proba(golden)[:, 1]
    rows = [row.model_copy(update={"score": score}) for row, score in zip(contract.golden_rows, scores, strict=True)]
    changed = {"model_sha256": digest_file(folder / MODEL_FILE), "golden_rows": tuple(rows), "threshold": 0.5}
    (folder / CONTRACT_FILE).write_text(contract.model_copy(update=changed).model_dump_json(), encoding="utf-8")
    mlflow.sklearn.save_model(
        pipeline,
        folder / "mlflow",
        signature=infer_signature(training.head(100), pipeline.predict_proba(training.head(100))),
        serialization_format="skops",
        skops_trusted_types=TRUSTED_TYPES,
        pyfunc_predict_fn="predict_proba",
        pip_requirements=["scikit-learn"],
    )


# --- contenders -------------------------------------------------------------------------------------------------------


def run_contender(contender: str, model: str, work: Path, threads: int, *, resume: bool) -> None:
    """In the child: import and load first, then time the work; prints its figures."""
    import pandas as pd

    output = work / OUTPUT.format(contender=contender, model=model)
    if contender == "batch":
        from closedloop.serving.batch import BatchOptions, score_batch
        from closedloop.serving.slots import Slot

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
    from closedloop.environment import TELEMETRY_OFF, THREADS

    limits = {"OMP_NUM_THREADS": str(threads), "LOKY_MAX_CPU_COUNT": str(threads)}
    return {**os.environ, **TELEMETRY_OFF, **THREADS, **limits}


def measure(contender: str, model: str, work: Path, threads: int) -> dict[str, float]:
    """Run a contender once, in a process of its own."""
    print(f"  {model}: {contender} ...", file=sys.stderr, flush=True)
    command = describe_command(contender, model, work, threads)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=build_environment(threads))
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def kill_and_resume(model: str, work: Path, rows: int, threads: int) -> bool:
    """Whether a run that is killed half-way and resumed writes the same bytes as the one before."""
    from closedloop.serving.batch import CHUNK_ROWS

    print(f"  {model}: batch, killed half-way and resumed ...", file=sys.stderr, flush=True)
    output = work / OUTPUT.format(contender="batch", model=model)
    before = hashlib.file_digest(output.open("rb"), "sha256").digest()
    output.unlink()
    parts = work / f".{output.name}.batch"
    environment = build_environment(threads)
    process = subprocess.Popen(describe_command("batch", model, work, threads), env=environment)
    while process.poll() is None and len(list(parts.glob("*.part"))) < rows / CHUNK_ROWS / 2:
        time.sleep(0.05)
    process.kill()
    if process.wait() != -signal.SIGKILL or output.exists():
        raise SystemExit("the run was over before it could be killed: take more rows")
    finished = len(list(parts.glob("*.part")))
    subprocess.run(describe_command("batch", model, work, threads, "--resume"), check=True, env=environment)
    print(f"  killed after {finished} parts", file=sys.stderr, flush=True)
    return hashlib.file_digest(output.open("rb"), "sha256").digest() == before


def compare_scores(model: str, work: Path) -> dict[str, float]:
    """Largest differences of the batch: to the pipelines, and to rows that are scored alone as the service does."""
    import numpy as np
    import pyarrow.parquet as pq

    from closedloop.contract import encode_row
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
    alone = np.array([loaded.scorer.score(encode_row(loaded.contract.features, row))[0] for row in rows])
    worst = {"alone": float(np.abs(scores["batch"][places] - alone).max())}
    worst["decisions_alone"] = int((decisions["batch"][places] != (alone >= loaded.contract.threshold)).sum())
    for name in scores.keys() - {"batch"}:
        worst[name] = float(np.abs(scores["batch"] - scores[name]).max())
        worst[f"decisions_{name}"] = int((decisions["batch"] != decisions[name]).sum())
    return worst


def judge(figures: dict[str, Any], *, resumed: bool) -> list[dict[str, Any]]:
    """The targets."""
    default, forest = figures[DEFAULT]["contenders"], figures[FOREST]["contenders"]
    differences = [figures[model]["differences"] for model in (DEFAULT, FOREST)]

    def ratio(runs: dict[str, Any], other: str, key: str = "wall_seconds") -> float:
        value: float = runs[other][key] / runs["batch"]["wall_seconds"]
        return value

    targets = [
        ("default model: throughput of mlflow.pyfunc's", ratio(default, "pyfunc"), ">=", PYFUNC_LIMIT),
        ("forest: throughput of scikit-learn's, file to file", ratio(forest, "sklearn"), ">=", FOREST_LIMIT),
        (
            "forest: all of it, of predict_proba alone in memory",
            ratio(forest, "sklearn", "predict_seconds"),
            ">=",
            FOREST_LIMIT,
        ),
        ("peak memory, MB", max(runs["batch"]["peak_mb"] for runs in (default, forest)), "<=", MEMORY_MB_LIMIT),
        (
            "memory in the last quarter of that in the second",
            max(runs["batch"]["memory_growth"] for runs in (default, forest)),
            "<=",
            GROWTH_LIMIT,
        ),
        ("score against the row alone", max(found["alone"] for found in differences), "<=", SCORE_LIMIT),
        ("decisions unlike the row's alone", max(found["decisions_alone"] for found in differences), "<=", 0),
        (
            "score against the pipeline",
            max(value for found in differences for name, value in found.items() if name in CONTENDERS),
            "<=",
            PIPELINE_LIMIT,
        ),
        ("killed half-way and resumed: same bytes", float(resumed), ">=", 1),
    ]
    return [
        {
            "target": name,
            "value": value,
            "limit": f"{sign} {limit}",
            "met": value >= limit if sign == ">=" else value <= limit,
        }
        for name, value, sign, limit in targets
    ]


def show(rows: int, figures: dict[str, Any], targets: list[dict[str, Any]]) -> None:
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
    table = Table("target", "value", "limit", "met")
    for target in targets:
        table.add_row(target["target"], f"{target['value']:.3g}", target["limit"], "yes" if target["met"] else "NO")
    console.print(table)


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
    if not (arguments.project / "models/pipeline/pipeline.skops").is_file():
        parser.error(f"{arguments.project}: there is no trained model; run `make run` first, or name a --project")
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
    if arguments.json:
        machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
        settings = {key: getattr(arguments, key) for key in ("rows", "threads", "repeats")}
        report = {"settings": settings, "machine": machine, "models": figures, "targets": targets}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    missed = [target["target"] for target in targets if not target["met"]]
    if missed:
        print(f"missed: {missed[0]}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
