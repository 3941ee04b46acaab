"""Every record is stored exactly once, and what cannot be stored is somewhere to be looked at."""

from __future__ import annotations

import datetime as dt
import json
import os
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import pytest

from closedloop.errors import DataError, ServiceUnavailable
from closedloop.files import take_lock
from closedloop.records import Outcome, Prediction, Record
from closedloop.serving.log.drain import DRAIN_LOCK_FILE
from closedloop.serving.log.progress import PROGRESS_FILE, count_waiting, measure_waiting, read_progress
from closedloop.serving.log.spool import SpoolWriter
from closedloop.store.predictions import InsertResult, SpoolPosition
from tests.drains import drain_once

DAY_SECONDS = 24 * 60 * 60
NOW = dt.datetime.now(dt.UTC)
POISON = "poison"


def make_prediction(name: str) -> Prediction:
    return Prediction(name, "r1", "shop", "7", "champion", "http", NOW, (1.5, None, "basic"), 0.25, 0, 1.0)


def make_outcome(name: str, age: dt.timedelta = dt.timedelta()) -> Outcome:
    return Outcome(name, 1, NOW - age)


class FakeStore:
    """A store in memory that can die before or after any of its commits."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], Record] = {}
        self.positions: dict[str, SpoolPosition] = {}
        self.inserts: list[tuple[list[str], SpoolPosition | None]] = []
        self.on_insert: Callable[[], None] = lambda: None
        self.fail_at = 0
        self.steps = 0

    def insert(
        self,
        records: Sequence[Record],
        position: SpoolPosition | None = None,
        *,
        before_commit: Callable[[InsertResult], None] = lambda _: None,
    ) -> InsertResult:
        self._step()
        self.on_insert()
        refused = tuple((one.prediction_id, "poisonous") for one in records if one.prediction_id == POISON)
        new = {(type(one).__name__, one.prediction_id): one for one in records if one.prediction_id != POISON}
        stored = len(new.keys() - self.records.keys())
        result = InsertResult(stored, 0, len(records) - stored - len(refused), refused)
        before_commit(result)
        self._step()
        self.records = new | self.records
        if position is not None:
            self.positions[position.spool] = position
        self.inserts.append(([one.prediction_id for one in records], position))
        self._step()
        return result

    def read_position(self, model_name: str, spool: str) -> SpoolPosition | None:
        assert model_name == "shop"
        self._step()
        return self.positions.get(spool)

    def _step(self) -> None:
        self.steps += 1
        if self.steps == self.fail_at:
            raise ServiceUnavailable("the store is gone")

    @property
    def names(self) -> set[tuple[str, str]]:
        return set(self.records)


class Spools:
    """The spools of a test, each written by a writer that lives until it is told to die."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.writers: dict[str, SpoolWriter] = {}

    def write(self, name: str, *batches: Sequence[Record], segment_bytes: int = 1_000_000) -> None:
        if name not in self.writers:
            self.writers[name] = SpoolWriter(self.root / name, segment_bytes)
        for batch in batches:
            self.writers[name].append(batch)

    def die(self, name: str) -> None:
        self.writers.pop(name).close()

    def files(self) -> set[str]:
        found = [path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file()]
        return {str(path) for path in found if path.suffix != ".quarantine"} - {DRAIN_LOCK_FILE, PROGRESS_FILE}

    def quarantine(self) -> list[dict[str, str]]:
        found = sorted(self.root.glob("*.log.quarantine"))
        return [json.loads(line) for path in found for line in path.read_text().splitlines()]


@pytest.fixture
def spools(tmp_path):
    made = Spools(tmp_path / "spool")
    yield made
    for name in list(made.writers):
        made.die(name)


@pytest.fixture
def store():
    return FakeStore()


