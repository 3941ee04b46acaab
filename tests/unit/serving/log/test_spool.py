"""Whatever is handed over is there, whole or not at all; whatever is damaged is seen."""

from __future__ import annotations

import datetime as dt
import errno
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from closedloop.errors import ServiceUnavailable
from closedloop.files import is_locked
from closedloop.records import Outcome, Prediction, Record
from closedloop.serving.log.progress import DrainProgress
from closedloop.serving.log.segments import list_segments, list_spools, read_lines
from closedloop.serving.log.spool import LOCK_FILE, SpoolWriter

TIME = dt.datetime(2024, 1, 1, 12, 30, tzinfo=dt.UTC)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
MOMENTS = st.datetimes(timezones=st.just(dt.UTC))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PREDICTIONS = st.builds(
    Prediction,
    prediction_id=TEXTS,
    request_id=TEXTS,
    model_name=TEXTS,
    model_version=TEXTS,
    variant=st.sampled_from(["champion", "canary", "shadow"]),
    source=st.sampled_from(["http", "batch", "stream", "edge"]),
    predicted_at=MOMENTS,
    features=st.lists(FINITE | TEXTS | st.none(), max_size=4).map(tuple),
    score=FINITE,
    decision=st.integers(0, 1),
    latency_ms=FINITE,
    customer_id=st.none() | TEXTS,
    features_as_of=st.none() | MOMENTS,
    answered_id=st.none() | TEXTS,
    forced=st.booleans(),
)
OUTCOMES = st.builds(Outcome, prediction_id=TEXTS, outcome=st.integers(0, 1), reported_at=MOMENTS)
RECORDS = st.lists(PREDICTIONS | OUTCOMES, max_size=6)


def make_outcome(number: int) -> Outcome:
    return Outcome(prediction_id=f"{number:048d}", outcome=number % 2, reported_at=TIME)


@contextmanager
def open_spool(folder: Path, segment_bytes: int = 1_000_000, **options: bool | int) -> Iterator[SpoolWriter]:
    writer = SpoolWriter(folder, segment_bytes, **options)
    try:
        yield writer
    finally:
        writer.close()


def read_spool(folder: Path) -> list[Record | None]:
    return [line.record for path in list_segments(folder) for line in read_lines(path)]


def write_segment(records: list[Record], folder: Path) -> Path:
    with open_spool(folder) as writer:
        writer.append(records)
    return folder / "00000001.log"


@settings(deadline=None)
@given(batches=st.lists(RECORDS, max_size=4), segment_bytes=st.sampled_from([1, 300, 100_000]))
def test_records_come_back_as_they_went_in(batches, segment_bytes):
    with tempfile.TemporaryDirectory() as root:
        with open_spool(Path(root) / "spool", segment_bytes) as writer:
            for batch in batches:
                writer.append(batch)
                assert read_spool(Path(root) / "spool")[-len(batch) :] == batch or not batch  # before any sync
        assert read_spool(Path(root) / "spool") == [record for batch in batches for record in batch]


def gzip_checksum(body: bytes) -> str:
    """CRC-32 by another implementation: gzip's trailer."""
    packed = subprocess.run(["gzip", "-c"], input=body, capture_output=True, check=True).stdout
    return f"{int.from_bytes(packed[-8:-4], 'little'):08x}"


def test_a_line_is_the_checksum_and_the_record_as_json(tmp_path):
    path = write_segment([Outcome("a1", 1, TIME)], tmp_path / "spool")
    body = b'{"kind":"outcome","prediction_id":"a1","outcome":1,"reported_at":"2024-01-01T12:30:00Z"}'
    assert path.read_bytes() == gzip_checksum(body).encode() + b" " + body + b"\n"


@settings(max_examples=100, deadline=None)
@given(records=st.lists(PREDICTIONS | OUTCOMES, min_size=1, max_size=3), data=st.data())
def test_a_file_cut_anywhere_gives_the_whole_records_before_the_cut(records, data):
    with tempfile.TemporaryDirectory() as root:
        path = write_segment(records, Path(root) / "spool")
        content = path.read_bytes()
        cut = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:cut])
        found = list(read_lines(path))
        whole = content[:cut].count(b"\n")
        assert [line.record for line in found if not line.torn] == records[:whole]
        assert [line.torn for line in found][whole:] == [True] * (content[:cut][-1:] not in (b"", b"\n"))


