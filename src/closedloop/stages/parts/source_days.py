"""Events whose files are divided by day: only new and changed days are read, each by itself."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import closedloop
from closedloop.config.dataset import DatasetConfig
from closedloop.config.params import Params
from closedloop.errors import DataError, count_noun
from closedloop.files import keep_file, read_json, write_json
from closedloop.stages.parts.source_rows import Findings, SourceRows, read_rows
from closedloop.tabular.day_files import DAY, fetch_day, list_day_files
from closedloop.tabular.tables import read_table, write_event_days

logger = logging.getLogger(__name__)
LEDGER = "days.json"
# the code that turns rows into events: what other code read is read again
CODE = ("core/features/*.py", "tabular/*.py", "stages/parts/source_*.py")
CONFIG: Any = {"source": True, "timezone": True, "columns": True, "cleaning": True, "label": {"event_type"}}


def find_pattern(params: Params, dataset: DatasetConfig) -> str | None:
    """Where the files of a day lie, with ``{day}`` in the day's place; None if the source is not divided by day."""
    path = params.data.source or getattr(dataset.source, "path", None)
    return path if path is not None and DAY in path else None


def read_days(
    params: Params,
    dataset: DatasetConfig,
    pattern: str,
    folder: Path,
    before: Path,
    tell_progress: Callable[[int, int], None],
) -> tuple[SourceRows, Counter[str], list[str]]:
    """Write ``folder/events``, a file a day, as `closedloop.stages.ingest.ingest` does of a whole source.

    A day whose files, and what the config says of them, are as they were keeps what lies in ``before``; memory holds
    the rows of one day.

    Returns
    -------
    SourceRows, Counter, list of str
        Counts and dropped rows of all days, without the rows that are kept; events by type; and the days that were
        read.

    Raises
    ------
    DataError
        If an event is of another UTC day than its file, or no file is before ``params.as_of``.
    """
    there = {day: keys for day, keys in list_day_files(pattern).items() if day < params.as_of}
    if not there:
        raise DataError(f"data.source {pattern!r}: no file of a day before as_of {params.as_of}")
    known = read_json(before / LEDGER, made_by="closedloop ingest") if (before / LEDGER).is_file() else {}
    earlier = read_table(before / "dropped.parquet", made_by="closedloop ingest") if known else pd.DataFrame()
    whole, ledger, types, read = SourceRows(), {}, Counter[str](), []
    basis = f"{dataset.model_dump_json(include=CONFIG)} {_digest_code()}"
    place = re.split(r"[*{]", pattern)[0]  # a source that was moved as a whole did not change
    for number, (day, keys) in enumerate(there.items()):
        own = {address.removeprefix(place): value for address, value in keys.items()}
        key = hashlib.sha256(json.dumps([basis, own]).encode()).hexdigest()
        if known.get(f"{day}", {}).get("key") == key:
            one = known[f"{day}"]
            if one["event_types"]:  # a day of which every row was dropped has no file
                keep_file(before / f"events/{day}.parquet", folder / f"events/{day}.parquet")
            dropped = earlier[earlier["day"] == f"{day}"]
        else:
            one, dropped = _read_day(params, dataset, pattern, day, keys, folder)
            read.append(f"{day}")
        ledger[f"{day}"] = {**one, "key": key}
        whole.rows_read += one["rows_read"]
        whole.findings.add(Findings(one["blank"], one["missing_words"]))
        types.update(one["event_types"])
        whole.dropped += [dropped] if one["rows_read"] else []
        tell_progress(number + 1, len(there))
    whole.broken = [rows.drop(columns=["day", "source", "row", "customer_id"]) for rows in whole.dropped]
    logger.info(
        "days of the source: %d; read, since they are new or changed: %s", len(there), ", ".join(read) or "none"
    )
    write_json(folder / LEDGER, ledger)
    return whole, types, read


def list_customers(events_dir: Path) -> np.ndarray:
    """The ids in all days' events, sorted."""
    ids: set[str] = set()
    for path in sorted(events_dir.glob("*.parquet")):
        ids.update(read_table(path, ["customer_id"], made_by="closedloop ingest")["customer_id"].dropna().unique())
    return np.array(sorted(ids), dtype=object)


def _digest_code() -> str:
    package, digest = Path(closedloop.__file__).parent, hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in package.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_day(
    params: Params, dataset: DatasetConfig, pattern: str, day: dt.date, keys: Mapping[str, str], folder: Path
) -> tuple[dict[str, Any], pd.DataFrame]:
    with fetch_day(pattern, day, list(keys)) as path:
        data = params.data.model_copy(update={"source": path})
        read = read_rows(params.model_copy(update={"data": data}), dataset, may_be_empty=True)
    if not read.rows_read:  # a day on which nothing happened has a header all the same
        return {"rows_read": 0, "event_types": {}, "blank": {}, "missing_words": {}}, pd.DataFrame()
    events = pd.concat(read.kept, ignore_index=True)
    other = events.loc[events["time"].dt.date != day, "time"]
    if len(other):
        raise DataError(
            f"data.source {pattern!r}: of {day} {count_noun(len(other), 'event')} of {len(events)} "
            f"is of another UTC day, such as {other.iloc[0]:%Y-%m-%d %H:%M:%S}: divide files by the UTC day of their "
            f"events, or give a pattern with * in place of {DAY}, which reads all of them each time"
        )
    write_event_days(folder / "events", events)
    report = {
        "rows_read": read.rows_read,
        "event_types": {str(name): int(count) for name, count in events["event_type"].value_counts().items()},
        "blank": read.findings.blank,
        "missing_words": read.findings.missing_words,
    }
    dropped = pd.concat(read.dropped, ignore_index=True)
    dropped.insert(0, "day", f"{day}")
    return report, dropped