def test_all_spools_are_stored_and_those_of_the_dead_removed(spools, store):
    spools.write("dead", [make_prediction("a"), make_prediction("b")])
    spools.die("dead")
    spools.write("living", [make_prediction("c")])
    result = drain_once(spools.root, store, "shop")
    assert store.names == {("Prediction", "a"), ("Prediction", "b"), ("Prediction", "c")}
    assert store.records["Prediction", "a"] == make_prediction("a")
    assert (result.rows, result.refused, result.corrupt, result.torn, result.depth_bytes) == (3, 0, 0, 0, 0)
    assert result.problems == []
    assert spools.files() == {"living/00000001.log", "living/writer.lock"}
    assert not (spools.root / "dead").exists()


def test_a_spool_root_that_is_not_there_yet_is_empty(tmp_path, store):
    assert drain_once(tmp_path / "state" / "spool", store, "shop").rows == 0


def test_records_come_in_batches_each_with_its_position(spools, store):
    spools.write("living", [make_prediction(name) for name in "abcde"])
    line_bytes = (spools.root / "living/00000001.log").stat().st_size // 5
    batches = []
    drain_once(spools.root, store, "shop", batch_rows=2, report=lambda counts: batches.append(counts["stored"]))
    assert store.inserts == [
        (["a", "b"], SpoolPosition("shop", "living", 1, 2 * line_bytes)),
        (["c", "d"], SpoolPosition("shop", "living", 1, 4 * line_bytes)),
        (["e"], SpoolPosition("shop", "living", 1, 5 * line_bytes)),
    ]
    assert batches == [2, 2, 1]


def test_a_second_pass_goes_on_where_the_first_ended(spools, store):
    spools.write("living", [make_prediction("a")])
    drain_once(spools.root, store, "shop")
    drain_once(spools.root, store, "shop")
    spools.write("living", [make_prediction("b")])
    drain_once(spools.root, store, "shop")
    assert [names for names, _ in store.inserts if names] == [["a"], ["b"]]


def test_what_is_written_meanwhile_waits_for_the_next_pass(spools, store):
    spools.write("living", [make_prediction("a")])
    more = iter("bcdefgh")
    store.on_insert = lambda: spools.write("living", [make_prediction(next(more))])
    result = drain_once(spools.root, store, "shop", batch_rows=1)
    assert result.rows == 1
    assert result.depth_bytes == (spools.root / "living/00000001.log").stat().st_size // 2
    store.on_insert = lambda: None
    assert drain_once(spools.root, store, "shop").rows == 1


def test_files_that_can_grow_no_more_are_removed_after_the_commit(spools, store):
    spools.write("living", [make_prediction("a")], [make_prediction("b")], [make_prediction("c")], segment_bytes=1)
    seen = []
    store.on_insert = lambda: seen.append(sorted(path.stem[-1] for path in spools.root.rglob("*.log")))
    drain_once(spools.root, store, "shop")
    assert seen == [["1", "2", "3"], ["2", "3"], ["3"]]
    assert spools.files() == {"living/00000003.log", "living/writer.lock"}


def test_a_file_that_is_stored_but_not_yet_removed_is_only_removed(spools, store):
    spools.write("living", [make_prediction("a")], [make_prediction("b")], segment_bytes=1)
    first = spools.root / "living/00000001.log"
    store.positions["living"] = SpoolPosition("shop", "living", 1, first.stat().st_size)
    drain_once(spools.root, store, "shop")
    assert [names for names, _ in store.inserts if names] == [["b"]]
    assert not first.exists()
    first.write_bytes(b"left over\n" * 1000)
    assert drain_once(spools.root, store, "shop").corrupt == 0
    assert not first.exists()


def test_a_position_whose_file_is_gone_is_no_error(spools, store):
    spools.write("living", [make_prediction("a")], [make_prediction("b")], segment_bytes=1)
    drain_once(spools.root, store, "shop")
    (spools.root / "living/00000002.log").unlink()
    spools.write("living", [make_prediction("c")])
    assert drain_once(spools.root, store, "shop").rows == 1
    spools.die("living")
    drain_once(spools.root, store, "shop")
    assert drain_once(spools.root, store, "shop") == (0, 0, 0, 0, 0, [])