@settings(max_examples=200, deadline=None)
@given(records=st.lists(PREDICTIONS | OUTCOMES, min_size=1, max_size=3), data=st.data())
def test_a_changed_byte_is_seen_and_costs_no_other_line_than_its_own_and_the_next(records, data):
    with tempfile.TemporaryDirectory() as root:
        path = write_segment(records, Path(root) / "spool")
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        owner = bytes(content[:place]).count(b"\n")
        path.write_bytes(content)
        found = [line.record for line in read_lines(path)]
        assert None in found
        assert found[:owner] == records[:owner]
        after = records[owner + 2 :]
        assert found[len(found) - len(after) :] == after


def test_reading_goes_on_from_a_position(tmp_path):
    path = write_segment([make_outcome(number) for number in range(3)], tmp_path / "spool")
    first, second, third = read_lines(path)
    assert (second.start, third.start) == (first.end, second.end)
    assert list(read_lines(path, first.end)) == [second, third]
    assert list(read_lines(path, third.end)) == []
    assert list(read_lines(path, third.end + 1000)) == []


def test_a_sound_line_that_is_no_record_says_so(tmp_path):
    path = write_segment([make_outcome(0)], tmp_path / "spool")
    body = b'{"kind":"outcome","prediction_id":"a1"}'
    path.write_bytes(gzip_checksum(body).encode() + b" " + body + b"\n")
    (line,) = read_lines(path)
    assert line.record is None
    assert line.problem == "not a record of this release: Object missing required field `outcome`"


def test_segments_are_rotated_at_their_size(tmp_path):
    with open_spool(tmp_path / "spool", segment_bytes=250) as writer:
        for number in range(5):  # a line has 147 bytes: two reach the size
            writer.append([make_outcome(number)])
    counts = [len(list(read_lines(path))) for path in list_segments(tmp_path / "spool")]
    assert [path.name for path in list_segments(tmp_path / "spool")] == ["00000001.log", "00000002.log", "00000003.log"]
    assert counts == [2, 2, 1]


def test_an_empty_batch_makes_no_line(tmp_path):
    path = write_segment([], tmp_path / "spool")
    assert path.read_bytes() == b""


def test_a_living_writer_is_known_by_its_lock(tmp_path):
    with open_spool(tmp_path / "spool"):
        assert is_locked(tmp_path / "spool" / LOCK_FILE)
    assert not is_locked(tmp_path / "spool" / LOCK_FILE)


def test_a_spool_folder_is_never_taken_over(tmp_path):
    write_segment([make_outcome(0)], tmp_path / "spool")
    with pytest.raises(ServiceUnavailable, match=r"spool: the spool cannot be made \(Directory not empty\)"):
        SpoolWriter(tmp_path / "spool", 1000)
    assert list_spools(tmp_path) == [tmp_path / "spool"]


def test_a_closed_spool_takes_nothing(tmp_path):
    with open_spool(tmp_path / "spool") as writer:
        pass
    with pytest.raises(ServiceUnavailable, match="is closed"):
        writer.append([make_outcome(0)])


def test_a_disk_with_too_little_room_takes_nothing(tmp_path):
    refusal = pytest.raises(ServiceUnavailable, match=rf"bytes are free on its disk, {2**62} are required")
    with open_spool(tmp_path / "spool", disk_free_bytes_min=2**62) as writer, refusal:
        writer.append([make_outcome(0)])
    assert read_spool(tmp_path / "spool") == []


