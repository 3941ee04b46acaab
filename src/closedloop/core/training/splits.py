"""Which rows train, validate and test: by time where there is time, by a stable hash of the id elsewhere."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import numpy as np
import pandas as pd

from closedloop.core.training.weights import list_fit_weights
from closedloop.errors import ConfigError, DataError, count_noun

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

# datetime and pandas.Timestamp are dates too: what goes in comes out, as long as it is one type throughout.
SnapshotT = TypeVar("SnapshotT", bound=dt.date)
Metric = Literal["roc_auc", "log_loss"]


@dataclass(frozen=True)
class Split(Generic[SnapshotT]):
    """Snapshots of the three parts, each oldest first."""

    train: tuple[SnapshotT, ...]
    validation: tuple[SnapshotT, ...]
    test: tuple[SnapshotT, ...]


@dataclass(frozen=True)
class RowFold:
    """Row positions (int64, ascending) that train and validate."""

    train: np.ndarray
    validation: np.ndarray


def split_snapshots(
    snapshots: Iterable[SnapshotT],
    *,
    horizon_days: int,
    validation_snapshots: int = 1,
    test_snapshots: int = 1,
    train_snapshots_max: int | None = None,
) -> Split[SnapshotT]:
    """Split labelled snapshots by time, with one horizon between the last training label and the test.

    Test takes the newest snapshots. Everything else must have its label closed by the first test snapshot
    (snapshot + ``horizon_days`` <= first test snapshot): what a model trained that day could have known.
    Validation is the newest of those and adjacent to train: a second gap would put training another horizon
    behind, and hide recent change from it.

    Raises
    ------
    ConfigError
        If too few snapshots are left.

    Examples
    --------
    >>> days = [dt.date(2024, month, 1) for month in (1, 2, 3, 4, 5)]
    >>> split = split_snapshots(days, horizon_days=31)
    >>> [[day.month for day in part] for part in (split.train, split.validation, split.test)]
    [[1, 2], [3], [5]]
    """
    ordered = sorted(set(snapshots))
    if len(ordered) < test_snapshots:
        raise ConfigError(
            f"test_snapshots is {test_snapshots}, but labels were found for {count_noun(len(ordered), 'snapshot')} only"
        )
    test = ordered[-test_snapshots:]
    closed = [day for day in ordered if day + dt.timedelta(days=horizon_days) <= test[0]]
    needed = validation_snapshots + 1
    if len(closed) < needed:
        raise ConfigError(
            f"the split needs at least {count_noun(needed, 'closed snapshot')} (1 train, validation_snapshots "
            f"{validation_snapshots}), found {len(closed)} closed by the first test snapshot "
            f"{test[0]:%Y-%m-%d}: add history, or lower horizon_days ({horizon_days}) or test_snapshots"
        )
    train = closed[:-validation_snapshots]
    return Split(
        tuple(train[-(train_snapshots_max or len(train)) :]),
        tuple(closed[-validation_snapshots:]),
        tuple(test),
    )


def split_held_out(
    ids: Iterable[str],
    times: pd.Series,
    *,
    fractions: Mapping[str, float],
    salt: str,
    validation_snapshots: int = 1,
    test_snapshots: int = 1,
    train_snapshots_max: int | None = None,
) -> pd.Series:
    """The part of each row by its customer: who is held out never trains, so that the newest snapshot can do both.

    Test and validation take their customers' rows of the newest snapshots, train those of all others; a row of a
    customer who is held out, at an older snapshot, has no part (None).

    Examples
    --------
    >>> ids, times = ["1", "2", "1", "2"], pd.Series([1, 1, 2, 2])
    >>> split_held_out(ids, times, fractions={"test": 0.2, "validation": 0.1}, salt="split").tolist()
    [None, 'train', 'test', 'train']
    """
    parts = pd.Series(assign_hash_split(ids, fractions=fractions, salt=salt), index=times.index, dtype=object)
    days = sorted(times.unique())
    newest = {"train": train_snapshots_max or len(days), "validation": validation_snapshots, "test": test_snapshots}
    used = {part: set(days[-count:]) for part, count in newest.items()}
    is_used = np.array([time in used[part] for part, time in zip(parts, times, strict=True)], dtype=bool)
    parts[~is_used] = None
    return parts


def split_held_out_days(
    ids: pd.Series, days: pd.Series, *, newest: float, fractions: Mapping[str, float], salt: str
) -> pd.Series:
    """The part of each row of a table with days, by its customer, so that the newest days train and test at once.

    A customer who is held out tests or validates with the rows of the newest days, which have about the share
    ``newest`` of all rows; an older row has no part (None). A customer without any row in these days trains: to hold
    such rows out would test nothing.

    Examples
    --------
    >>> ids, days = pd.Series(["1", "2", "1", "2"]), pd.Series([1, 1, 2, 2])
    >>> split_held_out_days(ids, days, newest=0.5, fractions={"test": 0.2, "validation": 0.1}, salt="split").tolist()
    [None, 'train', 'test', 'train']
    """
    parts = pd.Series(assign_hash_split(ids, fractions=fractions, salt=salt), index=days.index, dtype=object)
    is_newest = count_newer(days) < newest * len(days)
    comes_back = ids.isin(ids[is_newest])
    parts[~comes_back] = "train"
    parts[comes_back & ~is_newest & (parts != "train")] = None
    return parts


def count_newer(days: pd.Series) -> pd.Series:
    """How many rows are of a later day than each row.

    >>> count_newer(pd.Series([1, 2, 2, 3])).tolist()
    [3, 1, 1, 0]
    """
    rows_by_day = days.value_counts().sort_index()
    return days.map(len(days) - rows_by_day.cumsum())


def choose_recent_days(
    as_of: dt.date,
    *,
    window_days: int,
    horizon_days: int,
    every_days: int,
    validation_snapshots: int = 1,
    test_snapshots: int = 1,
) -> tuple[dt.date, dt.date]:
    """First and last snapshot of the last ``window_days`` with closed labels, or of as many as a split needs.

    Snapshots count back from ``as_of``, ``every_days`` apart. The least that `split_snapshots` can split is
    ``test_snapshots``, a horizon before them, ``validation_snapshots`` and one more to train on.

    >>> choose_recent_days(dt.date(2025, 1, 1), window_days=90, horizon_days=30, every_days=30)
    (datetime.date(2024, 9, 3), datetime.date(2024, 12, 2))
    >>> choose_recent_days(dt.date(2025, 1, 1), window_days=90, horizon_days=90, every_days=30)
    (datetime.date(2024, 6, 5), datetime.date(2024, 10, 3))
    """
    steps_of_horizon = -(-horizon_days // every_days)
    last = as_of - dt.timedelta(days=steps_of_horizon * every_days)
    needed_days = (test_snapshots - 1 + steps_of_horizon + validation_snapshots) * every_days
    return last - dt.timedelta(days=max(window_days, needed_days)), last


def index_time_folds(event_timestamps: pd.Series, *, horizon_days: int, folds: int) -> tuple[RowFold, ...]:
    """Expanding-window folds, oldest first, on the last ``folds`` snapshots that have something to train on.

    Parameters
    ----------
    event_timestamps
        Snapshot of each row (datetime64, UTC). A fold trains on those whose labels had closed by the one it validates.

    Raises
    ------
    ConfigError
        If fewer than ``folds`` snapshots have a training snapshot at least ``horizon_days`` before them.
    """
    times = pd.DatetimeIndex(event_timestamps)
    snapshots = times.unique().sort_values()
    closed_after = pd.Timedelta(days=horizon_days)
    usable = snapshots[snapshots - closed_after >= snapshots[0]]
    if len(usable) < folds:
        raise ConfigError(
            f"folds is {folds}, but {len(usable)} of {count_noun(len(snapshots), 'training snapshot')} can validate, "
            f"with another one horizon_days ({horizon_days}) or more before: ask for fewer folds or add history"
        )
    return tuple(
        RowFold(np.flatnonzero(times <= validation - closed_after), np.flatnonzero(times == validation))
        for validation in usable[-folds:]
    )


def index_day_folds(event_timestamps: pd.Series, *, folds: int) -> tuple[RowFold, ...]:
    """Expanding-window folds over the days of rows whose labels came with them, oldest first.

    A day is never divided; a single fold validates on the last sixth of the days.

    Raises
    ------
    ConfigError
        If there are too few days.
    """
    from sklearn.model_selection import TimeSeriesSplit

    days, day_of_row = np.unique(event_timestamps.to_numpy(), return_inverse=True)
    parts = 5 if folds == 1 else folds
    if len(days) <= parts:
        raise ConfigError(
            f"folds is {folds}, but the training rows are of {count_noun(len(days), 'day')}: {parts + 1} are needed"
        )
    return tuple(
        RowFold(*(np.flatnonzero(np.isin(day_of_row, chosen)) for chosen in split))
        for split in list(TimeSeriesSplit(parts).split(days))[-folds:]
    )


def index_hash_folds(ids: Iterable[str], *, folds: int, salt: str) -> tuple[RowFold, ...]:
    """Row positions of folds by a stable hash of the id; a single fold validates on a fifth of the ids."""
    parts = np.floor(hash_shares(ids, salt) * (5 if folds == 1 else folds)).astype(np.int64)
    return tuple(RowFold(np.flatnonzero(parts != fold), np.flatnonzero(parts == fold)) for fold in range(folds))


def hash_shares(ids: Iterable[str], salt: str) -> np.ndarray:
    """A number in [0, 1) for each id, float64: the same on every machine, and independent between salts.

    The first 53 bits of SHA-256 over salt and id: Python's own hash differs between processes.

    >>> hash_shares(["1", "2"], "split").round(4).tolist()
    [0.1743, 0.9126]
    """
    prefix = hashlib.sha256(f"{salt}\x1f".encode())
    shares = []
    for identifier in ids:
        digest = prefix.copy()
        digest.update(str(identifier).encode())
        shares.append((int.from_bytes(digest.digest()[:8], "big") >> 11) / 2**53)
    return np.array(shares, dtype=np.float64)


def assign_hash_split(ids: Iterable[str], *, fractions: Mapping[str, float], salt: str) -> np.ndarray:
    """One of "train", "validation" and "test" for each id, for tables without time: shape (n,), dtype object.

    Parameters
    ----------
    fractions
        Share in (0, 1) of "validation" and of "test", which together leave something for "train".
    """
    shares = hash_shares(ids, salt)
    bounds = [fractions["test"], fractions["validation"] + fractions["test"]]
    return np.array(["test", "validation", "train"], dtype=object)[np.searchsorted(bounds, shares, side="right")]


def score_fold(
    build: Callable[[pd.DataFrame], Pipeline],
    frame: pd.DataFrame,
    labels: np.ndarray,
    fold: RowFold,
    metric: Metric,
) -> float:
    """Fit on a fold's training rows and measure on its validation rows: ROC AUC in [0, 1] or log loss (nats).

    Parameters
    ----------
    build
        Returns the unfitted pipeline for these training rows: categories are learnt inside the fold.

    Raises
    ------
    DataError
        If either part holds one class only.
    """
    from sklearn.metrics import log_loss, roc_auc_score

    for name, rows in (("training", fold.train), ("validation", fold.validation)):
        if len(np.unique(labels[rows])) < 2:
            raise DataError(f"the {len(rows)} {name} rows of a fold hold one class only: use fewer or later folds")
    train = frame.iloc[fold.train]
    pipeline = build(train)
    pipeline.fit(train, labels[fold.train], **list_fit_weights(pipeline, train))
    scores = pipeline.predict_proba(frame.iloc[fold.validation])[:, 1]
    measure = roc_auc_score if metric == "roc_auc" else log_loss
    return float(measure(labels[fold.validation], scores))
