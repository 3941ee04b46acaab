"""The roll-up of the events: a file a month, in the newest month a file a day; computed again where events changed."""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from closedloop.adapters.engine import write_batches
from closedloop.adapters.tables import CONTENT_KEY, list_event_days
from closedloop.core.rollup import EVENTS_COLUMNS, ROLLUP_COLUMNS, rollup_events
from closedloop.errors import ConfigError, DataError
from closedloop.files import replace_file

if TYPE_CHECKING:
    from closedloop.adapters.engine import Engine, Session

logger = logging.getLogger(__name__)
SOURCES_KEY = b"closedloop.sources"
# Raised when the roll-up's columns, their meaning or their order change: files of an older format are computed again.
ROLLUP_FORMAT = b"2"
ARROW_TYPES = {"string": pa.string(), "date": pa.date32(), "int64": pa.int64(), "float64": pa.float64()}
ROLLUP_ARROW = pa.schema([(name, ARROW_TYPES[kind]) for name, kind in ROLLUP_COLUMNS.items()])
# a month or a day, and what a killed run left beside it
ROLLUP_NAME = re.compile(r"\d{4}-\d{2}(-\d{2})?\.parquet|\.\d{4}-\d{2}(-\d{2})?\.parquet\.\d+")
FOOTER_TAIL_BYTES = 8


def update_rollup(events_dir: Path, rollup_dir: Path, *, engine: Engine) -> int:
    """Bring the roll-up in line with the events; returns the number of files computed.

    Calendar months before the newest one are a file each, days of the newest month a file each. A file carries the
    digest of its sources and is computed again when that changed: layout and bytes follow from the events alone,
    whatever was there before, so that a run that was killed is made good by the next.
    """
    days = list_event_days(events_dir)
    if not days:
        raise DataError(f"{events_dir}: holds no events; 'closedloop ingest' writes them")
    rollup_dir.mkdir(parents=True, exist_ok=True)
    if rollup_dir.samefile(events_dir):
        raise ConfigError(f"{rollup_dir}: is the folder of the events; the roll-up needs one of its own")
    groups: dict[str, list[Path]] = {}
    for day in days:
        name = f"{day}" if (day.year, day.month) == (days[-1].year, days[-1].month) else f"{day:%Y-%m}"
        groups.setdefault(name, []).append(events_dir / f"{day}.parquet")
    for path in rollup_dir.iterdir():
        if path.name not in {f"{name}.parquet" for name in groups} and ROLLUP_NAME.fullmatch(path.name):
            path.unlink()
    digests = {name: _digest_sources(paths) for name, paths in groups.items()}
    stale = [name for name in groups if _read_digest(rollup_dir / f"{name}.parquet") != digests[name]]

    # one file's types are mostly the next one's, and compiling takes longer than a day's events
    compile_types = functools.cache(functools.partial(_compile_types, engine))

    def compute(session: Session, name: str) -> None:
        with replace_file(rollup_dir / f"{name}.parquet") as beside:
            batches = _roll_up(session, groups[name], compile_types)
            write_batches(beside, batches, ROLLUP_ARROW, {SOURCES_KEY: digests[name]})

    engine.map(compute, stale)
    logger.info("roll-up: %d of %d files computed", len(stale), len(groups))
    return len(stale)


def list_rollup(rollup_dir: Path, first: dt.datetime | None = None, last: dt.datetime | None = None) -> list[Path]:
    """Files of the roll-up in the order of their names: all, or those with a day between two, ends included."""
    paths = sorted(path for path in rollup_dir.glob("[0-9]*.parquet") if ROLLUP_NAME.fullmatch(path.name))
    if first is None or last is None:
        return paths
    return [path for path in paths if f"{first:%F}"[: len(path.stem)] <= path.stem <= f"{last:%F}"[: len(path.stem)]]


def _roll_up(session: Session, paths: Sequence[Path], compile_types: Callable[..., str]) -> Iterator[pa.RecordBatch]:
    """Types without amounts, then those with: most events of a shop have none, and only need to be counted."""
    session.bind("events", paths, EVENTS_COLUMNS)
    rows = [row for batch in session.read_batches(compile_types()) for row in batch.to_pylist()]
    for has_amounts in (False, True):
        if types := sorted(row["event_type"] for row in rows if row["has_amounts"] is has_amounts):
            yield from session.read_batches(compile_types(*types, has_amounts=has_amounts))


def _compile_types(engine: Engine, *event_types: str, has_amounts: bool = True) -> str:
    """The query of some types' roll-up; without types, that of the types that occur."""
    import ibis

    events = ibis.table(EVENTS_COLUMNS, name="events")
    if event_types:
        return engine.compile(rollup_events(events, event_types, has_amounts=has_amounts))
    known = events.filter(events.event_type.notnull()).group_by("event_type")
    return engine.compile(known.aggregate(has_amounts=events.amount.count() > 0))


def _digest_sources(paths: Sequence[Path]) -> bytes:
    digest = hashlib.sha256(ROLLUP_FORMAT)
    for path in paths:
        digest.update(f"{path.name}:".encode() + _digest_file(path))
    return digest.hexdigest().encode()


def _digest_file(path: Path) -> bytes:
    """A digest of a Parquet file's content: of its footer, if ingest put the content's own digest there."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - FOOTER_TAIL_BYTES))
            tail = file.read()
            file.seek(max(0, size - FOOTER_TAIL_BYTES - int.from_bytes(tail[:4], "little")))
            footer = file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); 'closedloop ingest' writes it") from error
    if CONTENT_KEY in footer:
        return hashlib.sha256(footer + str(size).encode()).digest()
    return hashlib.sha256(path.read_bytes()).digest()


def _read_digest(path: Path) -> bytes | None:
    try:
        metadata = pq.read_metadata(path).metadata
    except (OSError, pa.ArrowInvalid):
        return None
    return metadata.get(SOURCES_KEY) if metadata else None
