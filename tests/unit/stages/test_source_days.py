"""Sources divided by day: a late and a corrected day give what a clean build gives, and nothing else is computed."""

from __future__ import annotations

import datetime as dt
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.adapters.duckdb import DuckEngine
from closedloop.config.dataset import DatasetConfig
from closedloop.config.layout import Layout
from closedloop.config.params import Params, parse_params
from closedloop.errors import DataError
from closedloop.stages.features import compute_features
from closedloop.stages.ingest import ingest
from closedloop.stages.refresh import locate_work
from closedloop.stages.training_set import read_labels

FIRST, DAYS = dt.date(2024, 1, 1), 100
AS_OF = FIRST + dt.timedelta(days=DAYS)
LATE, CORRECTED = FIRST + dt.timedelta(days=35), FIRST + dt.timedelta(days=62)
SNAPSHOTS = 9  # from the day 20, 10 days apart, to the day 100
VISITS = DatasetConfig.model_validate(
    {
        "name": "visits",
        "model_name": "visits_churn",
        "description": "Visits of a gym.",
        "kind": "events",
        "source": {"type": "csv"},
        "timezone": "UTC",
        "columns": {"entity_id": "member", "time": "at", "amount": "paid"},
        "event_types": {"visit": {"has_amount": True}},
        "cleaning": {"drop_missing_id": True, "drop_duplicates": True, "require_positive": ["paid"]},
        "label": {
            "event_type": "visit",
            "horizon_days": 10,
            "active_days": 20,
            "snapshot_every_days": 10,
            "warmup_days": 20,
        },
        "expectations": [],
    }
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DuckEngine]:
    with DuckEngine(threads=1, temp_directory=tmp_path_factory.mktemp("spilled")) as made:
        yield made


def write_day(folder: Path, day: dt.date, seed: int, rows: int = 12) -> None:
    """Some visits of a day; one line is there twice, one has no member, and one no price."""
    draw = np.random.default_rng([seed, day.toordinal()])
    members = draw.integers(0, 40 + (day - FIRST).days, rows)  # later days bring new members
    hours = draw.integers(0, 24, rows)
    lines = [f"M{one},{day}T{hour:02}:00:00,{draw.integers(1, 9)}" for one, hour in zip(members, hours, strict=True)]
    lines += [lines[0], f",{day}T01:00:00,3", f"M1,{day}T02:00:00,0"]
    (folder / f"day={day}").mkdir(parents=True, exist_ok=True)
    (folder / f"day={day}" / "part-0.csv").write_text("\n".join(["member,at,paid", *lines]) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, engine: DuckEngine) -> tuple[Path, dict[str, Any]]:
    """A source and what was built of it; read only."""
    folder = tmp_path_factory.mktemp("built")
    for number in range(DAYS):
        write_day(folder / "source", FIRST + dt.timedelta(days=number), seed=1)
    return folder, build(folder / "work", folder / "source", engine)[1]


