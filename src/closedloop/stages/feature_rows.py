"""Feature rows of either kind of data set, one file a snapshot: windows for events, columns for a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from closedloop.adapters.tables import read_table, write_table
from closedloop.dataset import DatasetConfig
from closedloop.errors import DataError
from closedloop.featureset import build_window_spec, list_features
from closedloop.files import replace_folder
from closedloop.params import Params
from closedloop.stages.features import build_features, describe_rows, list_feature_snapshots

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Sequence

    from closedloop.adapters.engine import Engine


def compute_features(
    params: Params,
    dataset: DatasetConfig,
    engine: Engine,
    *,
    raw_dir: Path,
    rollup_dir: Path,
    features_dir: Path,
    snapshots: Sequence[dt.datetime] | None = None,
) -> dict[str, int]:
    """Write ``features_dir/YYYY-MM-DD.parquet``; ``snapshots`` None: all that the data allow.

    Returns
    -------
    dict
        ``rows``, ``snapshots`` and ``features``.
    """
    count, columns = len(list_features(params, dataset).names), dataset.columns
    attributes: dict[str, Literal["numeric", "categorical"]] = dict.fromkeys(columns.numeric, "numeric")
    attributes.update(dict.fromkeys(columns.categorical, "categorical"))
    if dataset.kind == "table":
        rollup_dir.mkdir(parents=True, exist_ok=True)
        return {**_write_table_rows(params, raw_dir, features_dir, describe_rows((), attributes)), "features": count}
    report = build_features(
        raw_dir / "events",
        raw_dir / "customers.parquet",
        rollup_dir,
        features_dir,
        spec=build_window_spec(params, dataset),
        snapshots=snapshots or list_feature_snapshots(params, dataset, raw_dir / "events"),
        attributes=attributes,
        since_column=columns.since,
        engine=engine,
    )
    return {**report, "features": count}


def _write_table_rows(params: Params, raw_dir: Path, features_dir: Path, schema: pa.Schema) -> dict[str, int]:
    """A table without time is one snapshot, at as_of; a customer occurs once a snapshot."""
    import pandas as pd

    customers = read_table(raw_dir / "customers.parquet", made_by="closedloop ingest")
    if "event_timestamp" not in customers:
        customers["event_timestamp"] = pd.Timestamp(params.as_of_at).as_unit("us")
    repeated = customers.loc[customers.duplicated(["customer_id", "event_timestamp"]), "customer_id"]
    if len(repeated):
        raise DataError(
            f"{raw_dir / 'customers.parquet'}: customer_id must be unique at a time, found {repeated.iloc[0]!r} again "
            f"({len(repeated)} such rows)"
        )
    days = 0
    with replace_folder(features_dir) as folder:
        for day, rows in customers.groupby(customers["event_timestamp"].dt.date):
            ordered = rows.sort_values("customer_id", kind="stable")[schema.names]
            write_table(folder / f"{day}.parquet", ordered, schema)
            days += 1
    return {"rows": len(customers), "snapshots": days}