def add_bytes(path: Path, content: bytes) -> None:
    with path.open("ab") as stream:
        stream.write(content)


def test_a_torn_last_line_waits_while_its_writer_lives_and_is_dropped_after(spools, store):
    spools.write("worker", [make_prediction("a")])
    path = spools.root / "worker/00000001.log"
    add_bytes(path, b"0123abcd {")
    result = drain_once(spools.root, store, "shop")
    assert (result.rows, result.torn, result.depth_bytes) == (1, 0, 10)
    assert path.exists()
    spools.die("worker")
    result = drain_once(spools.root, store, "shop")
    assert (result.rows, result.torn, result.corrupt, result.depth_bytes) == (0, 1, 0, 0)
    assert spools.files() == set()


def test_a_torn_line_that_could_not_be_cut_off_is_dropped_once_the_writer_went_on(spools, store):
    spools.write("worker", [make_prediction("a")], segment_bytes=1)
    add_bytes(spools.root / "worker/00000001.log", b"0123abcd {")
    spools.write("worker", [make_prediction("b")])
    result = drain_once(spools.root, store, "shop")
    assert (result.rows, result.torn) == (2, 1)


def test_a_corrupt_line_goes_into_quarantine_with_its_place_and_the_rest_goes_on(spools, store):
    spools.write("worker", [make_prediction(name) for name in "abc"])
    path = spools.root / "worker/00000001.log"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = lines[1].replace(b'"score":0.25', b'"score":0.75')
    path.write_bytes(lines[0] + damaged + lines[2])
    result = drain_once(spools.root, store, "shop")
    assert (result.rows, result.corrupt, result.refused) == (2, 1, 0)
    assert store.names == {("Prediction", "a"), ("Prediction", "c")}
    assert spools.quarantine() == [
        {
            "place": f"worker/00000001.log:{len(lines[0])}",
            "reason": "the checksum is wrong",
            "content": repr(damaged),
        }
    ]


def test_quarantine_goes_on_after_an_entry_that_was_cut_short(spools, store):
    spools.write("worker", [make_prediction("a")])
    add_bytes(spools.root / "worker/00000001.log", b"damaged\n")
    path = spools.root / "worker-00000001.log.quarantine"
    add_bytes(path, b'{"place": "worker/000')
    drain_once(spools.root, store, "shop")
    torn, entry = path.read_text().splitlines()
    assert torn == '{"place": "worker/000'
    assert json.loads(entry)["content"] == repr(b"damaged\n")


def test_what_the_store_cannot_hold_goes_into_quarantine(spools, store):
    spools.write("worker", [make_prediction("a"), make_prediction(POISON)])
    counted = []
    result = drain_once(spools.root, store, "shop", report=counted.append)
    assert (result.rows, result.refused) == (1, 1)
    (entry,) = spools.quarantine()
    assert entry["reason"] == "poisonous"
    assert '"prediction_id":"poison"' in entry["content"]
    assert counted == [{"stored": 1, "refused": 1, "corrupt": 0, "torn": 0}]


def test_quarantine_is_forgotten_after_30_days(spools, store):
    spools.write("worker", [make_prediction(POISON)], [make_prediction("also " + POISON)], segment_bytes=1)
    drain_once(spools.root, store, "shop")
    spools.write("later", [make_prediction(POISON)])
    drain_once(spools.root, store, "shop")
    old, new = (spools.root / f"{name}-00000001.log.quarantine" for name in ("worker", "later"))
    for path, days in ((old, 31), (new, 29)):
        os.utime(path, (time.time() - days * DAY_SECONDS,) * 2)
    drain_once(spools.root, store, "shop")
    assert not old.exists()
    assert new.exists()


