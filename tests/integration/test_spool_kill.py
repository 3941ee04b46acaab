"""kill -9 of who writes and of who drains, on a real store: what was answered is there once, whatever died when."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from closedloop.processes import start_process
from closedloop.records import Outcome, Prediction
from closedloop.serving.log.drain import DRAIN_LOCK_FILE
from closedloop.serving.log.progress import PROGRESS_FILE
from closedloop.serving.log.segments import list_spools
from closedloop.serving.log.spool import SpoolWriter
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from tests.drains import drain_once

pytestmark = pytest.mark.thorough

WRITE = """
import datetime as dt, itertools, os, sys
from pathlib import Path
from closedloop.records import Prediction
from closedloop.serving.log.spool import SpoolWriter

writer = SpoolWriter(Path(sys.argv[1]), segment_bytes=200_000)
writer.start_syncing(10)
now, features = dt.datetime.now(dt.UTC), (0.5,) * 30
for number in itertools.count():
    ids = [f"{os.getpid()}-{number}-{row}" for row in range(1 + number * 7 % 60)]
    writer.append([
        Prediction(one, "r", "shop", "7", "champion", "http", now, features, 0.25, 0, 1.0) for one in ids
    ])
    print(*ids, flush=True)
"""


def read_ids(store: Predictions) -> Counter[str]:
    return Counter(found.prediction_id for some in store.read_predictions("shop") for found in some)


def write_until_killed(root: Path, name: str, batches: int, store: Predictions) -> tuple[list[str], int]:
    """The ids that a writer reported before it was killed in full flight, and how many a drain took meanwhile."""
    process = start_process([sys.executable, "-c", WRITE, str(root / name)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    reported: list[str] = []
    drained = 0
    for batch in range(batches):
        reported += process.stdout.readline().split()
        if batch == batches // 2:
            drained = drain_once(root, store, "shop", batch_rows=100).rows
    process.kill()
    with process.stdout:
        *whole, _torn = process.stdout.read().split("\n")  # what stood in the pipe; the last report may be torn itself
    assert process.wait() == -signal.SIGKILL
    return [*reported, *" ".join(whole).split()], drained


def test_every_answer_of_ten_killed_writers_is_stored_once(tmp_path, store):
    root = tmp_path / "spool"
    reported: list[str] = []
    drained = 0
    for kill in range(10):
        ids, rows = write_until_killed(root, f"worker-{kill}", batches=10 + 13 * kill, store=store)
        reported += ids
        drained += rows
        if kill % 3 == 0:
            drained += drain_once(root, store, "shop").rows
    result = drain_once(root, store, "shop")
    found = read_ids(store)
    assert len(reported) > 10_000
    assert set(reported) <= found.keys()
    assert set(found.values()) == {1}
    assert len(found) == drained + result.rows  # none was offered to the store twice
    assert len(found) - len(reported) <= 10 * 2 * 60  # at most what was being written and reported at each kill
    assert (result.corrupt, result.problems, result.depth_bytes) == (0, [], 0)
    assert list_spools(root) == []


DRAIN = """
import os, shutil, sys
from collections import Counter
from itertools import count
from pathlib import Path
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from closedloop.serving.log import drain
from closedloop.store.database import Database

folder = Path(sys.argv[1])

def drain_until(step, case):
    visits = Counter()
    steps = 0
    def trace(frame, event, _):
        nonlocal steps
        if frame.f_code.co_filename != drain.__file__:
            return None
        visits[frame.f_lineno] += event == "line"
        steps += event == "line" and visits[frame.f_lineno] <= 2
        if steps == step:
            os._exit(9)  # no cleaning up, as by a kill
        return trace
    store = Predictions(Database(f"sqlite:///{case / 'operations.db'}"))
    sys.settrace(trace)
    drain.drain_once(case / "spool", store, "shop")
    os._exit(0)

first = Predictions(Database(f"sqlite:///{folder / 'template' / 'operations.db'}"))
first.read_position("shop", "none")  # loads what every child needs
first.database.close()
for step in count(1):
    case = folder / f"{step}"
    shutil.copytree(folder / "template", case)
    child = os.fork()
    if not child:
        drain_until(step, case)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        break
    assert status == 9, status
"""
NOW = dt.datetime.now(dt.UTC)


def make_prediction(name: str, score: float = 0.25) -> Prediction:
    return Prediction(name, "r", "shop", "7", "champion", "http", NOW, (0.5, None), score, 0, 1.0)


def fill_spools(root: Path) -> None:
    """Two dead writers' spools with everything that can stand in one."""
    one = SpoolWriter(root / "one", segment_bytes=1)
    one.append([Outcome("b", 1, NOW), make_prediction("a")])
    one.append([make_prediction("impossible", score=2.0)])
    one.close()
    two = SpoolWriter(root / "two", segment_bytes=1_000_000)
    two.append([make_prediction("b"), Outcome("a", 1, NOW), Outcome("nobody", 1, NOW)])
    two.close()
    with (root / "two" / "00000001.log").open("ab") as stream:
        stream.write(b"damaged\ntorn")


def test_a_drain_killed_at_any_of_its_lines_loses_and_doubles_nothing(tmp_path):
    template = tmp_path / "template"
    store = Predictions(Database(f"sqlite:///{template / 'operations.db'}"))
    store.database.upgrade()
    store.database.close()
    fill_spools(template / "spool")
    subprocess.run([sys.executable, "-c", DRAIN, str(tmp_path)], check=True)
    cases = [path for path in tmp_path.iterdir() if path != template]
    assert len(cases) > 100
    for case in cases:
        check_case(case)


def check_case(case: Path) -> None:
    store = Predictions(Database(f"sqlite:///{case / 'operations.db'}"))
    drain_once(case / "spool", store, "shop")
    assert read_ids(store) == {"a": 1, "b": 1}, case.name
    with contextlib.closing(sqlite3.connect(case / "operations.db")) as connection:
        outcomes = connection.execute("SELECT prediction_id, outcome FROM outcomes").fetchall()
    assert sorted(outcomes) == [("a", 1), ("b", 1), ("nobody", 1)], case.name
    spool = case / "spool"
    entries = [json.loads(line) for path in spool.glob("*.log.quarantine") for line in path.read_text().splitlines()]
    reasons = Counter(entry["reason"].split(":")[0] for entry in entries)
    assert reasons == {"the checksum is wrong": 1, "CHECK constraint failed": 1}, case.name
    left = {path.name for path in spool.iterdir() if not path.name.startswith(".")}
    left -= {path.name for path in spool.glob("*.log.quarantine")}
    assert left - {PROGRESS_FILE} == {DRAIN_LOCK_FILE}, case.name
    store.database.close()
