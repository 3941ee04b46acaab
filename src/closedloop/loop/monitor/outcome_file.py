"""Outcomes from a file: what became of scored customers, where no label rule can tell."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from closedloop.config.dataset import DatasetConfig
from closedloop.core.features.parsing import parse_ids, parse_labels, parse_times
from closedloop.errors import DataError
from closedloop.records import LABEL_RULE, Outcome, is_issued
from closedloop.store.predictions import Predictions
from closedloop.store.samples import Samples
from closedloop.tabular.rows import open_rows

CUSTOMER, PREDICTION, OUTCOME = "customer_id", "prediction_id", "outcome"
CHUNK_ROWS = 50_000


@dataclasses.dataclass(frozen=True)
class FileReport:
    """Rows of the file, outcomes stored, and rows without a prediction that waits for its outcome."""

    rows: int
    stored: int
    unmatched: int


def store_outcomes(
    path: Path, dataset: DatasetConfig, samples: Samples, store: Predictions, *, as_of: dt.datetime, id_key: bytes
) -> FileReport:
    """Store the outcomes of a Parquet or CSV file; they count as the label rule's do, and a second run adds nothing.

    A row has the outcome as the data set's label column has it, or as 1 (churned) or 0 in a column ``outcome``. It
    names its prediction by ``prediction_id``, or the customer: then it is the outcome of the customer's predictions
    before ``as_of`` that have none yet, or, where the file has the data set's time column, of those of that day.

    Raises
    ------
    DataError
        Naming the first row that cannot be read, that repeats another one with the other outcome, or whose prediction
        id the service never gave. Nothing is stored then.
    """
    rows = pd.concat([*read_outcome_file(path, dataset)], ignore_index=True)
    keys = [name for name in (PREDICTION, CUSTOMER, "day") if name in rows]
    known = rows.drop_duplicates()
    repeated = known.duplicated(keys)
    if repeated.any():
        raise DataError(f"{path}: {known.loc[repeated, keys[0]].iloc[0]!r} is named with both outcomes")
    if PREDICTION in rows:
        never = [one for one in known[PREDICTION] if not is_issued(one, id_key)]
        if never:
            raise DataError(f"{path}: prediction_id {never[0]!r:.80} was never given ({len(never)} such in the file)")
        found = [Outcome(one, int(churned), as_of, LABEL_RULE) for one, churned in known[[PREDICTION, OUTCOME]].values]
        return FileReport(len(rows), store.insert(found).outcomes, 0)
    stored, matched = 0, set[int]()
    for snapshot in samples.list_unlabelled_snapshots(dataset.model_name, until=as_of):
        of_day = known if "day" not in known else known[known["day"] == pd.Timestamp(snapshot).floor("D")]
        outcomes = dict(zip(of_day[CUSTOMER], zip(of_day.index, of_day[OUTCOME], strict=True), strict=True))
        for chunk in samples.read_unlabelled(dataset.model_name, snapshot):
            some = [(one, *outcomes[who]) for one, who in chunk if who in outcomes]
            matched.update(row for _, row, _ in some)
            found = [Outcome(one, int(churned), as_of, LABEL_RULE) for one, _, churned in some]
            stored += store.insert(found).outcomes
    return FileReport(len(rows), stored, len(known) - len(matched))


def read_outcome_file(path: Path, dataset: DatasetConfig) -> Iterator[pd.DataFrame]:
    """The file in parts, with ``outcome`` (bool) and ``prediction_id``, or ``customer_id`` and perhaps ``day``."""
    columns = dataset.columns
    labels = [*([columns.label.column] if columns.label else []), OUTCOME]
    for needed in labels:
        file = open_rows(path, dataset.source, columns.rename, needed=[needed])
        if needed in file.schema.names:
            break
    names = file.schema.names
    key = next((name for name in (PREDICTION, columns.entity_id, CUSTOMER) if name in names), None)
    label = next((name for name in labels if name in names), OUTCOME)
    if key is None or label not in names:
        wanted = f"{PREDICTION} or {columns.entity_id}, and {label}"
        raise DataError(f"{path}: a file of outcomes has the columns {wanted}; found {', '.join(names) or 'none'}")
    churned: tuple[str, ...] = ("1",)
    stayed: tuple[str, ...] = ("0",)
    if columns.label is not None and label == columns.label.column:
        churned, stayed = columns.label.churned, columns.label.stayed
    day = columns.time if columns.time in names and key != PREDICTION else None
    first = 1
    for table in file.read_chunks([name for name in (key, label, day) if name], CHUNK_ROWS):
        rows = table.to_pandas()
        numbers = pd.Series(range(first, first + len(rows)), index=rows.index)
        first += len(rows)
        read = pd.DataFrame(
            {PREDICTION if key == PREDICTION else CUSTOMER: parse_ids(rows[key], place=str(path), row_numbers=numbers)}
        )
        if read.iloc[:, 0].isna().any():
            raise DataError(f"{path}, row {numbers[read.iloc[:, 0].isna()].iloc[0]}, column {key!r}: is empty")
        read[OUTCOME] = parse_labels(rows[label], churned=churned, stayed=stayed, place=str(path), row_numbers=numbers)
        if day is not None:
            where: dict[str, Any] = {"place": str(path), "row_numbers": numbers}
            times = parse_times(rows[day], timezone=dataset.timezone, time_format=file.time_format, **where)
            read["day"] = times.dt.floor("D")
        yield read