def test_an_outcome_is_stored_whether_its_prediction_is_there_or_not(spools, store):
    spools.write("first", [make_outcome("a"), make_outcome("of another replica")])
    spools.write("second", [make_prediction("a")])
    result = drain_once(spools.root, store, "shop")
    assert store.names == {("Prediction", "a"), ("Outcome", "a"), ("Outcome", "of another replica")}
    assert (result.rows, result.refused) == (3, 0)


@pytest.mark.parametrize(("lost", "happened"), [(2, False), (3, True)])
def test_what_was_stored_is_counted_by_what_became_true_and_not_by_the_answer(spools, store, lost, happened):
    """A commit whose answer is lost may have happened or not; the position says so, also to the next agent."""
    spools.write("one", [make_prediction("a"), make_prediction("b"), make_prediction(POISON)])
    reports = []
    store.fail_at = store.steps + 1 + lost  # of reading the position, the insert before, at and after its commit
    with pytest.raises(ServiceUnavailable):
        drain_once(spools.root, store, "shop", report=reports.append)
    assert reports == []
    assert (len(store.records) == 2) == happened
    for _ in range(2):
        drain_once(spools.root, store, "shop", report=reports.append)
    assert sum(counts["stored"] for counts in reports) == 2
    assert sum(counts["refused"] for counts in reports) == 1


def test_one_spool_that_cannot_be_read_does_not_hold_up_the_others(spools, store):
    (spools.root / "a/00000001.log").mkdir(parents=True)
    spools.write("b", [make_prediction("b")])
    result = drain_once(spools.root, store, "shop")
    assert result.rows == 1
    (problem,) = result.problems
    assert "a/00000001.log" in problem


def test_a_batch_that_the_store_calls_wrong_is_a_problem_and_stays(spools, store):
    def refuse() -> None:
        raise DataError("predictions: no")

    spools.write("a", [make_prediction("a")])
    store.on_insert = refuse
    result = drain_once(spools.root, store, "shop")
    assert result.problems == ["predictions: no"]
    assert result.depth_bytes > 0


def test_only_one_process_drains(spools, store):
    spools.write("a", [make_prediction("a")])
    lock = take_lock(spools.root / DRAIN_LOCK_FILE)
    with pytest.raises(ServiceUnavailable, match="another process drains it"):
        drain_once(spools.root, store, "shop")
    os.close(lock)
    assert drain_once(spools.root, store, "shop").rows == 1


def test_what_waits_is_what_no_position_covers(spools, store):
    def measure():
        progress = read_progress(spools.root)
        return measure_waiting(spools.root, progress), count_waiting(spools.root, progress)

    spools.write("a", [make_prediction("a")])
    size = (spools.root / "a/00000001.log").stat().st_size
    assert measure() == (size, 1)
    drain_once(spools.root, store, "shop")
    assert measure() == (0, 0)
    spools.write("a", [make_prediction("b")])
    spools.write("b", [make_prediction("c")])
    (spools.root / "b/00000002.log").symlink_to(spools.root / "removed meanwhile")
    assert measure() == (2 * size, 2)
    store.positions.clear()  # the store was restored from a copy of the time before
    (spools.root / "b/00000002.log").unlink()
    store.fail_at = store.steps + 2
    with pytest.raises(ServiceUnavailable):
        drain_once(spools.root, store, "shop")
    assert measure() == (3 * size, 3)


def test_a_pass_that_is_stopped_ends_after_its_batch_and_says_how_far_it_came(spools, store):
    spools.write("a", [make_prediction("a"), make_prediction("b")], [make_prediction("c")])
    spools.write("b", [make_prediction("d")])
    spools.die("a")
    result = drain_once(spools.root, store, "shop", batch_rows=2, stopped=lambda: True)
    assert (result.rows, count_waiting(spools.root, read_progress(spools.root))) == (2, 2)
    assert spools.files() >= {"a/00000001.log", "b/00000001.log"}
    assert drain_once(spools.root, store, "shop").rows == 2


