"""``python -m tests.soak.serving [MINUTES]``: the service under mixed load, right and wrong, and its memory over time.

It fails if a request that was right was not answered 200, a wrong one was not refused, an answer is not in the store
once, or the server's memory grows by over 1 MB a minute in the second half.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from closedloop.processes import exit_on_signals
from tests.conftest import create_project
from tests.e2e.test_serving_input import CASES, exchange
from tests.http_service import Load, run_service, wait_until
from tests.model_folders import write_model_folder

NAME = "shop_churn"
SLOPE_MB_MAX = 1.0  # a minute
EVERY_SECONDS = 5.0


def read_memory_mb(pid: int) -> float:
    """Proportional set size of what is a process's own: files' pages count for more when others that have them end."""
    found = re.search(r"^Pss_Anon:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def count_stored(path: Path) -> tuple[int, int]:
    """Rows, and different request ids, in the operations store."""
    with closing(sqlite3.connect(path)) as store:
        rows: tuple[int, int] = store.execute("SELECT count(*), count(DISTINCT request_id) FROM predictions").fetchone()
    return rows


def main() -> None:
    """Run it once, and print the figures."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    draw = random.Random(0)  # noqa: S311 - a fixed load
    with tempfile.TemporaryDirectory() as folder:
        root = create_project(Path(folder) / "project").root
        model = write_model_folder(Path(folder) / "model", model_name=NAME)
        with run_service(root, "--model", str(model)) as service:
            assert service.process is not None
            times, sizes, odd, odd_answered = [], [], 0, 0
            start = time.monotonic()
            with Load(service, keep=False) as load:
                while time.monotonic() - start < 60 * minutes:
                    times.append((time.monotonic() - start) / 60)
                    sizes.append(read_memory_mb(service.process.pid))
                    until = time.monotonic() + EVERY_SECONDS
                    while time.monotonic() < until:
                        name = draw.choice([*CASES])
                        request, status, _ = CASES[name]
                        statuses, found = exchange(service, request)
                        assert statuses == [status], (name, found)
                        odd += 1
                        odd_answered += status == 200  # each of them at /predict, and so a prediction
            assert load.failures == [], load.failures[:3]
            answered = len(load.answers) + odd_answered
            path = root / "state/operations.db"
            wait_until(lambda: service.read_metric('prediction_rows_total{result="stored"}') > 0, "a first row stored")
            wait_until(lambda: count_stored(path)[0] >= answered, "all answers in the store")
            wait_until(lambda: service.read_metric("spool_depth_bytes") == 0, "an empty spool")
            rows, different = count_stored(path)
            log = service.read_log()
    half = len(times) // 2
    slope = float(np.polyfit(times[half:], sizes[half:], 1)[0])
    figures = {
        "minutes": minutes, "answered": answered, "odd_requests": odd, "odd_answered": odd_answered,
        "rows_stored": rows, "ids_stored": different,
        "memory_mb": {"first": sizes[0], "half": sizes[half], "last": sizes[-1], "most": max(sizes)},
        "slope_mb_a_minute": slope, "tracebacks": log.count("Traceback"),
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    assert rows == different == answered, "an answer is not in the store once, or what nobody was answered is"
    assert slope <= SLOPE_MB_MAX, f"memory grows by {slope:.2f} MB a minute, at most {SLOPE_MB_MAX} are allowed"
    assert "Traceback" not in log


if __name__ == "__main__":
    exit_on_signals()
    main()