@pytest.fixture
def source(tmp_path: Path, built: tuple[Path, dict[str, Any]]) -> Path:
    """A copy of the source; what was built of it lies in ``work`` beside."""
    shutil.copytree(built[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "source"


def make_params(source: Path, as_of: dt.date = AS_OF) -> Params:
    return parse_params(
        {
            "dataset": "visits",
            "as_of": f"{as_of}",
            "seed": 1,
            "model": {"type": "random_forest"},
            "features": {"window_days": [7, 30], "recency_cap_days": 30},
            "data": {"source": f"{source}/day={{day}}/*.csv"},
        },
        "a test",
    )


def build(folder: Path, source: Path, engine: DuckEngine, as_of: dt.date = AS_OF) -> tuple[Layout, dict[str, Any]]:
    layout, params = locate_work(folder), make_params(source, as_of)
    report = ingest(params, VISITS, layout)
    return layout, report | {"features": compute_features(params, VISITS, engine, layout)}


def read_all(layout: Layout) -> dict[str, bytes]:
    """Every table of the build; the ledger holds when files were changed, and so is none."""
    folders = (layout.raw, layout.daily, layout.features)
    paths = [path for folder in folders for path in sorted(folder.rglob("*.parquet"))]
    return {str(path.relative_to(layout.raw.parent)): path.read_bytes() for path in paths}


def list_affected(before: pd.Series, after: pd.Series) -> list[dt.date]:
    """Snapshots with a changed day within 30 days before them, or with another first day of somebody before them."""
    snapshots = [AS_OF - dt.timedelta(days=10 * step) for step in range(SNAPSHOTS)]
    reached = {
        at for at in snapshots for day in (LATE, CORRECTED) if dt.timedelta(0) < at - day <= dt.timedelta(days=30)
    }
    return sorted(reached | {at for at in snapshots if not before[before < at].equals(after[after < at])})


def list_first_days(layout: Layout) -> pd.Series:
    events = pd.concat([pd.read_parquet(path) for path in (layout.raw / "events").iterdir()])
    return events.groupby("customer_id")["time"].min().dt.date.sort_index()


def test_a_late_and_a_corrected_day_give_what_a_clean_build_gives_and_compute_nothing_else(
    tmp_path: Path, source: Path, engine: DuckEngine
) -> None:
    shutil.move(source / f"day={LATE}", tmp_path / "late")
    layout, _ = build(tmp_path / "work", source, engine)
    first_days = list_first_days(layout)
    shutil.move(tmp_path / "late", source / f"day={LATE}")
    write_day(source, CORRECTED, seed=2)
    layout, found = build(tmp_path / "work", source, engine)
    clean, whole = build(tmp_path / "clean", source, engine)
    assert read_all(layout) == read_all(clean)
    assert found["days_read"] == [f"{LATE}", f"{CORRECTED}"]
    assert found["features"]["daily_files_written"] == 2  # of February and of March; in April each day has a file
    affected = list_affected(first_days, list_first_days(layout))
    assert found["features"]["snapshots_written"] == len(affected) < SNAPSHOTS
    assert whole["features"]["snapshots_written"] == whole["features"]["snapshots"] == SNAPSHOTS
    without = {"days_read", "features"}
    assert {key: found[key] for key in found.keys() - without} == {key: whole[key] for key in whole.keys() - without}
    labels = [read_labels(make_params(source), VISITS, engine, one) for one in (layout, clean)]
    assert labels[0].equals(labels[1])


def test_nothing_new_reads_and_computes_nothing(
    tmp_path: Path, source: Path, engine: DuckEngine, built: tuple[Path, dict[str, Any]]
) -> None:
    before, tables = built[1], read_all(locate_work(tmp_path / "work"))
    layout, found = build(tmp_path / "work", source, engine)
    assert read_all(layout) == tables
    assert found["days_read"] == []
    assert found["features"]["daily_files_written"] == found["features"]["snapshots_written"] == 0
    assert found["rows_read"] == before["rows_read"] == DAYS * 15
    assert found["dropped"] == before["dropped"]


def test_the_next_days_read_themselves_alone(tmp_path: Path, source: Path, engine: DuckEngine) -> None:
    build(tmp_path / "work", source, engine, as_of=AS_OF - dt.timedelta(days=10))  # takes the last ten days out
    layout, found = build(tmp_path / "work", source, engine)
    clean, _ = build(tmp_path / "clean", source, engine)
    assert found["days_read"] == [f"{AS_OF - dt.timedelta(days=back)}" for back in range(10, 0, -1)]
    assert found["features"]["snapshots_written"] == 1
    assert read_all(layout) == read_all(clean)


def test_a_day_that_is_gone_is_taken_out(tmp_path: Path, source: Path, engine: DuckEngine) -> None:
    shutil.rmtree(source / f"day={LATE}")
    layout, found = build(tmp_path / "work", source, engine)
    clean, _ = build(tmp_path / "clean", source, engine)
    assert found["days_read"] == []
    assert read_all(layout) == read_all(clean)


@pytest.mark.parametrize("name", ["part-0.csv", "part-1.csv"])
def test_a_day_without_rows_is_a_day_on_which_nothing_happened(tmp_path: Path, source: Path, name: str) -> None:
    folder = source / f"day={LATE}"
    folder.joinpath(name).write_text("member,at,paid\n", encoding="utf-8")
    alone = name == "part-0.csv"
    found = [ingest(make_params(source), VISITS, locate_work(tmp_path / "work")) for _ in range(2)]
    assert [one["days_read"] for one in found] == [[f"{LATE}"], []]
    assert found[0]["rows_read"] == found[1]["rows_read"] == (DAYS - alone) * 15
    assert found[0]["days"] == DAYS - alone
    assert found[0]["dropped"] == found[1]["dropped"]


def test_days_without_any_row_are_refused(tmp_path: Path) -> None:
    (tmp_path / "day=2024-01-01").mkdir()
    (tmp_path / "day=2024-01-01" / "part-0.csv").write_text("member,at,paid\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no event is left \(0 rows read\)"):
        ingest(make_params(tmp_path), VISITS, locate_work(tmp_path / "work"))


def test_a_changed_rule_reads_every_day_again(tmp_path: Path, source: Path) -> None:
    cleaning = VISITS.cleaning.model_copy(update={"require_positive": ()})
    changed = VISITS.model_copy(update={"cleaning": cleaning})
    found = ingest(make_params(source), changed, locate_work(tmp_path / "work"))
    assert len(found["days_read"]) == DAYS


def test_a_changed_definition_computes_every_snapshot_again(tmp_path: Path, source: Path, engine: DuckEngine) -> None:
    params, layout = make_params(source), locate_work(tmp_path / "work")
    other = params.model_copy(update={"features": params.features.model_copy(update={"tenure_cap_days": 30})})
    found = compute_features(other, VISITS, engine, layout)
    assert (found["daily_files_written"], found["snapshots_written"]) == (0, SNAPSHOTS)


def test_a_file_that_a_kill_left_beside_is_no_day(tmp_path: Path, source: Path, engine: DuckEngine) -> None:
    (source / "day=2024-01-05" / "part-1.csv.partial").write_text("nonsense", encoding="utf-8")
    (source / "day=2024-13-01").mkdir()
    (source / "day=2024-13-01" / "part-0.csv").write_text("nonsense", encoding="utf-8")
    _, found = build(tmp_path / "work", source, engine)
    assert found["days_read"] == []


def test_an_event_of_another_day_is_refused_and_leaves_what_was_there(tmp_path: Path, source: Path) -> None:
    layout = locate_work(tmp_path / "work")
    before = read_all(layout)
    path = source / f"day={CORRECTED}" / "part-0.csv"
    path.write_text(f"member,at,paid\nM1,{CORRECTED}T12:00:00,1\nM2,{LATE}T12:00:00,1\n", encoding="utf-8")
    message = f"of {CORRECTED} 1 event of 2 is of another UTC day, such as {LATE} 12:00:00: divide files by the UTC day"
    with pytest.raises(DataError, match=message):
        ingest(make_params(source), VISITS, layout)
    assert read_all(layout) == before


@pytest.mark.parametrize(
    ("as_of", "said"), [(AS_OF, "no file of any day"), (dt.date(2024, 1, 1), "before as_of 2024-01-01")]
)
def test_without_a_day_it_says_so(tmp_path: Path, source: Path, as_of: dt.date, said: str) -> None:
    if as_of == AS_OF:
        shutil.rmtree(source)
    with pytest.raises(DataError, match=said):
        ingest(make_params(source, as_of), VISITS, locate_work(tmp_path / "work"))


def test_progress_counts_the_days(tmp_path: Path, source: Path) -> None:
    seen: list[tuple[int, int]] = []
    ingest(make_params(source), VISITS, locate_work(tmp_path / "work"), lambda done, days: seen.append((done, days)))
    assert seen == [(number, DAYS) for number in range(1, DAYS + 1)]


def test_without_links_files_are_copied(
    tmp_path: Path, source: Path, engine: DuckEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_all(locate_work(tmp_path / "work"))

    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    layout, found = build(tmp_path / "work", source, engine)
    assert found["days_read"] == []
    assert read_all(layout) == before


def test_the_parts_equal_a_source_that_is_read_as_a_whole(
    tmp_path: Path, source: Path, built: tuple[Path, dict[str, Any]]
) -> None:
    params, layout, found = make_params(source), locate_work(tmp_path / "work"), built[1]
    whole = params.model_copy(update={"data": params.data.model_copy(update={"source": f"{source}/*/*.csv"})})
    other = locate_work(tmp_path / "whole")
    report = ingest(whole, VISITS, other)
    for name in ("rows_read", "rows_kept", "dropped", "events", "days", "customers", "blank_values"):
        assert found[name] == report[name]
    for path in sorted((other.raw / "events").iterdir()):
        assert (layout.raw / "events" / path.name).read_bytes() == path.read_bytes()
    dropped = pd.read_parquet(layout.raw / "dropped.parquet").drop(columns="day")
    assert dropped.equals(pd.read_parquet(other.raw / "dropped.parquet"))
