"""Daily aggregates of the events: a file a month, in the newest month a file a day; a changed day is computed again."""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from closedloop.core.features.daily import DAILY_COLUMNS, EVENTS_COLUMNS, aggregate_daily
from closedloop.errors import ConfigError, DataError
from closedloop.files import replace_file
from closedloop.tabular.tables import CONTENT_KEY, build_schema, list_event_days, read_footer, write_batches

if TYPE_CHECKING:
    import pyarrow as pa

    from closedloop.adapters.engines import Engine, Session

logger = logging.getLogger(__name__)
SOURCES_KEY = b"closedloop.sources"
# Raise it when columns, their meaning or their order change: files of an older format are then computed again.
DAILY_FORMAT = b"2"
DAILY_SCHEMA = build_schema(DAILY_COLUMNS)
# a month or a day, and what a killed run left beside it
DAILY_NAME = re.compile(r"\d{4}-\d{2}(-\d{2})?\.parquet|\.\d{4}-\d{2}(-\d{2})?\.parquet\.\d+")


def update_daily(events_dir: Path, daily_dir: Path, *, engine: Engine) -> int:
    """Bring the daily aggregates in line with the events; returns the number of files computed.

    Calendar months before the newest one are a file each, days of the newest month a file each. A file carries the
    digest of its sources and is computed again when that changed: layout and bytes follow from the events alone,
    whatever was there before, so that the next run completes one that was killed.
    """
    days = list_event_days(events_dir)
    if not days:
        raise DataError(f"{events_dir}: holds no events; 'closedloop ingest' writes them")
    daily_dir.mkdir(parents=True, exist_ok=True)
    if daily_dir.samefile(events_dir):
        raise ConfigError(f"{daily_dir}: is the folder of the events; the daily aggregates need one of their own")
    groups: dict[str, list[Path]] = {}
    for day in days:
        name = f"{day}" if (day.year, day.month) == (days[-1].year, days[-1].month) else f"{day:%Y-%m}"
        groups.setdefault(name, []).append(events_dir / f"{day}.parquet")
    for path in daily_dir.iterdir():
        if path.name not in {f"{name}.parquet" for name in groups} and DAILY_NAME.fullmatch(path.name):
            path.unlink()
    digests = {name: _digest_sources(paths) for name, paths in groups.items()}
    stale = [name for name in groups if read_footer(daily_dir / f"{name}.parquet", SOURCES_KEY) != digests[name]]

    # one file's types are mostly the next one's, and compiling takes longer than a day's events
    compile_types = functools.cache(functools.partial(_compile_types, engine))

    def compute(session: Session, name: str) -> None:
        with replace_file(daily_dir / f"{name}.parquet") as beside:
            batches = _aggregate(session, groups[name], compile_types)
            write_batches(beside, batches, DAILY_SCHEMA, {SOURCES_KEY: digests[name]})

    engine.map(compute, stale)
    logger.info("daily aggregates computed: %d of %d", len(stale), len(groups))
    return len(stale)


def list_daily(daily_dir: Path, first: dt.datetime | None = None, last: dt.datetime | None = None) -> list[Path]:
    """Files of the daily aggregates, sorted by name: all, or those with a day between two, ends included."""
    paths = sorted(path for path in daily_dir.glob("[0-9]*.parquet") if DAILY_NAME.fullmatch(path.name))
    if first is None or last is None:
        return paths
    return [path for path in paths if f"{first:%F}"[: len(path.stem)] <= path.stem <= f"{last:%F}"[: len(path.stem)]]


def _aggregate(session: Session, paths: Sequence[Path], compile_types: Callable[..., str]) -> Iterator[pa.RecordBatch]:
    """Types without amounts, then those with: most events of a shop have none, and only need to be counted."""
    session.bind("events", paths, EVENTS_COLUMNS)
    rows = [row for batch in session.read_batches(compile_types()) for row in batch.to_pylist()]
    for has_amounts in (False, True):
        if types := sorted(row["event_type"] for row in rows if row["has_amounts"] is has_amounts):
            yield from session.read_batches(compile_types(*types, has_amounts=has_amounts))


def _compile_types(engine: Engine, *event_types: str, has_amounts: bool = True) -> str:
    """The query of some types' aggregates; without types, that of the types that occur."""
    import ibis

    events = ibis.table(EVENTS_COLUMNS, name="events")
    if event_types:
        return engine.compile(aggregate_daily(events, event_types, has_amounts=has_amounts))
    known = events.filter(events.event_type.notnull()).group_by("event_type")
    return engine.compile(known.aggregate(has_amounts=events.amount.count() > 0))


def _digest_sources(paths: Sequence[Path]) -> bytes:
    digest = hashlib.sha256(DAILY_FORMAT)
    for path in paths:
        digest.update(f"{path.name}:".encode() + digest_file(path))
    return digest.hexdigest().encode()


def digest_file(path: Path) -> bytes:
    """The digest that ingest put into the footer of a Parquet file, else that of its bytes; and its size."""
    try:
        digest = read_footer(path, CONTENT_KEY) or hashlib.sha256(path.read_bytes()).digest()
        return digest + str(path.stat().st_size).encode()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); 'closedloop ingest' writes it") from error
