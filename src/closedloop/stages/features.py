"""features: the roll-up brought up to date, then one file of window features a snapshot."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from closedloop.adapters.engine import write_batches
from closedloop.adapters.tables import UTC_TIME, list_event_days
from closedloop.core.labels import compute_labels, is_closed
from closedloop.core.rollup import ROLLUP_COLUMNS
from closedloop.core.windows import (
    ORIGINS_COLUMNS,
    PAST_COLUMNS,
    WindowSpec,
    combine_windows,
    date_windows,
    feature_names,
    find_first_days,
    list_snapshots,
    select_past,
)
from closedloop.errors import ConfigError, DataError
from closedloop.files import replace_folder
from closedloop.stages.rollup import list_rollup, update_rollup

if TYPE_CHECKING:
    import pandas as pd

    from closedloop.adapters.engine import Engine, Session
    from closedloop.dataset import DatasetConfig
    from closedloop.params import Params

logger = logging.getLogger(__name__)
LABELS_ARROW = pa.schema([("customer_id", pa.string()), ("event_timestamp", UTC_TIME), ("churned", pa.bool_())])


def build_features(
    events_dir: Path,
    customers_path: Path,
    rollup_dir: Path,
    features_dir: Path,
    *,
    spec: WindowSpec,
    snapshots: Sequence[dt.datetime],
    attributes: Mapping[str, Literal["numeric", "categorical"]],
    since_column: str | None,
    engine: Engine,
) -> dict[str, int]:
    """Update the roll-up and write ``features_dir/YYYY-MM-DD.parquet``, one file a snapshot and no other.

    Each file is sorted by customer_id; columns: customer_id, event_timestamp (timestamp[us, UTC]), `feature_names`
    (float64), then ``attributes`` (numeric: float64, categorical: string), null for customers not in
    ``customers_path``. ``since_column`` there is where tenure counts from; without it, from the first event.

    Returns
    -------
    dict
        ``rollup_files`` and ``rollup_files_written``, ``snapshots``, ``rows``.

    Raises
    ------
    DataError
        If a table cannot be read, a customer stands in it twice, or nobody is active at any snapshot.
    ConfigError
        If an attribute is called like a feature.
    """
    written = update_rollup(events_dir, rollup_dir, engine=engine)
    files = list_rollup(rollup_dir)
    plan = _Plan(spec, attributes, since_column, engine)

    def write(session: Session, snapshot: dt.datetime) -> int:
        reach = snapshot - dt.timedelta(days=spec.lookback_days), snapshot
        plan.bind(session, list_rollup(rollup_dir, *reach), customers_path)
        batches = session.read_batches(plan.define(session, snapshot))
        rows = write_batches(folder / f"{snapshot:%Y-%m-%d}.parquet", batches, plan.schema)
        logger.info("snapshot %s: %d customers", snapshot.date(), rows)
        return rows

    with replace_folder(features_dir) as folder:
        with engine.open_session() as session:
            plan.bind(session, files, customers_path)
            plan.store_origins(session, customers_path)
        rows = sum(engine.map(write, snapshots))
        if not rows:
            raise DataError(
                f"{events_dir}: nobody has an event of type {spec.label_event_type!r} in the {spec.active_days} days "
                f"before any of the {len(snapshots)} snapshots"
            )
    return {
        "rollup_files": len(files),
        "rollup_files_written": written,
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
        self.rollup = ibis.table(ROLLUP_COLUMNS, name="rollup")
        self.origins = ibis.table(ORIGINS_COLUMNS, name="origins")
        if since_column is None:
            self._first_days = find_first_days(self.rollup, spec)
        else:
            origin_day = self.customers[since_column].date()
            self._first_days = self.customers.select("customer_id", origin_day=origin_day)
        combined = combine_windows(ibis.table(PAST_COLUMNS, name="past"), spec)
        self.windows = ibis.table(combined.schema(), name="windows")
        self._windows_sql = engine.compile(combined)
        self.schema = describe_rows(feature_names(spec), attributes)

    def bind(self, session: Session, files: Sequence[Path], customers_path: Path) -> None:
        session.bind("rollup", files, ROLLUP_COLUMNS)
        session.bind("customers", [customers_path], self.customer_columns)

    def store_origins(self, session: Session, customers_path: Path) -> None:
        """Days from which tenure counts, computed once for all snapshots."""
        counts = self.customers.aggregate(rows=self.customers.count(), ids=self.customers.customer_id.nunique())
        rows, ids = next(session.read_batches(self.engine.compile(counts))).to_pylist()[0].values()
        if rows != ids:
            raise DataError(f"{customers_path}: customer_id must be unique and given, found {ids} ids in {rows} rows")
        session.store("origins", self.engine.compile(self._first_days))

    def define(self, session: Session, snapshot: dt.datetime) -> str:
        """Define the views of a snapshot; returns the query of its rows."""
        session.define("past", self.engine.compile(select_past(self.rollup, snapshot, self.spec)))
        session.define("windows", self._windows_sql)
        dated = date_windows(self.windows, self.origins, snapshot, self.spec)
        known = self.customers.select("customer_id", *self.attributes)
        joined = dated.left_join(known, "customer_id").order_by("customer_id")
        return self.engine.compile(joined.select(*self.schema.names))


def build_labels(
    rollup_dir: Path,
    *,
    spec: WindowSpec,
    snapshots: Sequence[dt.datetime],
    horizon_days: int,
    as_of: dt.datetime,
    engine: Engine,
) -> pd.DataFrame:
    """customer_id (str), event_timestamp (datetime64[us, UTC]), churned (bool), sorted by snapshot and customer.

    Raises
    ------
    ConfigError
        If the horizon of a snapshot is open at ``as_of``.
    DataError
        If there is no roll-up.
    """
    import ibis

    files = list_rollup(rollup_dir)
    if not files:
        raise DataError(f"{rollup_dir}: holds no roll-up; 'closedloop features' writes it")
    rollup = ibis.table(ROLLUP_COLUMNS, name="rollup")
    labels = compute_labels(rollup, snapshots, spec, horizon_days=horizon_days, as_of=as_of)
    with engine.open_session() as session:
        session.bind("rollup", files, ROLLUP_COLUMNS)
        sql = engine.compile(labels.order_by("event_timestamp", "customer_id"))
        return session.read_frame(sql, LABELS_ARROW)


def list_feature_snapshots(params: Params, dataset: DatasetConfig, events_dir: Path) -> list[dt.datetime]:
    """Every snapshot up to ``as_of`` with ``warmup_days`` of history.

    Raises
    ------
    DataError
        If there are no events, or too few days of them.
    """
    assert dataset.label is not None
    days = list_event_days(events_dir)
    if not days:
        raise DataError(f"{events_dir}: holds no events; 'closedloop ingest' writes them")
    first = dt.datetime.combine(days[0], dt.time(), dt.UTC) + dt.timedelta(days=dataset.label.warmup_days)
    snapshots = list_snapshots(first, params.as_of_at, dataset.label.snapshot_every_days)
    if not snapshots:
        raise DataError(
            f"{events_dir}: events begin on {days[0]}, and {dataset.label.warmup_days} days of history "
            f"(label.warmup_days) end after as_of {params.as_of}: there is no snapshot"
        )
    return snapshots


def list_closed_snapshots(params: Params, dataset: DatasetConfig, events_dir: Path) -> list[dt.datetime]:
    """Those of `list_feature_snapshots` whose label is known at ``as_of``.

    Raises
    ------
    DataError
        If there is none.
    """
    assert dataset.label is not None
    horizon_days, as_of = dataset.label.horizon_days, params.as_of_at
    snapshots = list_feature_snapshots(params, dataset, events_dir)
    closed = [time for time in snapshots if is_closed(time, horizon_days=horizon_days, as_of=as_of)]
    if not closed:
        raise DataError(
            f"{events_dir}: no snapshot has a closed horizon of {horizon_days} days at as_of {params.as_of}; "
            f"the first is {snapshots[0]:%Y-%m-%d}"
        )
    return closed


def describe_rows(computed: Sequence[str], attributes: Mapping[str, str]) -> pa.Schema:
    """The columns of feature rows: computed ones, and attributes by their kind."""
    columns: list[tuple[str, pa.DataType]] = [("customer_id", pa.string()), ("event_timestamp", UTC_TIME)]
    columns += [(name, pa.float64()) for name in computed]
    for name, kind in attributes.items():
        columns.append((name, pa.float64() if kind == "numeric" else pa.string()))
    return pa.schema(columns)