def test_the_workers_are_told_of_a_batch_while_it_is_stored_and_of_its_rate_after_it(spools, store):
    seen = []
    insert = store.insert

    def look(records, position, **named):
        seen.append(read_progress(spools.root))
        return insert(records, position, **named)

    store.insert = look
    spools.write("a", [make_prediction("a")], [make_prediction("b")])
    drain_once(spools.root, store, "shop", batch_rows=1)
    size = (spools.root / "a/00000001.log").stat().st_size // 2
    assert [progress.positions.get("a") for progress in seen] == [None, (1, size)]
    assert all(progress.batch_started is not None for progress in seen)
    progress = read_progress(spools.root)
    assert (progress.positions, progress.batch_started) == ({"a": (1, 2 * size)}, None)
    assert progress.bytes_per_second > 0


def test_a_progress_file_that_cannot_be_written_or_read_stops_no_drain(spools, store):
    spools.write("a", [make_prediction("a")])
    (spools.root / PROGRESS_FILE).write_text("of another release", encoding="utf-8")
    assert drain_once(spools.root, store, "shop").rows == 1
    (spools.root / PROGRESS_FILE).unlink()
    (spools.root / PROGRESS_FILE).mkdir()  # nothing can take its place
    spools.write("a", [make_prediction("b")])
    assert drain_once(spools.root, store, "shop").rows == 1


def fill(spools: Spools) -> None:
    """Two dead and one living writer, several files, outcomes before and without a prediction, damage of each kind."""
    spools.write("one", [make_outcome("c"), make_prediction("a")], [make_prediction("b")], segment_bytes=1)
    spools.die("one")
    spools.write("two", [make_prediction("c"), make_prediction("d"), make_prediction(POISON), make_outcome("a")])
    spools.die("two")
    path = spools.root / "two/00000001.log"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"damaged\n" + b"".join(lines[1:]) + b"torn")
    spools.write("three", [make_prediction("e"), make_outcome("nobody"), make_outcome("e")])


def check_filled(spools: Spools, store: FakeStore) -> None:
    outcomes = {("Outcome", name) for name in ("a", "c", "e", "nobody")}
    assert store.names == {("Prediction", name) for name in "abcde"} | outcomes
    assert sorted(entry["reason"] for entry in spools.quarantine()) == ["poisonous", "the checksum is wrong"]
    assert spools.files() == {"three/00000001.log", "three/writer.lock"}


@pytest.mark.parametrize("batch_rows", [1, 2, 2000])
def test_a_drain_that_dies_at_any_commit_loses_and_doubles_nothing(tmp_path, batch_rows):
    for step in count(1):
        spools, store = Spools(tmp_path / f"{step}"), FakeStore()
        fill(spools)
        store.fail_at = step
        try:
            drain_once(spools.root, store, "shop", batch_rows)
        except ServiceUnavailable:
            drain_once(spools.root, store, "shop", batch_rows)
            check_filled(spools, store)
            spools.die("three")
        else:
            spools.die("three")
            break
    assert step > 10


def test_a_drain_that_dies_between_a_commit_and_what_follows_counts_nothing_twice(tmp_path):
    """The records of all reports together are those of one uninterrupted drain."""
    for step in count(1):
        spools, store = Spools(tmp_path / f"{step}"), FakeStore()
        fill(spools)
        reports: list[int] = []

        def report(counts, reports=reports, step=step):
            reports.append(counts["stored"])
            if len(reports) == step:
                raise ServiceUnavailable("the agent is gone")

        try:
            drain_once(spools.root, store, "shop", 2, report)
        except ServiceUnavailable:
            drain_once(spools.root, store, "shop", 2, report)
            check_filled(spools, store)
            assert sum(reports) == 9
            spools.die("three")
        else:
            spools.die("three")
            break
    assert step > 4
