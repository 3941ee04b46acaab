"""ingest: the data set's source to canonical Parquet tables, and a record of every row that was dropped."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from closedloop.adapters.sources import read_chunks
from closedloop.adapters.tables import write_event_days, write_table
from closedloop.core.canonical import parse_labels, parse_numbers, parse_times
from closedloop.core.cleaning import CleaningRules, add_hashes, count_dirt, find_dirt, is_blank, normalise_ids
from closedloop.dataset import DatasetConfig, SimulatorSource
from closedloop.errors import DataError
from closedloop.files import replace_folder, write_json
from closedloop.params import Params

logger = logging.getLogger(__name__)
FILES_A_STEP = 50


@dataclass
class _Harvest:
    """What reading a source yields, part by part."""

    kept: list[pd.DataFrame] = field(default_factory=list)
    dirt: list[pd.DataFrame] = field(default_factory=list)
    dropped: list[pd.DataFrame] = field(default_factory=list)
    seen: np.ndarray = field(default_factory=lambda: np.array([], dtype="uint64"))
    rows_read: int = 0
    blank: dict[str, int] = field(default_factory=dict)


def ingest(params: Params, dataset: DatasetConfig, *, raw_dir: Path, metrics_path: Path) -> dict[str, Any]:
    """Write ``raw_dir`` (customers, events by day, dropped rows) and ``metrics_path``; returns the latter's content.

    Nothing at or after ``params.as_of`` is written: to the workflow it has not happened yet.

    Raises
    ------
    DataError
        If the source cannot be read, or nothing is left of it.
    """
    with replace_folder(raw_dir) as folder:
        if isinstance(dataset.source, SimulatorSource):
            report = _ingest_simulated(params, folder)
        elif dataset.kind == "events":
            report = _ingest_events(params, dataset, folder)
        else:
            report = _ingest_table(params, dataset, folder)
        write_json(folder / "ingest.json", report)
    write_json(metrics_path, report)
    return report


def _ingest_simulated(params: Params, folder: Path) -> dict[str, Any]:
    from closedloop.core.simulator import SimulatorSpec, simulate

    given = params.simulator.model_dump(exclude={"start_date"}, exclude_none=True)
    spec = SimulatorSpec(seed=params.seed, **given)
    logger.info("simulating %d customers from %s to %s", spec.customers, params.simulator.start_date, params.as_of)
    shop = simulate(spec, start=params.simulator.start_date, end=params.as_of)
    write_table(folder / "customers.parquet", shop.customers)
    (folder / "events").mkdir()
    logger.info("writing %d events by day", len(shop.events))
    days = write_event_days(folder / "events", shop.events)
    (folder / "truth.json").write_text(json.dumps(shop.truth, indent=2) + "\n", encoding="utf-8")
    counts = {"customers": len(shop.customers), "events": len(shop.events), "days": days}
    return {"rows_read": len(shop.events), "rows_kept": len(shop.events), "rows_dropped": 0, "dropped": [], **counts}


def _ingest_events(params: Params, dataset: DatasetConfig, folder: Path) -> dict[str, Any]:
    harvest = _read_rows(params, dataset)
    events = pd.concat(harvest.kept, ignore_index=True)
    known = events["time"] < pd.Timestamp(params.as_of_at)
    later, events = int((~known).sum()), events[known]
    if events.empty:
        raise DataError(
            f"data.source: no event before as_of {params.as_of} is left "
            f"({harvest.rows_read} rows read, {later} at or after as_of)"
        )
    customers = _read_customers(params, dataset, events, harvest.blank)
    write_table(folder / "customers.parquet", customers)
    (folder / "events").mkdir()
    days = write_event_days(folder / "events", events)
    _write_dropped(folder / "dropped.parquet", harvest)
    counts = {"customers": len(customers), "events": len(events), "days": days, "rows_at_or_after_as_of": later}
    return {**_count_rows(harvest), **counts, "blank_values": harvest.blank}


def _ingest_table(params: Params, dataset: DatasetConfig, folder: Path) -> dict[str, Any]:
    harvest = _read_rows(params, dataset)
    customers = pd.concat(harvest.kept, ignore_index=True)
    later = 0
    if dataset.columns.time is not None:
        known = customers["event_timestamp"] < pd.Timestamp(params.as_of_at)
        later, customers = int((~known).sum()), customers[known]
    if customers.empty:
        raise DataError(
            f"data.source: no row before as_of {params.as_of} is left "
            f"({harvest.rows_read} rows read, {later} at or after as_of)"
        )
    write_table(folder / "customers.parquet", customers.sort_values("customer_id", kind="stable"))
    _write_dropped(folder / "dropped.parquet", harvest)
    counts = {"customers": len(customers), "rows_at_or_after_as_of": later}
    return {**_count_rows(harvest), **counts, "blank_values": harvest.blank}


def _read_rows(params: Params, dataset: DatasetConfig) -> _Harvest:
    """Read, clean and convert the source chunk by chunk."""
    assert not isinstance(dataset.source, SimulatorSource)
    columns, cleaning = dataset.columns, dataset.cleaning
    rules = CleaningRules(
        entity_id=columns.entity_id,
        drop_missing_id=cleaning.drop_missing_id,
        drop_duplicates=cleaning.drop_duplicates,
        cancellation_column=cleaning.cancellation.column if cleaning.cancellation else None,
        cancellation_prefix=cleaning.cancellation.prefix if cleaning.cancellation else "",
        require_positive=cleaning.require_positive,
    )
    harvest = _Harvest()
    for name, first, rows in read_chunks(dataset.source, params.data.source, _needed_columns(dataset)):
        number_of_row = pd.Series(np.arange(first, first + len(rows)), index=rows.index)
        numbers = {
            column: parse_numbers(rows[column], place=name, row_numbers=number_of_row)
            for column in cleaning.require_positive
        }
        dirt = find_dirt(rows, rules, numbers, harvest.seen)
        if rules.drop_duplicates:
            harvest.seen = add_hashes(harvest.seen, rows)
        bad = dirt.any(axis=1)
        place = pd.DataFrame(
            {"source": name, "row": number_of_row, "customer_id": normalise_ids(rows[columns.entity_id])}
        )
        harvest.dropped.append(place[bad].join(dirt[bad]))
        harvest.dirt.append(dirt)
        harvest.rows_read += len(rows)
        if len(harvest.kept) % FILES_A_STEP == FILES_A_STEP - 1:
            logger.info("%s: %d rows so far", name, harvest.rows_read)
        convert = _convert_events if dataset.kind == "events" else _convert_entities
        harvest.kept.append(convert(dataset, rows[~bad], number_of_row[~bad], name, harvest.blank))
    if harvest.rows_read == 0:
        raise DataError("data.source: there are column names, but no rows")
    return harvest


def _needed_columns(dataset: DatasetConfig) -> list[str]:
    columns, cleaning = dataset.columns, dataset.cleaning
    names = [columns.entity_id, columns.time, columns.amount, columns.quantity, columns.event_type]
    names += [cleaning.cancellation.column] if cleaning.cancellation else []
    names += list(cleaning.require_positive)
    if dataset.kind == "table":
        names += [*columns.attributes, columns.sensitive, columns.label.column if columns.label else None]
    return list(dict.fromkeys(name for name in names if name is not None))


def _convert_events(
    dataset: DatasetConfig, rows: pd.DataFrame, row_numbers: pd.Series, place: str, _blank: dict[str, int]
) -> pd.DataFrame:
    columns = dataset.columns
    assert columns.time is not None
    assert dataset.label is not None
    where: dict[str, Any] = {"place": place, "row_numbers": row_numbers}
    events = pd.DataFrame({"customer_id": normalise_ids(rows[columns.entity_id])})
    if columns.event_type is None:
        events["event_type"] = dataset.label.event_type
    else:
        events["event_type"] = rows[columns.event_type].astype("string").str.strip().astype(object)
    events["time"] = parse_times(rows[columns.time], timezone=dataset.timezone, **where)
    if columns.amount is None:
        events["amount"] = np.nan
    else:
        events["amount"] = parse_numbers(rows[columns.amount], **where)
        if columns.quantity is not None:
            events["amount"] *= parse_numbers(rows[columns.quantity], **where)
    return events


def _convert_entities(
    dataset: DatasetConfig, rows: pd.DataFrame, row_numbers: pd.Series, place: str, blank: dict[str, int]
) -> pd.DataFrame:
    columns = dataset.columns
    assert columns.label is not None
    where: dict[str, Any] = {"place": place, "row_numbers": row_numbers}
    entities = pd.DataFrame({"customer_id": normalise_ids(rows[columns.entity_id])})
    if columns.time is not None:
        times = parse_times(rows[columns.time], timezone=dataset.timezone, **where)
        entities["event_timestamp"] = times.dt.floor("D")
    _add_attributes(entities, dataset, rows, where, blank)
    label = columns.label
    entities["churned"] = parse_labels(rows[label.column], churned=label.churned, stayed=label.stayed, **where)
    return entities


def _add_attributes(
    target: pd.DataFrame, dataset: DatasetConfig, rows: pd.DataFrame, where: dict[str, Any], blank: dict[str, int]
) -> None:
    sensitive = dataset.columns.sensitive
    for name in (*dataset.columns.attributes, *([sensitive] if sensitive else [])):
        missing = is_blank(rows[name])
        if missing.any():
            blank[name] = blank.get(name, 0) + int(missing.sum())
        if name in dataset.columns.numeric:
            target[name] = parse_numbers(rows[name], **where)
        else:
            target[name] = rows[name].astype("string").str.strip().astype(object).where(~missing, None)


def _read_customers(
    params: Params, dataset: DatasetConfig, events: pd.DataFrame, blank: dict[str, int]
) -> pd.DataFrame:
    """The customers' own source where the data set has one, else the ids that occur in the events."""
    if dataset.customers_source is None:
        return pd.DataFrame({"customer_id": np.sort(events["customer_id"].dropna().unique())})
    columns, parts = dataset.columns, []
    needed = [name for name in (columns.entity_id, *columns.attributes, columns.sensitive, columns.since) if name]
    for name, first, rows in read_chunks(
        dataset.customers_source, params.data.customers_source, needed, key="data.customers_source"
    ):
        where: dict[str, Any] = {"place": name, "row_numbers": pd.Series(np.arange(first, first + len(rows)))}
        part = pd.DataFrame({"customer_id": normalise_ids(rows[columns.entity_id])})
        _add_attributes(part, dataset, rows, where, blank)
        if columns.since is not None:
            part[columns.since] = parse_times(rows[columns.since], timezone=dataset.timezone, **where)
        parts.append(part)
    if not any(len(part) for part in parts):
        raise DataError("data.customers_source: there are column names, but no rows")
    customers = pd.concat(parts, ignore_index=True)
    if columns.since is not None:
        customers = customers[customers[columns.since] < pd.Timestamp(params.as_of_at)]
    return customers.sort_values("customer_id", kind="stable")


def _write_dropped(path: Path, harvest: _Harvest) -> None:
    write_table(path, pd.concat(harvest.dropped, ignore_index=True))


def _count_rows(harvest: _Harvest) -> dict[str, Any]:
    dirt = pd.concat(harvest.dirt, ignore_index=True)
    dropped = int(dirt.any(axis=1).sum())
    return {
        "rows_read": harvest.rows_read,
        "rows_kept": harvest.rows_read - dropped,
        "rows_dropped": dropped,
        "dropped": count_dirt(dirt),
    }
