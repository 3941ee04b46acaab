"""training_set: label, join features point in time through Feast, split, and write the newest rows online."""

from __future__ import annotations

import datetime as dt
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from closedloop.adapters.feast import TIMESTAMP
from closedloop.config.dataset import DatasetConfig
from closedloop.config.layout import Layout
from closedloop.config.params import Params
from closedloop.core.actions.untreated import find_untreated
from closedloop.core.training.draw import draw_rows
from closedloop.core.training.splits import (
    assign_hash_split,
    count_newer,
    split_held_out,
    split_held_out_days,
    split_snapshots,
)
from closedloop.core.training.weights import WEIGHT
from closedloop.errors import ConfigError, DataError, count_noun
from closedloop.files import replace_folder, write_json
from closedloop.stages.parts.online import CUSTOMER, check_freshness, find_newest_snapshot, materialize_newest
from closedloop.tabular.tables import read_table, write_table

if TYPE_CHECKING:
    from closedloop.adapters.engines import Engine
    from closedloop.adapters.feast import Features

logger = logging.getLogger(__name__)
PARTS = ("train", "validation", "test")
LABEL, GROUP = "churned", "sensitive_group"
DAYS_MIN = 3


def build_training_set(
    params: Params,
    dataset: DatasetConfig,
    features: Features,
    engine: Engine,
    layout: Layout,
    actions: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """Write train, validation and test rows to ``layout.training``; publish and materialise the newest snapshot.

    Columns: customer_id, event_timestamp, churned (bool), sensitive_group (str, if the data set has one), features.
    Rows of customers who were treated in a campaign are left out; those who were held out stand for them, by being
    there several times.

    Parameters
    ----------
    actions : DataFrame, optional
        What campaigns did by ``params.as_of``, with `closedloop.core.actions.untreated.ACTION_COLUMNS`.

    Raises
    ------
    GateFailed
        If online rows differ from offline ones, or the newest features are older than allowed.
    DataError
        If a part holds no rows, or one class only.
    """
    newest = find_newest_snapshot(layout.features)
    age_days = check_freshness(features, newest=newest, events_dir=layout.raw / "events", as_of=params.as_of_at)
    labels = read_labels(params, dataset, engine, layout)
    labels["part"] = assign_parts(params, dataset, labels)
    labels = labels.dropna(subset="part").sort_values([TIMESTAMP, CUSTOMER], ignore_index=True)
    counts: dict[str, int] = {}
    if actions is not None:
        untreated = find_untreated(labels, actions, time=TIMESTAMP, blind=False)
        counts, labels = untreated.tell(), labels.assign(repeats=untreated.repeats)
        labels = labels[labels["repeats"] > 0].reset_index(drop=True)
    labels, known_rows = draw_parts(params, labels)
    require_classes(labels)
    logger.info("joining rows with their features, point in time: %d", len(labels))
    rows = features.read_historical(labels, layout.features)
    rows = _join_groups(rows, dataset, layout.raw)
    if counts:
        rows = rows.loc[rows.index.repeat(rows["repeats"])].reset_index(drop=True)
    rows = rows.drop(columns="repeats", errors="ignore")
    with replace_folder(layout.training) as folder:
        for part in PARTS:
            unused = ["part"] if part == "train" else ["part", WEIGHT]  # rows that only measure are an even draw
            write_table(folder / f"{part}.parquet", rows[rows["part"] == part].drop(columns=unused, errors="ignore"))
    features.publish(layout.features)
    serving = materialize_newest(features, layout.features, newest=newest, seed=params.seed)
    parts = {part: _describe(rows[rows["part"] == part]) for part in PARTS}
    optional = {"actions": counts, "known_rows": known_rows}
    report = {"parts": parts, "serving": {"age_days": age_days, **serving}}
    report |= {name: value for name, value in optional.items() if value}
    write_json(layout.training_set_metrics, report)
    return report


def draw_parts(params: Params, labels: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """The rows of each part within ``split.rows_max``, and how many each had before; empty where none has more.

    It draws before the join, so that only rows of the draw are joined with their features.
    """
    repeats = labels["repeats"] if "repeats" in labels else pd.Series(1, index=labels.index)
    known_rows = {str(part): int(rows) for part, rows in repeats.groupby(labels["part"]).sum().items()}
    most = params.split.rows_max
    if most is None or max(known_rows.values(), default=0) <= most:
        return labels, {}
    drawn = [draw_rows(rows, most, salt=str(params.seed)) for _, rows in labels.groupby("part")]
    return pd.concat(drawn).sort_index().reset_index(drop=True), known_rows


def read_labels(params: Params, dataset: DatasetConfig, engine: Engine, layout: Layout) -> pd.DataFrame:
    """customer_id, event_timestamp and churned of every snapshot whose label is known."""
    if dataset.kind == "table":
        return _read_table_labels(params, layout.raw / "customers.parquet")
    from closedloop.config.featureset import build_window_spec
    from closedloop.stages.parts.snapshots import build_labels, list_closed_snapshots

    assert dataset.label is not None
    snapshots = select_snapshots(params, list_closed_snapshots(params, dataset, layout.raw / "events"))
    return build_labels(
        layout.daily,
        spec=build_window_spec(params, dataset),
        snapshots=snapshots,
        horizon_days=dataset.label.horizon_days,
        as_of=params.as_of_at,
        engine=engine,
    )


def _read_table_labels(params: Params, path: Path) -> pd.DataFrame:
    customers = read_table(path, made_by="closedloop ingest")
    if TIMESTAMP in customers:
        days = sorted(time.to_pydatetime() for time in customers[TIMESTAMP].unique())
        customers = customers[customers[TIMESTAMP].isin(select_snapshots(params, days))]
    elif params.data.start_date or params.data.end_date:
        raise ConfigError("data.start_date, data.end_date: the table has no columns.time, so its rows have no day")
    else:
        customers[TIMESTAMP] = pd.Timestamp(params.as_of_at).as_unit("us")
    return customers[[CUSTOMER, TIMESTAMP, LABEL]]


def select_snapshots(params: Params, snapshots: list[dt.datetime]) -> list[dt.datetime]:
    """Select the snapshots, or a table's days, from ``data.start_date`` to ``data.end_date``, both included.

    Raises
    ------
    ConfigError
        If no snapshot lies between them.
    """
    first, last = params.data.start_date or dt.date.min, params.data.end_date or dt.date.max
    chosen = [time for time in snapshots if first <= time.date() <= last]
    if not chosen:
        raise ConfigError(
            f"data.start_date {first} to data.end_date {last}: no snapshot or day with a known label lies there; "
            f"there are {len(snapshots)} from {snapshots[0]:%Y-%m-%d} to {snapshots[-1]:%Y-%m-%d}"
        )
    return chosen


def assign_parts(params: Params, dataset: DatasetConfig, labels: pd.DataFrame) -> pd.Series:
    """The part of each row: by time if the rows have one and ``split.by`` says so, else by a stable hash of the id.

    None: not used.
    """
    split, ids, times, salt = params.split, labels[CUSTOMER], labels[TIMESTAMP], str(params.seed)
    fractions = {"validation": split.validation_fraction, "test": split.test_fraction}
    if dataset.kind == "table" and dataset.columns.time is None:
        return pd.Series(assign_hash_split(ids, fractions=fractions, salt=salt), index=labels.index)
    if dataset.label is None and split.by == "customer":
        return split_held_out_days(ids, times, newest=split.test_fraction, fractions=fractions, salt=salt)
    if dataset.label is None:
        return split_table_by_time(
            times, validation_fraction=split.validation_fraction, test_fraction=split.test_fraction
        )
    if split.by == "customer":
        # of snapshots that are close together several are of the same time: more than half of their horizons is one
        alike = times[times > times.max() - pd.Timedelta(days=dataset.label.horizon_days) / 2].nunique()
        return split_held_out(
            ids,
            times,
            fractions=fractions,
            salt=salt,
            validation_snapshots=split.validation_snapshots,
            test_snapshots=max(split.test_snapshots, alike),
            train_snapshots_max=split.train_snapshots_max,
        )
    snapshots = [time.to_pydatetime() for time in labels[TIMESTAMP].drop_duplicates()]
    chosen = split_snapshots(
        snapshots,
        horizon_days=dataset.label.horizon_days,
        validation_snapshots=split.validation_snapshots,
        test_snapshots=split.test_snapshots,
        train_snapshots_max=split.train_snapshots_max,
    )
    part_of = {time: part for part in PARTS for time in getattr(chosen, part)}
    return labels[TIMESTAMP].map(part_of)


def split_table_by_time(times: pd.Series, *, validation_fraction: float, test_fraction: float) -> pd.Series:
    """Split by days: the newest with about ``test_fraction`` of the rows are the test part, those before validate.

    Raises
    ------
    DataError
        If there are too few days, since a day is never divided.
    """
    if times.nunique() < DAYS_MIN:
        days = " and ".join(f"{day:%Y-%m-%d}" for day in sorted(times.unique()))
        raise DataError(
            f"training set: all rows are of {days}; a split by time divides no day, and needs at least {DAYS_MIN}: "
            f"give rows of more days, or take columns.time out of the data set's config to split by the customer's id"
        )
    newer = count_newer(times)
    test_rows, validation_rows = round(test_fraction * len(times)), round(validation_fraction * len(times))
    parts = pd.Series("train", index=times.index)
    parts[newer < test_rows + validation_rows] = "validation"
    parts[newer < test_rows] = "test"
    return parts


def _join_groups(rows: pd.DataFrame, dataset: DatasetConfig, raw_dir: Path) -> pd.DataFrame:
    if dataset.columns.sensitive is None:
        return rows
    customers = read_table(raw_dir / "customers.parquet", [CUSTOMER, dataset.columns.sensitive], made_by="ingest")
    groups = customers.drop_duplicates(CUSTOMER).set_index(CUSTOMER)[dataset.columns.sensitive]
    joined = rows.copy()
    joined.insert(3, GROUP, rows[CUSTOMER].map(groups).astype(object))
    return joined


def require_classes(labels: pd.DataFrame) -> None:
    """Refuse a split of which a part has not both classes.

    Raises
    ------
    DataError
        Naming the part, and what it has.
    """
    for part in PARTS:
        churned = labels.loc[labels["part"] == part, LABEL]
        if churned.nunique() < 2:
            found = "no rows" if churned.empty else f"{count_noun(len(churned), 'row')}, all of one class"
            raise DataError(
                f"training set: the {part} part has {found}; both churned and stayed customers are needed: give more "
                f"rows, or change params.yaml's split (fractions of a table, snapshots of events)"
            )


def _describe(rows: pd.DataFrame) -> dict[str, Any]:
    snapshots = sorted({f"{time:%Y-%m-%d}" for time in rows[TIMESTAMP].drop_duplicates()})
    return {"rows": len(rows), "churn_rate": float(rows[LABEL].mean()), "snapshots": snapshots}
