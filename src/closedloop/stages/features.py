"""features: write one file of feature rows for each snapshot, from windows over events or a table's columns."""

from __future__ import annotations

import datetime as dt
import hashlib
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
from closedloop.files import keep_file, replace_folder, write_text
from closedloop.stages.parts.daily import DAILY_FORMAT, digest_file, list_daily, update_daily
from closedloop.stages.parts.snapshots import ROW_KEY, list_feature_snapshots
from closedloop.tabular.tables import build_schema, count_rows, read_footer, read_table, write_batches, write_table

if TYPE_CHECKING:
    import pyarrow as pa

    from closedloop.adapters.engines import Engine, Session

logger = logging.getLogger(__name__)
BASIS_KEY = b"closedloop.basis"


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

    A file carries the digest of what it is computed from, and is kept as it is where that did not change.

    Returns
    -------
    dict
        ``daily_files`` and ``daily_files_written``, ``snapshots`` and ``snapshots_written``, ``rows``.

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

    with replace_folder(layout.features) as folder:
        with engine.open_session() as session:
            plan.bind(session, files, customers_path)
            plan.store_origins(session, customers_path)
            basis = plan.digest_basis(session, snapshots, events_dir, customers_path)

        def write(session: Session, snapshot: dt.datetime) -> tuple[int, bool]:
            return plan.write(session, snapshot, basis[snapshot], layout, folder)

        done = list(engine.map(write, snapshots))
        rows, computed = (sum(column) for column in zip(*done, strict=True))
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
        "snapshots_written": computed,
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

    def digest_basis(
        self, session: Session, snapshots: Sequence[dt.datetime], events_dir: Path, customers_path: Path
    ) -> dict[dt.datetime, bytes]:
        """The inputs of each snapshot: the days in its reach, first days before it, and attributes.

        A customer whose first day is later changes none of it, unless the customers' own table describes them.
        """
        frame = session.read_frame(self.engine.compile(self.origins), build_schema(ORIGINS_COLUMNS))
        frame = frame.sort_values(["origin_day", "customer_id"], ignore_index=True)
        lines = frame["customer_id"].astype(str) + frame["origin_day"].astype(str)
        days = {path.stem: digest_file(path) for path in sorted(events_dir.glob("*.parquet"))}
        digest, found, done = hashlib.sha256(DAILY_FORMAT), {}, 0
        if len(self.customer_columns) > 1:
            digest.update(digest_file(customers_path))
        for snapshot in sorted(snapshots):
            until = int((frame["origin_day"] < snapshot.date()).sum())
            digest.update("\n".join(lines[done:until]).encode())
            first, done = snapshot - dt.timedelta(days=self.spec.lookback_days), until
            reach = [day.encode() + key for day, key in days.items() if f"{first:%F}" <= day < f"{snapshot:%F}"]
            found[snapshot] = digest.digest() + b"".join(reach)
        return found

    def write(
        self, session: Session, snapshot: dt.datetime, basis: bytes, layout: Layout, folder: Path
    ) -> tuple[int, bool]:
        """Write the file of a snapshot, or keep it; returns its rows, and whether they were computed."""
        reach, name = (snapshot - dt.timedelta(days=self.spec.lookback_days), snapshot), f"{snapshot:%Y-%m-%d}.parquet"
        self.bind(session, list_daily(layout.daily, *reach), layout.raw / "customers.parquet")
        query, asked = self.define(session, snapshot)
        digest = hashlib.sha256(asked + basis).hexdigest().encode()
        if read_footer(layout.features / name, BASIS_KEY) == digest:
            keep_file(layout.features / name, folder / name)
            return count_rows(folder / name), False
        rows = write_batches(folder / name, session.read_batches(query), self.schema, {BASIS_KEY: digest})
        logger.info("snapshot %s, customers: %d", snapshot.date(), rows)
        return rows, True

    def define(self, session: Session, snapshot: dt.datetime) -> tuple[str, bytes]:
        """Define the views of a snapshot; returns the query of its rows, and the digest of all that it asks."""
        past = self.engine.compile(select_past(self.daily, snapshot, self.spec))
        session.define("past", past)
        session.define("windows", self._windows_sql)
        dated = date_windows(self.windows, self.origins, snapshot, self.spec)
        known = self.customers.select("customer_id", *self.attributes)
        joined = dated.left_join(known, "customer_id").order_by("customer_id")
        query = self.engine.compile(joined.select(*self.schema.names))
        return query, hashlib.sha256(f"{past}\n{self._windows_sql}\n{query}".encode()).digest()


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
