"""The rows of a data set's source: cleaned and converted chunk by chunk, with counts of what was found."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from closedloop.config.dataset import ROW_NUMBER, DatasetConfig
from closedloop.config.params import Params
from closedloop.config.sources import FileSource, SimulatorSource, SqlSource
from closedloop.core.features.cleaning import (
    NOTHING_SEEN,
    CleaningRules,
    add_hashes,
    count_missing_words,
    find_broken_rules,
    hash_rows,
)
from closedloop.core.features.parsing import parse_codes, parse_ids, parse_labels, parse_numbers, parse_times
from closedloop.errors import DataError
from closedloop.tabular.sources import read_chunks

logger = logging.getLogger(__name__)
FILES_A_STEP = 50


@dataclass
class Findings:
    """Counts of values by column: of missing ones, and of words that elsewhere mean a missing value."""

    blank: dict[str, int] = field(default_factory=dict)
    missing_words: dict[str, dict[str, int]] = field(default_factory=dict)

    def count(self, column: str, values: pd.Series, *, blank: bool = True) -> None:
        """Count those of a converted column; ``blank`` False: only the words."""
        missing = int(values.isna().sum()) if blank else 0
        if missing:
            self.blank[column] = self.blank.get(column, 0) + missing
        if values.dtype == object:
            for word, count in count_missing_words(values).items():
                words = self.missing_words.setdefault(column, {})
                words[word] = words.get(word, 0) + count

    def add(self, other: Findings) -> None:
        """Count what another part of the source held."""
        for column, blank in other.blank.items():
            self.blank[column] = self.blank.get(column, 0) + blank
        for column, words in other.missing_words.items():
            own = self.missing_words.setdefault(column, {})
            for word, count in words.items():
                own[word] = own.get(word, 0) + count

    def report(self) -> dict[str, Any]:
        """The counts; the words are warned of as well."""
        for column, words in self.missing_words.items():
            shown = ", ".join(f"{word} ({count})" for word, count in words.items())
            logger.warning(
                "column %s holds %s: if that means a missing value, name it in source.na_values", column, shown
            )
        return {"blank_values": self.blank, "missing_words": self.missing_words}


@dataclass
class SourceRows:
    """The rows of a source, part by part: those that are kept, and of all of them which rules hit."""

    kept: list[pd.DataFrame] = field(default_factory=list)
    broken: list[pd.DataFrame] = field(default_factory=list)
    dropped: list[pd.DataFrame] = field(default_factory=list)
    seen: np.ndarray = field(default_factory=NOTHING_SEEN.copy)
    rows_read: int = 0
    findings: Findings = field(default_factory=Findings)


@dataclass(frozen=True)
class Place:
    """Where values stand, for the errors of parsing; and how numbers and times are written there."""

    name: str
    row_numbers: pd.Series
    decimal: str = "."
    time_format: str | None = None

    @classmethod
    def of_source(cls, source: FileSource | SqlSource, name: str, row_numbers: pd.Series) -> Place:
        """The place of rows of a source; a database has typed columns."""
        if isinstance(source, FileSource):
            return cls(name, row_numbers, source.decimal, source.time_format)
        return cls(name, row_numbers)

    def read_numbers(self, values: pd.Series) -> pd.Series:
        """A column of these rows as numbers."""
        return parse_numbers(values, place=self.name, row_numbers=self.row_numbers, decimal=self.decimal)

    def read_times(self, values: pd.Series, timezone: str | None) -> pd.Series:
        """A column of these rows as times, UTC."""
        return parse_times(values, timezone=timezone, time_format=self.time_format, **self.words)

    def select(self, rows: pd.Series) -> Place:
        """The place of some of the rows."""
        return replace(self, row_numbers=self.row_numbers[rows])

    @property
    def words(self) -> dict[str, Any]:
        """The arguments by which the functions of parsing name a value."""
        return {"place": self.name, "row_numbers": self.row_numbers}


def read_rows(params: Params, dataset: DatasetConfig, *, may_be_empty: bool = False) -> SourceRows:
    """Read, clean and convert the source chunk by chunk; without rows it is an error, unless it ``may_be_empty``."""
    assert not isinstance(dataset.source, SimulatorSource)
    read = SourceRows()
    columns = dataset.columns
    chunks = read_chunks(
        dataset.source,
        params.data.source,
        _list_columns(dataset),
        all_columns=dataset.cleaning.drop_duplicates,
        rename=columns.rename,
    )
    for name, first, rows in chunks:
        row_numbers = pd.Series(np.arange(first, first + len(rows)), index=rows.index)
        place = Place.of_source(dataset.source, name, row_numbers)
        if columns.entity_id == ROW_NUMBER:
            ids = pd.Series(np.arange(read.rows_read + 1, read.rows_read + 1 + len(rows)), index=rows.index)
        else:
            ids = rows[columns.entity_id]
        codes = parse_ids(ids, **place.words)
        kept = _drop_rows(dataset, rows, codes, place, read)
        if len(read.kept) % FILES_A_STEP == FILES_A_STEP - 1:
            logger.info("%s: rows so far: %d", name, read.rows_read)
        convert = _convert_events if dataset.kind == "events" else _convert_entities
        read.findings.count(columns.entity_id, codes[kept], blank=False)
        read.kept.append(convert(dataset, rows[kept], codes[kept], place.select(kept), read.findings))
    if read.rows_read == 0 and not may_be_empty:
        raise DataError("data.source: there are column names, but no rows")
    return read


def _drop_rows(dataset: DatasetConfig, rows: pd.DataFrame, ids: pd.Series, place: Place, read: SourceRows) -> pd.Series:
    """Note which rules hit which rows; returns which rows are kept."""
    cleaning = dataset.cleaning
    rules = CleaningRules(
        drop_missing_id=cleaning.drop_missing_id,
        cancellation_column=cleaning.cancellation.column if cleaning.cancellation else None,
        cancellation_prefix=cleaning.cancellation.prefix if cleaning.cancellation else "",
        require_positive=cleaning.require_positive,
        require_value=cleaning.require_value,
    )
    numbers = {column: place.read_numbers(rows[column]) for column in cleaning.require_positive}
    hashes = hash_rows(rows) if cleaning.drop_duplicates else None
    broken = find_broken_rules(rows, rules, ids, numbers, hashes=hashes, seen=read.seen)
    if hashes is not None:
        read.seen = add_hashes(read.seen, hashes)
    bad = broken.any(axis=1)
    where = pd.DataFrame({"source": place.name, "row": place.row_numbers, "customer_id": ids})
    read.dropped.append(where[bad].join(broken[bad]))
    read.broken.append(broken)
    read.rows_read += len(rows)
    return ~bad


def _list_columns(dataset: DatasetConfig) -> list[str]:
    """Columns that must be in the source."""
    columns, cleaning = dataset.columns, dataset.cleaning
    names = [columns.entity_id, columns.time, columns.amount, columns.quantity, columns.event_type]
    names += [cleaning.cancellation.column] if cleaning.cancellation else []
    names += [*cleaning.require_positive, *cleaning.require_value]
    if dataset.kind == "table":
        names += [*columns.attributes, columns.sensitive, columns.label.column if columns.label else None]
    return list(dict.fromkeys(name for name in names if name is not None and name != ROW_NUMBER))


def _convert_events(
    dataset: DatasetConfig, rows: pd.DataFrame, ids: pd.Series, place: Place, findings: Findings
) -> pd.DataFrame:
    columns = dataset.columns
    assert columns.time is not None
    assert dataset.label is not None
    events = pd.DataFrame({"customer_id": ids})
    if columns.event_type is None:
        events["event_type"] = dataset.label.event_type
    else:
        events["event_type"] = parse_codes(rows[columns.event_type], **place.words)
        findings.count(columns.event_type, events["event_type"], blank=False)
    events["time"] = place.read_times(rows[columns.time], dataset.timezone)
    if columns.amount is None:
        events["amount"] = np.nan
    else:
        events["amount"] = place.read_numbers(rows[columns.amount])
        if columns.quantity is not None:
            events["amount"] *= place.read_numbers(rows[columns.quantity])
    return events


def _convert_entities(
    dataset: DatasetConfig, rows: pd.DataFrame, ids: pd.Series, place: Place, findings: Findings
) -> pd.DataFrame:
    columns = dataset.columns
    assert columns.label is not None
    entities = pd.DataFrame({"customer_id": ids})
    if columns.time is not None:
        times = place.read_times(rows[columns.time], dataset.timezone)
        entities["event_timestamp"] = times.dt.floor("D")
    add_attributes(entities, dataset, rows, place, findings)
    label = columns.label
    entities["churned"] = parse_labels(rows[label.column], churned=label.churned, stayed=label.stayed, **place.words)
    return entities


def add_attributes(
    target: pd.DataFrame, dataset: DatasetConfig, rows: pd.DataFrame, place: Place, findings: Findings
) -> None:
    """Convert the columns that describe customers, and count what they hold, into ``target``."""
    sensitive = dataset.columns.sensitive
    for name in (*dataset.columns.attributes, *([sensitive] if sensitive else [])):
        if name in dataset.columns.numeric:
            target[name] = place.read_numbers(rows[name])
        else:
            target[name] = parse_codes(rows[name], **place.words)
        findings.count(name, target[name])
