"""features: write one file of feature rows for each snapshot, from windows over events or a table's columns."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from closedloop.config.dataset import DatasetConfig
from closedloop.config.featureset import build_window_spec, list_features
from closedloop.config.layout import Layout
from closedloop.config.params import Params
from closedloop.core.features.daily import DAILY_COLUMNS
from closedloop.core.features.windows import (
    ORIGINS_COLUMNS,
    PAST_COLUMNS,
    WindowSpec,
    combine_windows,
    date_windows,
    feature_names,
    find_first_days,
    select_past,
)
from closedloop.errors import ConfigError, DataError, count_noun
from closedloop.files import replace_folder, write_text
from closedloop.stages.parts.daily import list_daily, update_daily
from closedloop.stages.parts.snapshots import ROW_KEY, list_feature_snapshots
from closedloop.tabular.tables import build_schema, read_table, write_batches, write_table

if TYPE_CHECKING:
    import pyarrow as pa

    from closedloop.adapters.duckdb import Engine, Session

logger = logging.getLogger(__name__)


def compute_features(
    params: Params,
    dataset: DatasetConfig,
    engine: Engine,
    layout: Layout,
    *,
    snapshots: Sequence[dt.datetime] | None = None,
) -> dict[str, int]:
    """Write ``layout.features/YYYY-MM-DD.parquet``; with ``snapshots`` None, for all snapshots that the data allow.

    Returns
    -------
    dict
        ``rows``, ``snapshots`` and ``features``.
    """
    count, columns = len(list_features(params, dataset).names), dataset.columns
    attributes: dict[str, Literal["numeric", "categorical"]] = dict.fromkeys(columns.numeric, "numeric")
    attributes.update(dict.fromkeys(columns.categorical, "categorical"))
    if dataset.kind == "table":
        # the stage must have this output, which a table does not need; DVC warns of an empty folder three times a run
        write_text(layout.daily / "none.txt", "A data set of kind 'table' has no daily aggregates.\n")
        return {**_write_table_rows(params, layout, describe_rows((), attributes)), "features": count}
    report = write_window_features(
        layout,
        engine,
        spec=build_window_spec(params, dataset),
        snapshots=snapshots or list_feature_snapshots(params, dataset, layout.raw / "events"),
        attributes=attributes,
        since_column=columns.since,
    )
    return {**report, "features": count}


def write_window_features(
    layout: Layout,
    engine: Engine,
    *,
    spec: WindowSpec,
    snapshots: Sequence[dt.datetime],
    attributes: Mapping[str, Literal["numeric", "categorical"]],
    since_column: str | None,
) -> dict[str, int]:
    """Update ``layout.daily`` and write ``layout.features/YYYY-MM-DD.parquet``, one file a snapshot and no other.

    Each file is sorted by customer_id; columns: customer_id, event_timestamp (timestamp[us, UTC]), `feature_names`
    (float64), then ``attributes`` (numeric: float64, categorical: string), null for customers not in
    ``customers.parquet``. ``since_column`` there is where tenure counts from; without it, from the first event.

    Returns
    -------
    dict
        ``daily_files`` and ``daily_files_written``, ``snapshots``, ``rows``.

    Raises
    ------
    DataError
        If a table cannot be read, a customer stands in it twice, or no customer is active at any snapshot.
    ConfigError
        If an attribute is called like a feature.
    """
    events_dir, customers_path = layout.raw / "events", layout.raw / "customers.parquet"
    written = update_daily(events_dir, layout.daily, engine=engine)
    files = list_daily(layout.daily)
    plan = _Plan(spec, attributes, since_column, engine)

    def write(session: Session, snapshot: dt.datetime) -> int:
        reach = snapshot - dt.timedelta(days=spec.lookback_days), snapshot
        plan.bind(session, list_daily(layout.daily, *reach), customers_path)
        batches = session.read_batches(plan.define(session, snapshot))
        rows = write_batches(folder / f"{snapshot:%Y-%m-%d}.parquet", batches, plan.schema)
        logger.info("snapshot %s, customers: %d", snapshot.date(), rows)
        return rows

    with replace_folder(layout.features) as folder:
        with engine.open_session() as session:
            plan.bind(session, files, customers_path)
            plan.store_origins(session, customers_path)
        rows = sum(engine.map(write, snapshots))
        if not rows:
            raise DataError(
                f"{events_dir}: no customer has an event of type {spec.label_event_type!r} "
                f"in the {count_noun(spec.active_days, 'day')} before any of "
                f"{count_noun(len(snapshots), 'snapshot')}"
            )
    return {
        "daily_files": len(files),
        "daily_files_written": written,
        "snapshots": len(snapshots),
        "rows": rows,
    }


class _Plan:
    """The queries of a build: what holds no date is compiled once, since that takes longer than a small snapshot."""

    def __init__(
        self, spec: WindowSpec, attributes: Mapping[str, str], since_column: str | None, engine: Engine
    ) -> None:
        import ibis

        taken = {name.casefold() for name in ("customer_id", "event_timestamp", *feature_names(spec))}
        if clash := [name for name in attributes if name.casefold() in taken]:
            raise ConfigError(f"columns: attribute {clash[0]!r} is called like a computed column; rename it")
        self.spec, self.attributes, self.engine = spec, attributes, engine
        columns = {"customer_id": "string"}
        columns |= {name: "float64" if kind == "numeric" else "string" for name, kind in attributes.items()}
        if since_column is not None:
            columns[since_column] = "timestamp(6)"
        self.customer_columns = columns
        self.customers = ibis.table(columns, name="customers")
        self.daily = ibis.table(DAILY_COLUMNS, name="daily")
        self.origins = ibis.table(ORIGINS_COLUMNS, name="origins")
        if since_column is None:
            self._first_days = find_first_days(self.daily, spec)
        else:
            origin_day = self.customers[since_column].date()
            self._first_days = self.customers.select("customer_id", origin_day=origin_day)
        combined = combine_windows(ibis.table(PAST_COLUMNS, name="past"), spec)
        self.windows = ibis.table(combined.schema(), name="windows")
        self._windows_sql = engine.compile(combined)
        self.schema = describe_rows(feature_names(spec), attributes)

    def bind(self, session: Session, files: Sequence[Path], customers_path: Path) -> None:
        session.bind("daily", files, DAILY_COLUMNS)
        session.bind("customers", [customers_path], self.customer_columns)

    def store_origins(self, session: Session, customers_path: Path) -> None:
        """Days from which tenure counts, computed once for all snapshots."""
        counts = self.customers.aggregate(rows=self.customers.count(), ids=self.customers.customer_id.nunique())
        rows, ids = next(session.read_batches(self.engine.compile(counts))).to_pylist()[0].values()
        if rows != ids:
            raise DataError(
                f"{customers_path}: customer_id must be unique and given, found {count_noun(ids, 'id')} in "
                f"{count_noun(rows, 'row')}"
            )
        session.store("origins", self.engine.compile(self._first_days))

    def define(self, session: Session, snapshot: dt.datetime) -> str:
        """Define the views of a snapshot; returns the query of its rows."""
        session.define("past", self.engine.compile(select_past(self.daily, snapshot, self.spec)))
        session.define("windows", self._windows_sql)
        dated = date_windows(self.windows, self.origins, snapshot, self.spec)
        known = self.customers.select("customer_id", *self.attributes)
        joined = dated.left_join(known, "customer_id").order_by("customer_id")
        return self.engine.compile(joined.select(*self.schema.names))


def _write_table_rows(params: Params, layout: Layout, schema: pa.Schema) -> dict[str, int]:
    """Write a table's feature rows; a table without a time column is one snapshot, at as_of."""
    import pandas as pd

    path = layout.raw / "customers.parquet"
    customers = read_table(path, made_by="closedloop ingest")
    if "event_timestamp" not in customers:
        customers["event_timestamp"] = pd.Timestamp(params.as_of_at).as_unit("us")
    repeated = customers.loc[customers.duplicated(["customer_id", "event_timestamp"]), "customer_id"]
    if len(repeated):
        raise DataError(
            f"{path}: customer_id must be unique at each time, found {repeated.iloc[0]!r} again "
            f"({count_noun(len(repeated), 'such row')})"
        )
    days = 0
    with replace_folder(layout.features) as folder:
        for day, rows in customers.groupby(customers["event_timestamp"].dt.date):
            ordered = rows.sort_values("customer_id", kind="stable")[schema.names]
            write_table(folder / f"{day}.parquet", ordered, schema)
            days += 1
    return {"rows": len(customers), "snapshots": days}


def describe_rows(computed: Sequence[str], attributes: Mapping[str, str]) -> pa.Schema:
    """The columns of feature rows: computed ones, and attributes by their kind."""
    described = {name: "float64" if kind == "numeric" else "string" for name, kind in attributes.items()}
    return build_schema({**ROW_KEY, **dict.fromkeys(computed, "float64"), **described})
