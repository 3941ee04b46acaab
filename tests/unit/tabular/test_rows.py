"""Files of rows, whoever reads them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from closedloop.config.sources import FileSource
from closedloop.errors import ConfigError, DataError
from closedloop.tabular.rows import RowFile, open_rows, require_file

GERMAN = FileSource(type="csv", encoding="cp1252", delimiter=";", decimal=",", na_values=("-",))
RENAME = {"Gebühr €": "fee", "Kunde": "id"}
NEEDED = ("fee", "Stadt")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_column_that_is_there_twice_is_refused_where_it_is_read(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        path.write_text("customer_id,outcome,customer_id\n1,0,9\n", encoding="utf-8")
    else:
        columns = [pa.array([value]) for value in ("1", "0", "9")]
        pq.write_table(pa.Table.from_arrays(columns, names=["customer_id", "outcome", "customer_id"]), path)
    with pytest.raises(DataError, match=rf"rows\{suffix}: more than one column 'customer_id'; rename all but one"):
        list(RowFile(path).read_chunks(["customer_id", "outcome"], 10))
    [table] = RowFile(path).read_chunks(["outcome"], 10)
    assert table.to_pydict() == {"outcome": ["0"]}


@pytest.mark.parametrize("target", ["gs://bucket/scores.parquet", "az://bucket/scores.csv", "S3://bucket/scores.csv"])
def test_an_address_is_no_file_to_write(target):
    """It made a folder of that name, here, and called that a success."""
    with pytest.raises(ConfigError, match=f"{target}: it is an address"):
        require_file(target)
    assert require_file("out/scores.csv") == Path("out/scores.csv")


def read(path: Path, source: FileSource, columns: list[str]) -> list[dict[str, str | None]]:
    file = open_rows(path, source, RENAME, needed=NEEDED, numeric=["fee"])
    return [row for table in file.read_chunks(columns, 2) for row in table.to_pylist()]


def test_a_file_in_the_data_sets_own_writing_gets_the_names_and_numbers_of_the_config(tmp_path):
    (tmp_path / "a.csv").write_text("Kunde;Stadt;Gebühr €\nK1;Köln;1,5\nK2;-;-\nK3;a, b;2\n", encoding="cp1252")
    assert read(tmp_path / "a.csv", GERMAN, ["id", "fee", "Stadt"]) == [
        {"id": "K1", "fee": "1.5", "Stadt": "Köln"},
        {"id": "K2", "fee": None, "Stadt": None},
        {"id": "K3", "fee": "2", "Stadt": "a, b"},
    ]


def test_ids_with_a_decimal_comma_and_names_with_two_characters_for_a_letter_are_read_as_ingest_does(tmp_path):
    (tmp_path / "a.csv").write_text("Kunde;Stadt;Gebu\u0308hr €\n17,0;Köln;1,5\n", encoding="utf-8")
    source = GERMAN.model_copy(update={"encoding": "utf-8"})
    assert read(tmp_path / "a.csv", source, ["id", "fee"]) == [{"id": "17", "fee": "1.5"}]


@pytest.mark.parametrize("source", [GERMAN, GERMAN.model_copy(update={"encoding": "utf-16"})])
def test_a_plain_file_under_the_models_names_is_read_as_it_stands(tmp_path, source):
    (tmp_path / "a.csv").write_text('fee,Stadt\n1.5,Köln\n"1,5",-\n', encoding="utf-8")
    assert read(tmp_path / "a.csv", source, ["fee", "Stadt"]) == [
        {"fee": "1.5", "Stadt": "Köln"},
        {"fee": "1,5", "Stadt": "-"},
    ]


def test_parquet_gets_the_names_too(tmp_path):
    pd.DataFrame({"Gebühr €": [1.5], "Stadt": ["Köln"]}).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", FileSource(type="parquet"), ["fee", "Stadt"]) == [{"fee": 1.5, "Stadt": "Köln"}]


def test_a_column_that_stands_there_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("fee;Gebühr €;Stadt\n1;2;Köln\n", encoding="cp1252")
    with pytest.raises(DataError, match="more than one column 'fee'"):
        read(tmp_path / "a.csv", GERMAN, ["fee"])


def test_where_the_comma_is_the_decimal_mark_a_point_makes_no_number(tmp_path):
    """1.234 is 1234 to who writes like that: ingest refuses it, and a score of 1.234 would be wrong without a word."""
    (tmp_path / "a.csv").write_text(
        "Kunde;Stadt;Gebühr €\nK1;Köln;1.234\nK2;Köln;1.234,5\nK3;Köln;\n", encoding="cp1252"
    )
    assert read(tmp_path / "a.csv", GERMAN, ["fee"]) == [
        {"fee": "1.234 (the decimal mark is ',')"},
        {"fee": "1.234,5 (the decimal mark is ',')"},
        {"fee": None},
    ]


def test_times_are_written_as_the_source_says_in_its_own_files_alone(tmp_path):
    source = GERMAN.model_copy(update={"time_format": "%d.%m.%Y"})
    (tmp_path / "a.csv").write_text("Kunde;Stadt;Gebühr €\n", encoding="cp1252")
    (tmp_path / "b.csv").write_text("fee,Stadt\n", encoding="utf-8")
    formats = [open_rows(tmp_path / name, source, RENAME, needed=NEEDED).time_format for name in ("a.csv", "b.csv")]
    assert formats == ["%d.%m.%Y", None]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    ("text", "rows"), [("a\r1\r2\r3\r", 3), ("a\r\n1\r\n2\r\n3", 3), ("a\n1\r2\n3", 3), ("a\n", 0)]
)
def test_lines_are_counted_however_they_end(text: str, rows: int, encoding: str, tmp_path, monkeypatch) -> None:
    """A cluster scores as many chunks as there may be: rows beyond them would be left out without a word."""
    monkeypatch.setattr("closedloop.tabular.csv_files.BLOCK_BYTES", 4)
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    file = RowFile(tmp_path / "a.csv", FileSource(type="csv", encoding=encoding))
    assert file.rows_max == rows
    monkeypatch.undo()
    assert sum(table.num_rows for table in file.read_chunks(["a"], 2)) == rows
