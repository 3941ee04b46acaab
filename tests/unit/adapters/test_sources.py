"""Reading other people's files and databases."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pandas as pd
import pytest

from closedloop.adapters.sources import CHUNK_ROWS, list_files, read_chunks
from closedloop.core.cleaning import normalise_ids
from closedloop.dataset import FileSource, SqlSource
from closedloop.errors import ConfigError, DataError

CSV = FileSource(type="csv")
URL = "CLOSEDLOOP_TEST_DATABASE"


def read_all(source: FileSource | SqlSource, path: Path | str | None, columns: list[str] | None = None) -> pd.DataFrame:
    parts = [rows.assign(file=name) for name, _, rows in read_chunks(source, path and str(path), columns)]
    return pd.concat(parts, ignore_index=True)


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def test_a_file_a_folder_and_a_pattern(tmp_path):
    write(tmp_path / "b.csv", "id\n2\n")
    write(tmp_path / "a.csv", "id\n1\n")
    write(tmp_path / "notes.txt", "no data")
    assert [path.name for path in list_files(str(tmp_path), ".csv")] == ["a.csv", "b.csv"]
    assert [path.name for path in list_files(str(tmp_path / "b.csv"), ".csv")] == ["b.csv"]
    assert [path.name for path in list_files(str(tmp_path / "[ab].*"), ".csv")] == ["a.csv", "b.csv"]
    assert read_all(CSV, tmp_path)[["id", "file"]].to_numpy().tolist() == [["1", "a.csv"], ["2", "b.csv"]]


@pytest.mark.parametrize("name", ["missing.csv", "*.parquet", ""])
def test_a_source_that_names_no_file_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"data\.source .*: no such file, no \.csv file in such a folder"):
        list_files(str(tmp_path / name), ".csv")


def test_cells_of_a_csv_stay_text(tmp_path):
    path = write(tmp_path / "a.csv", "id,n,t\n007,1.50,NA\n,,null\n")
    assert read_all(CSV, path)[["id", "n", "t"]].fillna("<blank>").to_numpy().tolist() == [
        ["007", "1.50", "NA"],
        ["<blank>", "<blank>", "null"],
    ]


def test_quotes_commas_and_line_breaks_inside_a_cell(tmp_path):
    path = write(tmp_path / "a.csv", 'id,note\n1,"a, ""b""\nc"\n2,d\n')
    assert read_all(CSV, path)["note"].tolist() == ['a, "b"\nc', "d"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_encodings(tmp_path, encoding):
    path = write(tmp_path / "a.csv", "id,name\n1,Zoë\n", encoding)
    source = FileSource(type="csv", encoding="utf-8" if encoding == "utf-8-sig" else encoding)
    rows = read_all(source, path, ["id", "name"])
    assert rows["name"].tolist() == ["Zoë"]


def test_another_encoding_than_said_is_refused_with_the_way_out(tmp_path):
    path = write(tmp_path / "a.csv", "id,name\n1,Zoë\n", "cp1252")
    with pytest.raises(DataError, match=r"a\.csv: byte \d+ is not utf-8; re-save the file, or set source\.encoding"):
        read_all(CSV, path)


def test_an_unknown_encoding_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", "id\n1\n")
    with pytest.raises(DataError, match=r"a\.csv: cannot be read as csv: unknown encoding: latin-99"):
        read_all(FileSource(type="csv", encoding="latin-99"), path)


def test_another_delimiter(tmp_path):
    path = write(tmp_path / "a.csv", "id;n\n1;2,5\n")
    assert read_all(FileSource(type="csv", delimiter=";"), path, ["id", "n"])["n"].tolist() == ["2,5"]


def test_an_empty_file_is_refused_and_column_names_alone_are_no_rows(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv: the file is empty; a header line with column names is required"):
        read_all(CSV, write(tmp_path / "a.csv", ""))
    assert len(read_all(CSV, write(tmp_path / "b.csv", "id,n\n"), ["id"])) == 0


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    write(tmp_path / "a.csv", "id,n\n1,2\n")
    write(tmp_path / "b.csv", "id,m\n1,2\n")
    with pytest.raises(DataError, match=r"^b\.csv: no column 'n', 'when'; its columns: id, m$"):
        list(read_chunks(CSV, str(tmp_path / "b.csv"), ["id", "n", "when"]))


def test_a_line_with_too_many_cells_is_refused_by_number(tmp_path):
    path = write(tmp_path / "a.csv", "id,n\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match=r"a\.csv: cannot be read as csv: .*Expected 2 fields in line 3, saw 3"):
        read_all(CSV, path)


def test_rows_are_counted_through_the_chunks_of_a_file_and_anew_in_the_next(tmp_path):
    rows = CHUNK_ROWS + 2
    write(tmp_path / "a.csv", "id\n" + "7\n" * rows)
    write(tmp_path / "b.csv", "id\n8\n")
    chunks = [(name, first, len(part), part.index[0]) for name, first, part in read_chunks(CSV, str(tmp_path), ["id"])]
    assert chunks == [("a.csv", 1, CHUNK_ROWS, 0), ("a.csv", CHUNK_ROWS + 1, 2, 0), ("b.csv", 1, 1, 0)]


def test_parquet_keeps_its_types(tmp_path):
    stamp = pd.Timestamp("2024-01-01 10:00", tz="UTC")
    table = pd.DataFrame({"id": [1, 2], "at": [stamp, stamp], "n": [1.5, None]})
    table.to_parquet(tmp_path / "a.parquet")
    rows = read_all(FileSource(type="parquet"), tmp_path, ["id", "at"])
    assert rows["id"].tolist() == [1, 2]
    assert rows["at"].tolist() == [stamp, stamp]


def test_what_is_called_parquet_and_is_not_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", "id\n1\n")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet"):
        read_all(FileSource(type="parquet"), path)


def test_a_source_without_a_path_says_how_to_give_one():
    with pytest.raises(ConfigError, match=r"data\.source: this data set has no path of its own; give one"):
        list(read_chunks(CSV, None, None))


def test_the_path_given_wins_over_the_configs(tmp_path):
    write(tmp_path / "a.csv", "id\n1\n")
    write(tmp_path / "b.csv", "id\n2\n")
    source = FileSource(type="csv", path=str(tmp_path / "a.csv"))
    assert read_all(source, None)["id"].tolist() == ["1"]
    assert read_all(source, tmp_path / "b.csv")["id"].tolist() == ["2"]


@pytest.fixture
def database(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "shop.db"
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("CREATE TABLE orders (id INTEGER, price REAL)")
        connection.executemany("INSERT INTO orders VALUES (?, ?)", [(1, 2.5), (2, None)])
    connection.close()
    monkeypatch.setenv(URL, f"sqlite:///{path}")
    return path


def test_a_query(database):
    source = SqlSource(type="sql", url_variable=URL, query="SELECT id, price FROM orders ORDER BY id DESC")
    rows = read_all(source, None, ["id", "price"])
    assert rows["id"].tolist() == [2, 1]
    assert rows["price"].tolist()[1] == 2.5


LONG = 1_234_567_890_123_456_789


def test_whole_numbers_stay_whole_beside_a_missing_one(tmp_path, monkeypatch):
    """As floats two long ids would be one, and the code 1 would be 1.0 where a part has a NULL."""
    ids = pd.array([LONG, LONG + 1, None], dtype="Int64")
    pd.DataFrame({"id": ids, "price": [1.5, None, 2.5]}).to_parquet(tmp_path / "a.parquet")
    with sqlite3.connect(tmp_path / "shop.db") as connection:
        connection.execute("CREATE TABLE orders (id INTEGER, price REAL)")
        connection.executemany("INSERT INTO orders VALUES (?, ?)", [(LONG, 1.5), (LONG + 1, None), (None, 2.5)])
    connection.close()
    monkeypatch.setenv(URL, f"sqlite:///{tmp_path / 'shop.db'}")
    query = SqlSource(type="sql", url_variable=URL, query="SELECT id, price FROM orders")
    for rows in (read_all(FileSource(type="parquet"), tmp_path / "a.parquet"), read_all(query, None)):
        assert normalise_ids(rows["id"]).tolist() == [f"{LONG}", f"{LONG + 1}", None]
        assert rows["price"].dtype == "float64"


def test_a_query_lacks_a_column(database):
    source = SqlSource(type="sql", url_variable=URL, query="SELECT id FROM orders")
    with pytest.raises(DataError, match=r"the query: no column 'price'; its columns: id"):
        read_all(source, None, ["price"])


def test_a_wrong_query_is_refused_in_the_databases_words(database):
    source = SqlSource(type="sql", url_variable=URL, query="SELECT id FROM sales")
    with pytest.raises(DataError, match=rf"source\.query \({URL}\): no such table: sales"):
        read_all(source, None)


def test_the_address_of_the_database_must_be_in_the_environment(monkeypatch):
    monkeypatch.delenv(URL, raising=False)
    source = SqlSource(type="sql", url_variable=URL, query="SELECT 1")
    with pytest.raises(ConfigError, match=f"the environment variable {URL} is not set"):
        read_all(source, None)


@pytest.mark.parametrize(
    "address", ["sesame", "nosuchdatabase://user:sesame@host/db", "sqlite:////no/folder/sesame.db"]
)
def test_a_wrong_address_is_refused_and_never_shown(monkeypatch, address):
    monkeypatch.setenv(URL, address)
    source = SqlSource(type="sql", url_variable=URL, query="SELECT 1")
    with pytest.raises(DataError) as error:
        read_all(source, None)
    assert URL in str(error.value)
    assert "sesame" not in str(error.value)


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setenv(URL, "oracle+cx_oracle://user:sesame@host/db")
    source = SqlSource(type="sql", url_variable=URL, query="SELECT 1 FROM dual")
    with pytest.raises(ConfigError, match=r"cx_Oracle.*is not installed") as error:
        read_all(source, None)
    assert "sesame" not in str(error.value)
