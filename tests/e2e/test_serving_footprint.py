"""What the serving process holds in memory: seen from inside as it ends, and from outside while it answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.http_service import run_service
from tests.model_folders import ROWS, write_model_folder

pytestmark = pytest.mark.thorough

HOOK = """
import atexit, os, sys
def write():
    with open(os.path.join({folder!r}, f"{{os.getpid()}}.txt"), "w") as file:
        file.write("\\n".join(sys.modules))
atexit.register(write)
"""
TRAINING = {"bentoml", "evidently", "feast", "great_expectations", "mlflow", "pandas", "pyarrow", "scipy", "sklearn"}
MEMORY_MB_MAX = 150


def read_memory_mb(process: int) -> float:
    """Proportional set size."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def test_the_worker_imports_no_training_library_and_stays_small(project, tmp_path):
    """With a bundled model and inline features."""
    write_model_folder(tmp_path / "model", model_name="shop_churn")
    hooks, seen = tmp_path / "hooks", tmp_path / "seen"
    hooks.mkdir()
    seen.mkdir()
    (hooks / "sitecustomize.py").write_text(HOOK.format(folder=str(seen)))
    with run_service(project.root, "--model", str(tmp_path / "model"), PYTHONPATH=str(hooks)) as service:
        worker = service.process.pid
        for row in ROWS:
            status, answer = service.call("POST", "/predict", {"features": row})
            assert status == 200
        assert service.call("POST", "/predict/batch", [{"features": row} for row in ROWS])[0] == 200
        outcome = {"prediction_id": answer["prediction_id"], "outcome": 1}
        assert service.call("POST", "/outcomes", outcome)[0] == 202
        assert service.call("GET", "/model/info")[0] == 200
        assert read_memory_mb(worker) <= MEMORY_MB_MAX
    own = set((seen / f"{worker}.txt").read_text().splitlines())  # the agent, which may import them, has its own
    assert {"numpy", "onnxruntime", "msgspec", "closedloop.serving.http.app"} <= own
    assert not own & TRAINING
