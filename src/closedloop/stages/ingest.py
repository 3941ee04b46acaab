"""ingest: convert the data set's source to canonical Parquet tables, and record every dropped row."""

from __future__ import annotations

import datetime as dt
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from closedloop.config.dataset import DatasetConfig
from closedloop.config.layout import Layout
from closedloop.config.params import Params
from closedloop.config.sources import SimulatorSource
from closedloop.core.features.cleaning import count_broken_rules
from closedloop.core.features.parsing import parse_ids
from closedloop.errors import DataError, count_noun
from closedloop.files import replace_folder, write_json
from closedloop.stages.parts.source_days import find_pattern, list_customers, read_days
from closedloop.stages.parts.source_rows import (
    Findings,
    Place,
    SourceRows,
    add_attributes,
    read_rows,
)
from closedloop.tabular.sources import read_chunks
from closedloop.tabular.tables import read_table, write_event_days, write_table

if TYPE_CHECKING:
    from closedloop.simulator.shop import Offers

logger = logging.getLogger(__name__)
TYPES_SHOWN = 20
CALLS_COLUMNS = ("customer_id", "arm", "campaign")  # of a campaign's list
SHOP_ID = re.compile(r"C[0-9]+")


def tell_nothing(done: int, days: int) -> None:
    """Show no progress."""


def ingest(
    params: Params,
    dataset: DatasetConfig,
    layout: Layout,
    tell_progress: Callable[[int, int], None] = tell_nothing,
) -> dict[str, Any]:
    """Write ``layout.raw`` (customers, events by day, dropped rows) and the report; return the report.

    Rows at or after ``params.as_of`` are left out: for the workflow they have not happened yet. Of a source that is
    divided by day only new and changed days are read; ``tell_progress`` gets the days done, and their number.

    Raises
    ------
    DataError
        If the source cannot be read, or no row of it is left.
    """
    with replace_folder(layout.raw) as folder:
        if isinstance(dataset.source, SimulatorSource):
            report = _ingest_simulated(params, folder)
        elif dataset.kind == "events" and (pattern := find_pattern(params, dataset)):
            report = _ingest_days(params, dataset, pattern, folder, layout.raw, tell_progress)
        elif dataset.kind == "events":
            report = _ingest_events(params, dataset, folder)
        else:
            report = _ingest_table(params, dataset, folder)
        write_json(folder / "ingest.json", report)
    write_json(layout.ingest_metrics, report)
    return report


def _ingest_simulated(params: Params, folder: Path) -> dict[str, Any]:
    from closedloop.simulator.shop import SimulatorSpec, simulate

    given = params.simulator.model_dump(exclude={"start_date", "calls"}, exclude_none=True)
    spec = SimulatorSpec(seed=params.seed, **given)
    logger.info(
        "simulating the shop from %s to %s; customers: %d", params.simulator.start_date, params.as_of, spec.customers
    )
    offers = _read_offers(params.simulator.calls)
    shop = simulate(spec, start=params.simulator.start_date, end=params.as_of, offers=offers)
    write_table(folder / "customers.parquet", shop.customers)
    (folder / "events").mkdir()
    logger.info("writing events by day: %d", len(shop.events))
    days = write_event_days(folder / "events", shop.events)
    (folder / "truth.json").write_text(json.dumps(shop.truth, indent=2) + "\n", encoding="utf-8")
    counts = {"customers": len(shop.customers), "events": len(shop.events), "days": days}
    return {"rows_read": len(shop.events), "rows_kept": len(shop.events), "rows_dropped": 0, "dropped": [], **counts}


def _read_offers(folder: str | None) -> list[Offers]:
    """The offers of each day to the treated customers on lists of `closedloop campaign start` (Parquet) in a folder."""
    from closedloop.simulator.regimes import OFFERS_SAVE
    from closedloop.simulator.shop import Offers

    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise DataError(f"simulator.calls: {folder}: there is no such folder")
    called: dict[dt.date, set[str]] = {}  # a customer on two lists of a day is called once
    for path in sorted(Path(folder).glob("*.parquet")):
        rows = read_table(path, CALLS_COLUMNS, made_by="closedloop campaign start").astype(str)
        treated = rows.loc[rows["arm"] == "treated", ["campaign", "customer_id"]]
        for day, name in treated.itertuples(index=False, name=None):
            if not SHOP_ID.fullmatch(name):
                raise DataError(f"{path}: customer_id {name!r}: no customer of the simulated shop, such as C000123")
            try:
                called.setdefault(dt.date.fromisoformat(day), set()).add(name)
            except ValueError:
                raise DataError(f"{path}: campaign {day!r}: expected its date, such as 2024-01-31") from None
    return [Offers(day, frozenset(called[day]), OFFERS_SAVE) for day in sorted(called)]


