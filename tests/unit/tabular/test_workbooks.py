"""Excel workbooks are read as CSV files are: every cell as text, the sheet by its name."""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from closedloop.config.dataset import DatasetConfig
from closedloop.config.sources import FileSource
from closedloop.errors import ConfigError, DataError
from closedloop.tabular.describe.config import describe_source
from closedloop.tabular.rows import RowFile, open_rows
from closedloop.tabular.sources import read_chunks

HEADER = ["member", "fee", "since", "left"]


def write_book(path: Path, sheets: dict[str, list[list[Any]]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def list_members(rows: int = 400) -> list[list[Any]]:
    fees = [20 + (number * 37 % 400) / 10 for number in range(rows)]
    starts = [dt.datetime(2023, 1, 1) + dt.timedelta(days=number) for number in range(rows)]  # noqa: DTZ001
    left = ["yes" if (number * 7 + number // 9) % 10 < 3 else "no" for number in range(rows)]
    return [HEADER, *([f"M{n:04}", *some] for n, some in enumerate(zip(fees, starts, left, strict=True)))]


def test_cells_become_the_text_of_a_csv_file(tmp_path: Path) -> None:
    moment = dt.datetime(2024, 3, 1, 9, 30)  # noqa: DTZ001
    rows = [[7, 1.50, dt.datetime(2024, 3, 1), True], [None] * 4, ["007", 2.0, moment], [1e-7, None, "", "NA"]]  # noqa: DTZ001
    path = write_book(tmp_path / "a.xlsx", {"May": [[None], HEADER, *rows]})
    file = RowFile(path)
    assert (file.schema.names, file.is_text, file.rows_max) == (HEADER, True, 3)
    (table,) = file.read_chunks(["since", "member", "left", "fee"], 100)
    assert table.select(HEADER).to_pydict() == {
        "member": ["7", "007", "1e-07"],
        "fee": ["1.5", "2", None],
        "since": ["2024-03-01", "2024-03-01 09:30:00", None],
        "left": ["TRUE", None, "NA"],
    }


def test_the_first_sheet_is_read_unless_another_is_named(tmp_path: Path) -> None:
    path = write_book(tmp_path / "a.xlsx", {"May": [["a"], [1]], "June": [["a"], [2]]})

    def read(**given: Any) -> list[str]:
        return [
            value
            for _, _, rows in read_chunks(FileSource(type="excel", **given), str(path), ["a"])
            for value in rows["a"]
        ]

    assert (read(), read(sheet="June")) == (["1"], ["2"])
    with pytest.raises(DataError, match=r"a\.xlsx: there is no sheet 'july'; its sheets: 'May', 'June'"):
        read(sheet="july")
    own = FileSource(type="excel", sheet="June", na_values=("2",))
    (table,) = open_rows(path, own, {"a": "b"}, needed=["b"]).read_chunks(["b"], 10)
    assert table.to_pydict() == {"b": [None]}


@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        ([], "the sheet is empty; a header row with column names is required"),
        ([["a", "b"], [1, 2], [3, 4, "sum"]], "row 3: it has 3 cells, the header has 2; give every column a name"),
    ],
)
def test_a_sheet_that_is_no_table_is_refused_with_its_row(tmp_path: Path, rows: list[list[Any]], rule: str) -> None:
    path = write_book(tmp_path / "a.xlsx", {"May": rows})
    with pytest.raises(DataError, match=rule):
        list(RowFile(path).read_chunks(["a"], 10))


def test_a_file_that_is_no_workbook_is_refused_with_the_way_out(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"\xd0\xcf\x11\xe0 as Excel wrote until 2003, or with a password")
    with pytest.raises(DataError, match=r"cannot be read as a workbook \(it is of before 2007.*save the sheet"):
        RowFile(path)


@pytest.mark.parametrize("name", ["a.xls", "a.ods", "a.XLSB"])
def test_another_kind_of_workbook_is_refused_wherever_rows_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(DataError, match=rf"{name}: is a workbook of a kind that is not read: save it as \.xlsx"):
        RowFile(tmp_path / name)


def test_without_openpyxl_the_extra_and_the_way_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"install closedloop\[excel\], or save the sheet as CSV UTF-8"):
        RowFile(tmp_path / "a.xlsx")


def test_a_workbook_is_described(tmp_path: Path) -> None:
    path = write_book(tmp_path / "a.xlsx", {"members": list_members(), "notes": [["read me"]]})
    notes: list[str] = []
    config = DatasetConfig.model_validate(yaml.safe_load(describe_source(str(path), "strange", notes)))
    assert config.source == FileSource(type="excel", path=str(path))
    assert (config.columns.entity_id, config.columns.numeric) == ("member", ("fee",))
    assert config.columns.label is not None
    assert config.columns.label.column == "left"
    assert "the sheet 'members' is read, not 'notes': source.sheet names another" in notes


def test_a_title_above_the_header_is_named(tmp_path: Path) -> None:
    path = write_book(tmp_path / "a.xlsx", {"May": [["Our members, by May"], *list_members()]})
    with pytest.raises(DataError, match="line 1 has 1 cell, most others have 4: delete what stands above the header"):
        describe_source(str(path), "strange", [])
