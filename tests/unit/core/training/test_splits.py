"""Splits and folds: what may train, and that it never depends on the machine."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from closedloop.core.training.splits import (
    RowFold,
    assign_hash_split,
    choose_recent_days,
    hash_shares,
    index_day_folds,
    index_hash_folds,
    index_time_folds,
    score_fold,
    split_held_out,
    split_held_out_days,
    split_snapshots,
)
from closedloop.errors import ConfigError, DataError

WEEKS = [dt.date(2024, 1, 1) + dt.timedelta(days=7 * week) for week in range(10)]


def test_split_leaves_one_horizon_before_test_and_none_before_validation() -> None:
    # Test is week 9. With 14 days, week 7 closes exactly on week 9, week 8 does not.
    split = split_snapshots(WEEKS, horizon_days=14, validation_snapshots=2, test_snapshots=1)
    assert split.test == (WEEKS[9],)
    assert split.validation == (WEEKS[6], WEEKS[7])
    assert split.train == tuple(WEEKS[:6])


@given(
    every_days=st.integers(1, 40),
    horizon_days=st.integers(1, 120),
    window_days=st.integers(1, 400),
    validation_snapshots=st.integers(1, 3),
    test_snapshots=st.integers(1, 3),
)
def test_recent_days_are_closed_span_the_window_and_can_be_split(every_days, horizon_days, window_days, **counts):
    as_of = dt.date(2025, 1, 1)
    first, last = choose_recent_days(
        as_of, window_days=window_days, horizon_days=horizon_days, every_days=every_days, **counts
    )
    snapshots = [as_of - dt.timedelta(days=every_days * step) for step in range(800)]
    assert last == max(day for day in snapshots if day + dt.timedelta(days=horizon_days) <= as_of)
    assert (last - first).days >= window_days
    chosen = [day for day in snapshots if first <= day <= last]
    split = split_snapshots(chosen, horizon_days=horizon_days, **counts)
    assert split.test[-1] == last
    if (last - first).days > window_days:  # then it is the least that can be split
        with pytest.raises(ConfigError):
            split_snapshots(chosen[:-1], horizon_days=horizon_days, **counts)


def test_split_keeps_the_newest_training_snapshots() -> None:
    split = split_snapshots(
        reversed(WEEKS), horizon_days=7, validation_snapshots=1, test_snapshots=2, train_snapshots_max=3
    )
    assert split.test == (WEEKS[8], WEEKS[9])
    assert split.validation == (WEEKS[7],)
    assert split.train == (WEEKS[4], WEEKS[5], WEEKS[6])


def test_split_returns_the_type_it_was_given() -> None:
    stamps = list(pd.DatetimeIndex(WEEKS).tz_localize("UTC"))
    split = split_snapshots(stamps + stamps, horizon_days=14)
    assert split.test == (pd.Timestamp("2024-03-04", tz="UTC"),)
    assert split.validation == (pd.Timestamp("2024-02-19", tz="UTC"),)


def test_split_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"at least 3 closed snapshots .* found 2 .* 2024-02-05"):
        split_snapshots(WEEKS[:6], horizon_days=28, validation_snapshots=2)
    with pytest.raises(ConfigError, match=r"test_snapshots is 4, but labels were found for 3 snapshots only"):
        split_snapshots(WEEKS[:3], horizon_days=7, test_snapshots=4)


@given(
    days=st.sets(st.integers(0, 400), min_size=1, max_size=40),
    horizon_days=st.integers(1, 90),
    validation=st.integers(1, 4),
    test=st.integers(1, 4),
)
def test_no_label_of_train_or_validation_reaches_into_test(
    days: set[int], horizon_days: int, validation: int, test: int
) -> None:
    snapshots = [dt.date(2024, 1, 1) + dt.timedelta(days=day) for day in days]
    try:
        split = split_snapshots(
            snapshots, horizon_days=horizon_days, validation_snapshots=validation, test_snapshots=test
        )
    except ConfigError:
        first_test = sorted(snapshots)[-test] if test <= len(snapshots) else min(snapshots)
        closed = [day for day in snapshots if (first_test - day).days >= horizon_days]
        assert test > len(snapshots) or len(closed) <= validation
        return
    assert (len(split.validation), len(split.test)) == (validation, test)
    assert max(split.train) < min(split.validation)
    assert all((min(split.test) - day).days >= horizon_days for day in split.train + split.validation)


def fold_weeks(horizon_days: int, folds: int) -> list[tuple[list[int], list[int]]]:
    times = pd.Series(pd.DatetimeIndex(WEEKS).tz_localize("UTC"))
    found = index_time_folds(times, horizon_days=horizon_days, folds=folds)
    return [(fold.train.tolist(), fold.validation.tolist()) for fold in found]


def test_time_folds_expand_and_keep_the_gap() -> None:
    assert fold_weeks(14, 3) == [(list(range(week - 1)), [week]) for week in (7, 8, 9)]


def test_time_folds_need_history() -> None:
    # Only weeks 8 and 9 have a snapshot 56 days before them.
    assert len(fold_weeks(56, 2)) == 2
    with pytest.raises(ConfigError, match=r"but 2 of 10 training snapshots can validate, .* \(56\) or more before"):
        fold_weeks(56, 3)


def test_time_folds_as_row_positions() -> None:
    times = pd.Series(pd.to_datetime(["2024-01-15", "2024-01-01", "2024-01-08", "2024-01-15"], utc=True))
    (fold,) = index_time_folds(times, horizon_days=14, folds=1)
    assert fold.train.tolist() == [1]
    assert fold.validation.tolist() == [0, 3]


@pytest.mark.parametrize("folds", [1, 3])
def test_day_folds_train_on_earlier_days_only_and_divide_none(folds: int) -> None:
    draw = np.random.default_rng(0)
    days = pd.Series(pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(draw.integers(0, 24, 600), unit="D"))
    found = index_day_folds(days, folds=folds)
    assert len(found) == folds
    validated: list[int] = []
    for fold in found:
        train, validation = days.iloc[fold.train], days.iloc[fold.validation]
        assert train.max() < validation.min()
        assert sorted([*fold.train, *fold.validation]) == np.flatnonzero(days <= validation.max()).tolist()
        validated += fold.validation.tolist()
    assert len(validated) == len(set(validated))
    assert days.iloc[found[-1].validation].max() == days.max()
    with pytest.raises(ConfigError, match=f"folds is {folds}, but the training rows are of 3 days"):
        index_day_folds(days[days < days.min() + pd.Timedelta(days=3)], folds=folds)


def test_hash_folds_validate_every_row_once() -> None:
    ids = [str(number) for number in range(500)]
    folds = index_hash_folds(ids, folds=4, salt="search")
    assert sorted(np.concatenate([fold.validation for fold in folds]).tolist()) == list(range(500))
    for fold in folds:
        assert sorted([*fold.train, *fold.validation]) == list(range(500))
        assert 90 < len(fold.validation) < 160
    (single,) = index_hash_folds(ids, folds=1, salt="search")
    assert 70 < len(single.validation) < 130
    assert len(single.train) + len(single.validation) == 500


def test_hash_shares_are_the_same_in_another_process() -> None:
    code = (
        "from closedloop.core.training.splits import hash_shares; print(hash_shares(['7590-VHVEG', 'ü'], 's').tolist())"
    )
    environment = {"PYTHONHASHSEED": "123", "PYTHONPATH": ":".join(sys.path)}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(hash_shares(["7590-VHVEG", "ü"], "s").tolist())


def test_hash_split_has_the_asked_shares_and_depends_on_the_salt_only() -> None:
    ids = [f"c{number}" for number in range(20_000)]
    parts = assign_hash_split(ids, fractions={"validation": 0.2, "test": 0.3}, salt="split")
    shares = {part: float((parts == part).mean()) for part in ("train", "validation", "test")}
    # Five standard errors of a share of 20,000 are 0.018 at most.
    assert shares == pytest.approx({"train": 0.5, "validation": 0.2, "test": 0.3}, abs=0.018)
    fewer = assign_hash_split(ids[::2], fractions={"validation": 0.2, "test": 0.3}, salt="split")
    assert (fewer == parts[::2]).all()
    other = assign_hash_split(ids, fractions={"validation": 0.2, "test": 0.3}, salt="another")
    assert 0.3 < (other == parts).mean() < 0.46  # 0.38 if independent


class _Copies:
    """A pipeline stand-in: its score is the one feature, whatever it was fitted on."""

    def fit(self, frame: pd.DataFrame, labels: np.ndarray) -> _Copies:
        self.rows = len(frame)
        return self

    def predict_proba(self, frame: pd.DataFrame) -> np.ndarray:
        scores = frame["x"].to_numpy()
        return np.column_stack([1 - scores, scores])


def test_score_fold_measures_the_validation_rows_only() -> None:
    frame = pd.DataFrame({"x": [0.9, 0.9, 0.2, 0.4, 0.3, 0.8]})
    labels = np.array([True, False, False, True, False, True])
    fold = RowFold(train=np.array([0, 1]), validation=np.array([2, 3, 4, 5]))
    built: list[list[float]] = []

    def build(train: pd.DataFrame) -> _Copies:
        built.append(train["x"].tolist())
        return _Copies()

    assert score_fold(build, frame, labels, fold, "roc_auc") == 1.0
    expected = -np.mean(np.log([0.8, 0.4, 0.7, 0.8]))
    assert score_fold(build, frame, labels, fold, "log_loss") == pytest.approx(expected)
    assert built == [[0.9, 0.9], [0.9, 0.9]]
    one_class = RowFold(train=np.array([0, 1]), validation=np.array([2, 4]))
    with pytest.raises(DataError, match="2 validation rows of a fold hold one class"):
        score_fold(build, frame, labels, one_class, "roc_auc")


def test_who_is_held_out_never_trains_and_the_newest_snapshot_trains_and_tests():
    ids, times = [str(n) for n in range(500)] * 4, pd.Series(np.repeat([1, 2, 3, 4], 500))
    fractions = {"test": 0.2, "validation": 0.1}
    parts = split_held_out(ids, times, fractions=fractions, salt="7", train_snapshots_max=3)
    rows = pd.DataFrame({"id": ids, "time": times, "part": parts})
    owners = {part: set(some["id"]) for part, some in rows.groupby("part")}
    assert not owners["train"] & (owners["test"] | owners["validation"])
    assert not owners["test"] & owners["validation"]
    snapshots = {part: sorted(set(some["time"])) for part, some in rows.groupby("part")}
    assert snapshots == {"train": [2, 3, 4], "validation": [4], "test": [4]}
    # the same customers are held out when there is more history
    later = split_held_out([*ids, *ids[:500]], pd.Series([*times, *[5] * 500]), fractions=fractions, salt="7")
    assert set(np.array(ids[:500])[(later[-500:] == "test").to_numpy()]) == owners["test"]


def test_the_newest_days_of_a_table_train_and_test_and_who_is_held_out_never_trains():
    ids = pd.Series(np.random.default_rng(1).integers(3_000, size=6_000).astype(str))
    days = pd.Series(np.repeat(np.arange(100), 60))
    fractions = {"test": 0.2, "validation": 0.2}
    rows = pd.DataFrame(
        {"id": ids, "day": days, "part": split_held_out_days(ids, days, newest=0.2, fractions=fractions, salt="7")}
    )
    owners = {part: set(some["id"]) for part, some in rows.groupby("part")}
    assert not owners["train"] & (owners["test"] | owners["validation"])
    assert not owners["test"] & owners["validation"]
    assert rows.groupby("part")["day"].agg(["min", "max"]).T.to_dict("list") == {
        "train": [0, 99],
        "validation": [80, 99],
        "test": [80, 99],
    }
    # the newest fifth of the rows tests and validates by a fifth each
    assert rows["part"].isin(["test", "validation"]).mean() == pytest.approx(0.2 * 0.4, abs=0.01)
    assert (rows["part"] == "train").mean() > 0.6
    assert rows[rows["part"].isna()]["day"].max() < 80


def test_a_champion_of_the_same_split_never_trained_on_what_a_later_one_is_tested_on():
    ids = pd.Series(np.random.default_rng(2).integers(800, size=3_000).astype(str))
    days = pd.Series(np.repeat(np.arange(100), 30))
    split = {"newest": 0.2, "fractions": {"test": 0.2, "validation": 0.2}, "salt": "7"}
    later = split_held_out_days(ids, days, **split)
    for until in (70, 85, 95):
        known = days < until
        earlier = split_held_out_days(ids[known], days[known], **split)
        assert not ((earlier == "train") & (later[known] == "test")).any()