def _ingest_events(params: Params, dataset: DatasetConfig, folder: Path) -> dict[str, Any]:
    read = read_rows(params, dataset)
    events, later = _keep_known(params, read, "event", "time")
    ids = np.sort(events["customer_id"].dropna().unique())
    customers = _read_customers(params, dataset, ids, read.findings)
    write_table(folder / "customers.parquet", customers)
    (folder / "events").mkdir()
    days = write_event_days(folder / "events", events)
    _write_dropped(folder / "dropped.parquet", read)
    counts = {"customers": len(customers), "events": len(events), "days": days, "rows_at_or_after_as_of": later}
    types = {str(name): int(count) for name, count in events["event_type"].value_counts().items()}
    return {**_count_rows(read), **counts, **_count_event_types(dataset, types), **read.findings.report()}


def _keep_known(params: Params, read: SourceRows, noun: str, time: str | None) -> tuple[pd.DataFrame, int]:
    """The kept rows whose column ``time`` is before ``as_of`` (None: all of them), and how many are later."""
    rows = pd.concat(read.kept, ignore_index=True)
    known = rows if time is None else rows[rows[time] < pd.Timestamp(params.as_of_at)]
    later = len(rows) - len(known)
    if known.empty:
        raise DataError(
            f"data.source: no {noun} before as_of {params.as_of} is left "
            f"({count_noun(read.rows_read, 'row')} read, {later} at or after as_of)"
        )
    return known, later


def _ingest_days(
    params: Params,
    dataset: DatasetConfig,
    pattern: str,
    folder: Path,
    before: Path,
    tell_progress: Callable[[int, int], None],
) -> dict[str, Any]:
    (folder / "events").mkdir()
    read, types, days_read = read_days(params, dataset, pattern, folder, before, tell_progress)
    if not types:
        raise DataError(f"data.source: no event is left ({count_noun(read.rows_read, 'row')} read)")
    customers = _read_customers(params, dataset, list_customers(folder / "events"), read.findings)
    write_table(folder / "customers.parquet", customers)
    _write_dropped(folder / "dropped.parquet", read)
    days = len(list((folder / "events").glob("*.parquet")))
    counts = {"customers": len(customers), "events": types.total(), "days": days, "days_read": days_read}
    return {**_count_rows(read), **counts, **_count_event_types(dataset, types), **read.findings.report()}


def _count_event_types(dataset: DatasetConfig, found: Mapping[str, int]) -> dict[str, Any]:
    """Count events whose type the config does not list; log a warning of listed types without events."""
    absent = [name for name in dataset.event_types if name not in found]
    ignored = {name: count for name, count in found.items() if name not in dataset.event_types}
    if absent:
        logger.warning("event_types: no event is of type %s", ", ".join(absent))
    if ignored:
        logger.info("events of types that event_types does not list, and no feature counts: %s", ignored)
    return {"event_types_ignored": dict(list(ignored.items())[:TYPES_SHOWN])}


def _ingest_table(params: Params, dataset: DatasetConfig, folder: Path) -> dict[str, Any]:
    read = read_rows(params, dataset)
    time = None if dataset.columns.time is None else "event_timestamp"
    customers, later = _keep_known(params, read, "row", time)
    write_table(folder / "customers.parquet", customers.sort_values("customer_id", kind="stable"))
    _write_dropped(folder / "dropped.parquet", read)
    counts = {"customers": len(customers), "rows_at_or_after_as_of": later}
    return {**_count_rows(read), **counts, **read.findings.report()}


def _read_customers(params: Params, dataset: DatasetConfig, ids: np.ndarray, findings: Findings) -> pd.DataFrame:
    """Read the customers from their own source if the data set has one, else take the ids of the events."""
    source, columns = dataset.customers_source, dataset.columns
    if source is None:
        return pd.DataFrame({"customer_id": ids})
    parts = []
    needed = [name for name in (columns.entity_id, *columns.attributes, columns.sensitive, columns.since) if name]
    for name, first, rows in read_chunks(
        source, params.data.customers_source, needed, rename=columns.rename, key="data.customers_source"
    ):
        place = Place.of_source(source, name, pd.Series(np.arange(first, first + len(rows))))
        part = pd.DataFrame({"customer_id": parse_ids(rows[columns.entity_id], **place.words)})
        add_attributes(part, dataset, rows, place, findings)
        if columns.since is not None:
            part[columns.since] = place.read_times(rows[columns.since], dataset.timezone)
        parts.append(part)
    if not any(len(part) for part in parts):
        raise DataError("data.customers_source: there are column names, but no rows")
    customers = pd.concat(parts, ignore_index=True)
    if columns.since is not None:
        customers = customers[customers[columns.since] < pd.Timestamp(params.as_of_at)]
    return customers.sort_values("customer_id", kind="stable")


def _write_dropped(path: Path, read: SourceRows) -> None:
    write_table(path, pd.concat(read.dropped, ignore_index=True))


def _count_rows(read: SourceRows) -> dict[str, Any]:
    broken = pd.concat(read.broken, ignore_index=True)
    dropped = int(broken.any(axis=1).sum())
    return {
        "rows_read": read.rows_read,
        "rows_kept": read.rows_read - dropped,
        "rows_dropped": dropped,
        "dropped": count_broken_rules(broken),
    }
