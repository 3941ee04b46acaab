"""How many cores answer and store so many predictions a day: a measured store, a simulated queue, a simulated day.

    python benchmarks/capacity.py                           SQLite in a temporary folder
    python benchmarks/capacity.py --store postgresql://...  an empty database of one's own
    python benchmarks/capacity.py --request-us 123          CPU time of a request, from docs/serving.md (76: inline)
    python benchmarks/capacity.py --json FILE               also write every figure

Measured: rows a CPU second that one agent stores, and bytes a row. Simulated: requests that arrive at random at the
day's peak, for as many workers as keep the wait of 99 in 100 below a limit (a worker answers one after the other; times
are exponential, which is worse than measured); and the day's spool, where fewer rows are stored than come in.
Exit status 1 and the name of the first missed target.
"""

from __future__ import annotations

import argparse
import datetime as dt
import heapq
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
from parts.targets import Target, finish, show, show_targets

from closedloop.processes import exit_on_signals
from closedloop.records import Prediction
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions

MILLIONS_A_DAY, PEAK, DAY_SECONDS = (1, 100, 10_000), 3.0, 86_400
ROWS, BATCH_ROWS, FEATURES = 40_000, 2_000, 20
WAIT_MS, REQUESTS, SPARE = 10.0, 100_000, 0.7
RATE_MIN = 2_000.0


def measure_store(address: str, size: Path | None) -> tuple[float, float | None]:
    """Rows that are stored a CPU second of this process, and bytes a row, of a file."""
    database = Database(address)
    database.upgrade()
    before, began = size.stat().st_size if size else 0, resource.getrusage(resource.RUSAGE_SELF)
    for first in range(0, ROWS, BATCH_ROWS):
        Predictions(database).insert([make_prediction(number) for number in range(first, first + BATCH_ROWS)])
    used = resource.getrusage(resource.RUSAGE_SELF)
    database.close()
    seconds = used.ru_utime + used.ru_stime - began.ru_utime - began.ru_stime
    return ROWS / seconds, (size.stat().st_size - before) / ROWS if size else None


def make_prediction(number: int) -> Prediction:
    """A prediction such as the service writes."""
    return Prediction(
        prediction_id=f"{number:048x}",
        request_id=f"{number:032x}",
        model_name="shop_churn",
        model_version="1",
        variant="champion",
        source="http",
        predicted_at=dt.datetime(2025, 1, 1, tzinfo=dt.UTC) + dt.timedelta(milliseconds=number),
        features=tuple(round(number * 0.37 % (place + 2), 4) for place in range(FEATURES)),
        score=number % 997 / 997,
        decision=int(number % 5 == 0),
        latency_ms=1.5,
        customer_id=f"C{number:08}",
    )


def find_workers(rate: float, seconds: float) -> int:
    """The fewest workers that keep the wait of 99 in 100 requests below the limit, and are not busier than `SPARE`.

    >>> find_workers(100.0, 0.001)
    1
    """
    workers = max(1, int(np.ceil(rate * seconds / SPARE)))
    while simulate_wait(rate, seconds, workers) > WAIT_MS / 1000:
        workers += 1
    return workers


def simulate_wait(rate: float, seconds: float, workers: int) -> float:
    """The 99th percentile of the wait of requests for one of ``workers``, seconds."""
    draw = np.random.default_rng(7)
    arrivals = np.cumsum(draw.exponential(1 / rate, REQUESTS))
    takes = draw.exponential(seconds, REQUESTS)
    free, waits = [0.0] * workers, np.empty(REQUESTS)
    for number, (at, long) in enumerate(zip(arrivals, takes, strict=True)):
        start = max(at, heapq.heappop(free))
        waits[number] = start - at
        heapq.heappush(free, start + long)
    return float(np.quantile(waits[REQUESTS // 10 :], 0.99))


def simulate_spool(mean: float, stored: float) -> float:
    """The most rows that wait on a day whose rate swings by a sine up to its peak, where ``stored`` go a second."""
    moments = np.arange(0, 2 * DAY_SECONDS, 60)
    rates = mean * np.maximum(0.05, 1 + (PEAK - 1) * np.sin(2 * np.pi * moments / DAY_SECONDS))
    rates *= mean / rates.mean()
    waiting = most = 0.0
    for rate in rates:
        waiting = max(0.0, waiting + 60 * (rate - stored))
        most = max(most, waiting)
    return most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store")
    parser.add_argument("--request-us", type=float, default=76.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = None if arguments.store else Path(folder) / "store.db"
        rows_a_second, row_bytes = measure_store(arguments.store or f"sqlite:///{file}", file)
    rows = {}
    for millions in MILLIONS_A_DAY:
        mean = millions * 1e6 / DAY_SECONDS
        workers = find_workers(PEAK * mean, arguments.request_us / 1e6)
        agents = int(np.ceil(1.2 * mean / rows_a_second))
        waits = simulate_spool(mean, agents * rows_a_second)
        grows = "?" if row_bytes is None else f"{millions * 1e6 * row_bytes / 1e9:,.1f}"
        rows[f"{millions:,} million"] = [
            f"{mean:,.0f}", f"{PEAK * mean:,.0f}", f"{workers}", f"{agents}", f"{waits:,.0f}", grows,
        ]  # fmt: skip
    print(f"one agent stores {rows_a_second:,.0f} rows a CPU second, {row_bytes or float('nan'):,.0f} bytes each")
    columns = ["a day", "a second", "at peak", "workers", "agents", "rows that wait at most", "GB a day"]
    show("Capacity", columns, rows)
    targets = [Target("rows stored a CPU second", rows_a_second, ">=", RATE_MIN)]
    show_targets(targets)
    figures = {"rows_a_cpu_second": rows_a_second, "row_bytes": row_bytes, "days": rows}
    return finish(arguments, ("request_us",), figures, targets)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
