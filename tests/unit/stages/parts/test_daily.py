from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from closedloop.stages.parts.daily import list_daily

NAMES = ["2023-12", "2024-01", "2024-02", "2024-03-01", "2024-03-09", "2024-03-10"]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        ((2024, 1, 1), (2024, 3, 9), NAMES[1:5]),
        ((2024, 1, 31), (2024, 2, 1), ["2024-01", "2024-02"]),
        ((2024, 3, 2), (2024, 3, 31), NAMES[4:]),
        ((2024, 4, 1), (2024, 4, 2), []),
    ],
)
def test_files_with_a_day_between_two(
    first: tuple[int, int, int], last: tuple[int, int, int], expected: list[str], tmp_path: Path
) -> None:
    for name in (*NAMES, "notes"):
        (tmp_path / f"{name}.parquet").touch()
    assert [path.stem for path in list_daily(tmp_path)] == NAMES
    ends = dt.datetime(*first, tzinfo=dt.UTC), dt.datetime(*last, tzinfo=dt.UTC)
    assert [path.stem for path in list_daily(tmp_path, *ends)] == expected