class Kernel:
    """`os.write`, `os.fsync` and the clock, of which the first two do as they are told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes: list[int | OSError | BaseException] = []  # how much to take, or what to raise; then all is taken
        self.fsyncs: list[OSError] = []
        self.synced: list[int] = []
        self.now = 0.0
        self._write, self._fsync = os.write, os.fsync
        monkeypatch.setattr("os.write", self.write)
        monkeypatch.setattr("os.fsync", self.fsync)
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def write(self, file: int, content: bytes) -> int:
        planned = self.writes.pop(0) if self.writes else len(content)
        if isinstance(planned, BaseException):
            raise planned
        return self._write(file, content[:planned])

    def fsync(self, file: int) -> None:
        if self.fsyncs:
            raise self.fsyncs.pop(0)
        self.synced.append(os.fstat(file).st_ino)
        self._fsync(file)


@pytest.fixture
def kernel(monkeypatch):
    return Kernel(monkeypatch)


def test_a_short_write_is_completed(tmp_path, kernel):
    with open_spool(tmp_path / "spool") as writer:
        kernel.writes = [10, 1, 150]
        writer.append([make_outcome(0), make_outcome(1)])
        assert not kernel.writes
    assert read_spool(tmp_path / "spool") == [make_outcome(0), make_outcome(1)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("written", [[], [10], [150, 20]])
def test_what_a_full_disk_took_of_a_batch_is_cut_off_again(tmp_path, kernel, code, written):
    with open_spool(tmp_path / "spool") as writer:
        writer.append([make_outcome(0)])
        kernel.writes = [*written, OSError(code, os.strerror(code))]
        with pytest.raises(
            ServiceUnavailable, match=rf"^prediction log: predictions cannot be logged \({os.strerror(code)}\)"
        ):
            writer.append([make_outcome(1), make_outcome(2)])
        assert read_spool(tmp_path / "spool") == [make_outcome(0)]
        with pytest.raises(ServiceUnavailable, match=os.strerror(code)):
            writer.append([make_outcome(3)])  # not even tried
        kernel.now = 1.0
        writer.append([make_outcome(4)])
    assert read_spool(tmp_path / "spool") == [make_outcome(0), make_outcome(4)]


def test_nothing_takes_the_place_of_what_was_cut_off(tmp_path, kernel):
    # the drain may have read a whole line of it, and go on from a position behind that
    with open_spool(tmp_path / "spool") as writer:
        writer.append([make_outcome(0)])
        kernel.writes = [200, OSError(errno.ENOSPC, "")]
        with pytest.raises(ServiceUnavailable):
            writer.append([make_outcome(1), make_outcome(2)])
        kernel.now = 1.0
        writer.append([make_outcome(3)])
    assert [len(list(read_lines(path))) for path in list_segments(tmp_path / "spool")] == [1, 1]


def test_a_signal_handler_that_raises_leaves_no_torn_line(tmp_path, kernel):
    with open_spool(tmp_path / "spool") as writer:
        kernel.writes = [10, KeyboardInterrupt()]
        with pytest.raises(KeyboardInterrupt):
            writer.append([make_outcome(0)])
        writer.append([make_outcome(1)])
    assert read_spool(tmp_path / "spool") == [make_outcome(1)]


def test_a_disk_that_filled_up_is_seen_within_a_second_and_so_is_its_recovery(tmp_path, kernel, monkeypatch):
    free = [100]
    real = os.statvfs(tmp_path)
    fields = list(real)
    monkeypatch.setattr("os.statvfs", lambda _: os.statvfs_result([4096, 1, *fields[2:4], *free, *fields[5:]]))
    with open_spool(tmp_path / "spool", disk_free_bytes_min=50) as writer:
        writer.append([make_outcome(0)])
        free[0] = 49
        writer.append([make_outcome(1)])  # looked at a moment ago
        kernel.now = 1.0
        with pytest.raises(ServiceUnavailable, match="49 bytes are free"):
            writer.append([make_outcome(2)])
        free[0] = 50
        kernel.now = 2.0
        writer.append([make_outcome(3)])
    assert read_spool(tmp_path / "spool") == [make_outcome(0), make_outcome(1), make_outcome(3)]


def test_what_waits_in_all_spools_is_bounded_until_it_is_stored(tmp_path, kernel):
    root = tmp_path / "spool"
    with open_spool(root / "dead") as dead:
        dead.append([make_outcome(0)] * 2)
    with open_spool(root / "one", segment_bytes=300, bytes_max=600) as writer:
        for number in range(3):  # a line has 144 bytes
            writer.append([make_outcome(number)])
        with pytest.raises(ServiceUnavailable, match="720 bytes wait for the operations store, 600 are allowed"):
            writer.append([make_outcome(3)])
        DrainProgress({"one": (1, 144)}).write(root)
        with pytest.raises(ServiceUnavailable, match="720 bytes wait"):
            writer.append([make_outcome(3)])  # looked at a moment ago
        kernel.now = 1.0
        writer.append([make_outcome(3)])
        DrainProgress({"one": (2, 144), "dead": (1, 288)}).write(root)
        for number in range(4, 9):  # what was stored has left room, and is seen without a wait
            writer.append([make_outcome(number)])
        with pytest.raises(ServiceUnavailable, match="720 bytes wait"):
            writer.append([make_outcome(9)])


def test_no_more_may_wait_than_the_store_takes_in_the_time_that_a_pod_has(tmp_path, kernel):
    root = tmp_path / "spool"
    with open_spool(root / "one", drain_seconds_max=25) as writer:
        for number in range(5):
            writer.append([make_outcome(number)])  # no rate is known
        DrainProgress(bytes_per_second=30.0).write(root)  # of 720 bytes: 24 s
        kernel.now = 1.0
        writer.append([make_outcome(5)])
        with pytest.raises(ServiceUnavailable, match="needs about 29 s for the waiting records, 25 s are allowed"):
            writer.append([make_outcome(6)])
        DrainProgress({"one": (1, 864)}, bytes_per_second=0.1).write(root)
        kernel.now = 2.0
        writer.append([make_outcome(6)])  # where nothing waits one request is taken, however slow the store is
        with pytest.raises(ServiceUnavailable, match="needs about 1440 s"):
            writer.append([make_outcome(7)])
        DrainProgress({"one": (1, 864)}, 1e6, batch_bytes=144, batch_started=3.0).write(root)
        kernel.now = 103.0
        with pytest.raises(ServiceUnavailable, match="needs about 100 s"):  # as long as the batch under way has taken
            writer.append([make_outcome(7)])


def inode(path: Path) -> int:
    return path.stat().st_ino


def list_open_files(folder: Path) -> list[str]:
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [str(link.readlink()) for link in links if link.readlink().is_relative_to(folder)]


def test_sync_waits_for_all_files_and_for_the_folder_that_names_them(tmp_path, kernel):
    spool = tmp_path / "spool"
    with open_spool(spool, segment_bytes=1) as writer:
        for number in range(2):
            writer.append([make_outcome(number)])
        assert kernel.synced == []
        writer.sync()
        assert sorted(kernel.synced) == sorted([inode(spool), *map(inode, list_segments(spool))])
        writer.sync()
        assert len(kernel.synced) == 3  # nothing new


def test_fsync_before_answer_waits_in_append(tmp_path, kernel):
    with open_spool(tmp_path / "spool", fsync_before_answer=True) as writer:
        writer.append([make_outcome(0)])
        assert inode(tmp_path / "spool" / "00000001.log") in kernel.synced


def test_a_failed_sync_is_said_once_and_what_follows_begins_a_file_of_its_own(tmp_path, kernel):
    # the kernel forgets what it could not write: to ask again, and be told yes, would be a lie
    spool = tmp_path / "spool"
    with open_spool(spool) as writer:
        writer.append([make_outcome(0)])
        kernel.fsyncs = [OSError(errno.EIO, "broken")] * 2  # of the file and of its folder
        with pytest.raises(ServiceUnavailable, match=r"may not have reached the disk \(broken\)"):
            writer.sync()
        with pytest.raises(ServiceUnavailable, match="broken"):
            writer.append([make_outcome(1)])
        writer.sync()
        assert kernel.synced == []
        kernel.now = 1.0
        writer.append([make_outcome(2)])
        writer.sync()
        first, second = list_segments(spool)
        assert sorted(kernel.synced) == sorted([inode(spool), inode(second)])
        assert [line.record for line in read_lines(first)] == [make_outcome(0)]  # for the drain
        assert [line.record for line in read_lines(second)] == [make_outcome(2)]
    assert list_open_files(spool) == []


def test_one_file_that_cannot_be_synced_keeps_no_other_from_the_disk(tmp_path, kernel):
    spool = tmp_path / "spool"
    with open_spool(spool, segment_bytes=1) as writer:
        for number in range(3):
            writer.append([make_outcome(number)])
        kernel.fsyncs = [OSError(errno.EIO, "broken")]
        with pytest.raises(ServiceUnavailable, match="broken"):
            writer.sync()
        assert len(kernel.synced) == 3  # of three files and their folder
    assert list_open_files(spool) == []


def test_syncing_runs_beside_until_the_spool_is_closed(tmp_path, monkeypatch):
    synced = threading.Event()
    before = set(threading.enumerate())
    fsync = os.fsync
    monkeypatch.setattr("os.fsync", lambda file: (fsync(file), synced.set()))
    with open_spool(tmp_path / "spool") as writer:
        writer.start_syncing(1)
        writer.append([make_outcome(0)])
        assert synced.wait(60)
    assert set(threading.enumerate()) <= before


FILL_FILE = """
import resource, signal, sys
from pathlib import Path
from closedloop.errors import ServiceUnavailable
from closedloop.records import Outcome
from closedloop.serving.log.spool import SpoolWriter
import datetime as dt

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1100, 1100))
writer = SpoolWriter(Path(sys.argv[1]), 1_000_000)
for number in range(100):
    try:
        writer.append([Outcome(f"{number:048d}", 0, dt.datetime(2024, 1, 1, tzinfo=dt.UTC))] * 2)
    except ServiceUnavailable:
        break
    print(number, flush=True)
"""


def test_the_kernel_itself_refusing_a_write_half_way_leaves_only_whole_batches(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", FILL_FILE, str(tmp_path / "spool")], capture_output=True, text=True, check=True
    )
    answered = [int(number) for number in ran.stdout.split()]
    assert answered == [0, 1, 2]  # a batch has 294 bytes, the fourth reached the limit within its second line
    found = [record.prediction_id for record in read_spool(tmp_path / "spool")]
    assert found == [f"{number:048d}" for number in answered for _ in range(2)]
