"""From score to action: what reasons cost and how exact they are, and how often money is judged wrongly.

    python benchmarks/actions.py               24,000 rows, the shop's size, one row 300 times, 2,000 releases
    python benchmarks/actions.py --rows N      another size of the batch
    python benchmarks/actions.py --runs N      another number of simulated releases
    python benchmarks/actions.py --json FILE   also write every figure

The model is the project's own (`make run` first, by this release), which is the shipped default. A batch reads a
Parquet file, logs its predictions in a SQLite file and writes three reasons a row; with and without reasons take turns,
and the ratio is of CPU time, since a machine may be busy.
Contributions are compared with `shap.TreeExplainer` on 1,000 rows where `shap` can be imported; the lock does not have
it, as it needs a compiler of its own (numba).
Money (`parts/money.py`): the threshold of `model.threshold: profit` beside a search of all, on the test rows; and
releases of equal models and of one that ranks better and earns less, 30 daily looks each, through `decide_step`.
Exit status 1 and the name of the first missed target.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from parts.models import draw_rows, require_project
from parts.money import measure_money
from parts.targets import Target, finish, show_targets

from closedloop.processes import exit_on_signals

ROOT = Path(__file__).parent.parent
BATCH_LIMIT, SINGLE_MS_LIMIT, SUM_LIMIT, LIBRARY_LIMIT = 2.0, 5.0, 1e-4, 1e-4
SINGLE_ROWS, SUM_ROWS, LIBRARY_ROWS, TURNS = 300, 10_000, 1_000, 3


def draw_matrix(model: Any, training: Any, rows: int) -> tuple[Any, np.ndarray]:
    """Rows as a frame with ids, and packed."""
    import pandas as pd

    from closedloop.core.training.estimators import encode_frame

    drawn = draw_rows(model.contract, training, rows, np.random.default_rng(20_250_101))
    frame = pd.DataFrame(drawn)
    frame.insert(0, "customer_id", [f"C{number:08d}" for number in range(rows)])
    return frame, encode_frame(model.contract.features, frame)


def measure_batch(folder: Path, frame: Any, work: Path) -> float:
    """CPU time with reasons over CPU time without, by turns, each from a new model on a new store."""
    from closedloop.scoring.batch import BatchOptions, score_batch
    from closedloop.serving.slots.slots import Slot
    from closedloop.store.database import Database
    from closedloop.store.predictions import Predictions

    frame.to_parquet(work / "in.parquet", index=False)
    seconds: dict[int, list[float]] = {0: [], 3: []}
    for turn in range(TURNS):
        for reasons in seconds:
            database = Database(f"sqlite:///{work / f'{turn}-{reasons}.db'}")
            database.upgrade()
            options = BatchOptions(range_margin=1.0, id_key=b"key", store=Predictions(database), reasons=reasons)
            start = time.process_time()
            slot = Slot("1", str(folder), "")
            score_batch(str(work / "in.parquet"), str(work / "out.parquet"), slot, options, state_dir=work)
            seconds[reasons].append(time.process_time() - start)
            database.close()
    print(f"  batch of {len(frame):,}: CPU s without {seconds[0]}, with reasons {seconds[3]}", flush=True)
    return float(np.median(seconds[3]) / np.median(seconds[0]))


def measure_single(model: Any, matrix: np.ndarray) -> float:
    """Median milliseconds of wall time for the reasons of one row, after the first."""
    rows = [tuple(row) for row in matrix[:SINGLE_ROWS].tolist()]
    taken = []
    for place, values in enumerate(rows):
        start = time.perf_counter()
        model.explainer.explain(matrix[place : place + 1], [values], 3)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken) * 1e3)


def measure_sum(model: Any, pipeline: Any, frame: Any, matrix: np.ndarray) -> float:
    """The largest difference between base and contributions, and scikit-learn's raw score."""
    raw_scores = score_raw(pipeline, frame)
    found = model.explainer.base + model.explainer.weigh(matrix).sum(axis=1)
    return float(np.abs(found - raw_scores).max())


def score_raw(pipeline: Any, frame: Any) -> np.ndarray:
    inner = read_model(pipeline)
    prepared = pipeline[:-1].transform(frame)
    is_forest = hasattr(inner, "oob_score")
    return inner.predict_proba(prepared)[:, 1] if is_forest else inner.decision_function(prepared)


def read_model(pipeline: Any) -> Any:
    """The classifier without its calibration."""
    model = pipeline[-1]
    return model.estimator.estimator if hasattr(model, "calibrated_classifiers_") else model


def compare_with_library(model: Any, pipeline: Any, frame: Any) -> float | None:
    """The largest difference from `shap`'s values of the prepared columns; None where it cannot be imported."""
    try:
        import shap
    except ImportError:
        return None
    prepared = np.asarray(pipeline[:-1].transform(frame), dtype=np.float32)
    values = np.asarray(shap.TreeExplainer(read_model(pipeline)).shap_values(prepared, check_additivity=False))
    values = values[..., 1] if values.ndim == 3 else values
    return float(np.abs(model.explainer._shapley.weigh(prepared) - values).max())


def measure(project: Path, rows: int) -> dict[str, Any]:
    """All figures."""
    import pandas as pd

    from closedloop.adapters.skops import load_pipeline
    from closedloop.serving.models import load_model

    folder = project / "models/candidate"
    model = load_model(folder, version="1", folder_sha256=None)
    pipeline = load_pipeline(project / "models/pipeline/pipeline.skops", model.contract.model_type)
    training = pd.read_parquet(project / "data/training/train.parquet")
    frame, matrix = draw_matrix(model, training, max(rows, SUM_ROWS))
    with tempfile.TemporaryDirectory() as work:
        ratio = measure_batch(folder, frame.head(rows), Path(work))
    return {
        "single_ms": measure_single(model, matrix),
        "sum_difference": measure_sum(model, pipeline, frame.head(SUM_ROWS), matrix[:SUM_ROWS]),
        "library_difference": compare_with_library(model, pipeline, frame.head(LIBRARY_ROWS)),
        "batch_ratio": ratio,
    }


def score_test_rows(project: Path) -> tuple[Any, np.ndarray]:
    """The test rows and the model's scores of them."""
    import pandas as pd

    from closedloop.adapters.onnxruntime import OnnxScorer
    from closedloop.contract import MODEL_FILE, read_contract
    from closedloop.core.training.estimators import encode_frame

    test, folder = pd.read_parquet(project / "data/training/test.parquet"), project / "models/candidate"
    return test, OnnxScorer(folder / MODEL_FILE).score(encode_frame(read_contract(folder).features, test))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=ROOT)
    parser.add_argument("--rows", type=int, default=24_000)
    parser.add_argument("--runs", type=int, default=2_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    require_project(parser, arguments.project)
    found = measure(arguments.project, arguments.rows)
    targets = [
        Target("base and contributions, from the raw score", found["sum_difference"], "<=", SUM_LIMIT),
        Target("reasons of one row, ms", found["single_ms"], "<=", SINGLE_MS_LIMIT),
        Target("batch with reasons, of one without", found["batch_ratio"], "<=", BATCH_LIMIT),
    ]
    if found["library_difference"] is not None:
        targets.append(Target("contributions, from the library's", found["library_difference"], "<=", LIBRARY_LIMIT))
    money, more = measure_money(arguments.runs, *score_test_rows(arguments.project))
    targets += more
    show_targets(targets)
    return finish(arguments, ["rows", "runs"], found | {"money": money}, targets)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
