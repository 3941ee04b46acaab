"""``python -m tests.soak.stream [EVENTS]``: the stream test's scenario with 100,000 events, and its figures."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from closedloop.processes import exit_on_signals
from tests.integration.test_stream import Place, check_store, run_scenario
from tests.kafka import run_kafka


def main() -> None:
    """Run it once."""
    events = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with run_kafka() as cluster, tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), cluster, partitions=8, batch_size=500)
        try:
            started = time.monotonic()
            answers = run_scenario(place, events)
            seconds = time.monotonic() - started
            check_store(place, answers)
        finally:
            place.close()
        written = len(place.read(place.output, "read_uncommitted"))
        print(f"{events} events: {len(answers)} answers, {events - len(answers)} dead letters, each event once")
        print(f"answers written {written}, of which {written - len(answers)} in transactions that were aborted")
        print(f"predictions in the store: {len(answers)}; {seconds:.0f} s with a rebalance, a kill -9 and a restart")
        reports = [line.split('"message": ')[1] for worker in place.workers for line in worker.log.splitlines()]
        print(*[report for report in reports if "transactions in" in report], sep="\n")


if __name__ == "__main__":
    exit_on_signals()
    main()
