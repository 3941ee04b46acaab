"""Reading other people's files and databases."""

from __future__ import annotations

import gzip
import sqlite3
import tracemalloc
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from closedloop.config.sources import FileSource, SqlSource
from closedloop.core.features.parsing import parse_ids
from closedloop.errors import ConfigError, DataError, ServiceUnavailable
from closedloop.tabular import csv_files
from closedloop.tabular.sources import CHUNK_ROWS, list_files, read_chunks

CSV = FileSource(type="csv")
URL = "CLOSEDLOOP_TEST_DATABASE"


def read_all(source: FileSource | SqlSource, path: Path | str | None, columns: list[str] | None = None) -> pd.DataFrame:
    chunks = read_chunks(source, path and str(path), columns or [], all_columns=columns is None)
    parts = [rows.assign(file=name) for name, _, rows in chunks]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


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
    with pytest.raises(DataError, match=r"a\.csv, line 2: holds bytes that are not utf-8; save the file as UTF-8, or"):
        read_all(CSV, path)


def test_an_unknown_encoding_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", "id\n1\n")
    source = FileSource(type="csv").model_copy(update={"encoding": "latin-99"})  # a config would be refused
    with pytest.raises(DataError, match=r"a\.csv: cannot be read as csv: unknown encoding: latin-99"):
        read_all(source, path)


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


LINES = {
    "one cell more in the first row": (
        "id,n\n1,2,3\n4,5\n",
        2,
        "the number of cells is 3, but 2 in the header; quote a cell",
    ),
    "one cell more": ("id,n\n1,2\n1,2,3\n", 3, "the number of cells is 3, but 2 in the header"),
    "a delimiter at each end": (
        "id,n\n1,2,\n3,4,\n",
        2,
        "the number of cells is 3, but 2 in the header; a delimiter at the end",
    ),
    "a cell too few": ("id,n\n1,2\n3\n4,5\n", 3, "the number of cells is 1, but 2 in the header; is the file cut off"),
    "a last line that breaks off": ("id,n,at\n1,2,2024-01-01\n3,4", 3, "the number of cells is 2, but 3 in the header"),
    "after a quoted line break": ('id,n\n1,"a\nb"\n3\n', 4, "the number of cells is 1, but 2 in the header"),
    "after blank lines": ("\n\nid,n\n\n1,2,3\n", 5, "the number of cells is 3, but 2 in the header"),
    "a quote that swallows the rest": ('id,n\n1,"a\n2,b\n3,c\n', 2, "a quoted value does not end"),
    "a quote in the last line": ('id,n\n1,a\n2,"b', 3, "a quoted value does not end"),
    "a quote inside quotes": ('id,n\n1,a\n2,"b"c"\n', 3, "',' expected after '\"'"),
    "line ends of Windows": ("id,n\r\n1,2\r\n3\r\n", 3, "the number of cells is 1"),
}


@pytest.mark.parametrize("way", ["plain", "semicolon", "tab", "gzip", "utf-16", "folder", "glob"])
@pytest.mark.parametrize("fault", LINES)
def test_a_line_of_another_length_is_refused_with_file_and_line(tmp_path, fault, way):
    """In the reader of pandas the first of these makes ids of the second column, without a word."""
    text, line, rule = LINES[fault]
    delimiter = {"semicolon": ";", "tab": "\t"}.get(way, ",")
    encoding = "utf-16" if way == "utf-16" else "utf-8"
    content = text.replace(",", delimiter).encode(encoding)
    (tmp_path / "a.csv").write_text("id,n\n1,2\n".replace(",", delimiter), encoding=encoding)
    path = tmp_path / ("b.csv.gz" if way == "gzip" else "b.csv")
    path.write_bytes(gzip.compress(content) if way == "gzip" else content)
    source = FileSource(type="csv", delimiter=delimiter, encoding=encoding)
    named = {"folder": tmp_path, "glob": tmp_path / "*.csv"}.get(way, path)
    with pytest.raises(DataError) as error:
        read_all(source, named, ["id"])
    assert f"{path}, line {line}: {rule.replace(chr(39) + ',', chr(39) + delimiter)}" in str(error.value)


@pytest.mark.parametrize(
    "text", ['id,n\n1,5" pipe\n', 'id,n\n1,"5"" pipe"\n2,"a\nb"', "id,n\n\n1,2\n\n", "id,n\r1,2\r"]
)
def test_quotes_blank_lines_and_old_line_ends_that_are_right(tmp_path, text):
    assert len(read_all(CSV, write(tmp_path / "a.csv", text), ["id"])) == (2 if "a\nb" in text else 1)


def test_a_damaged_archive_is_refused(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"id,n\n1,2\n" * 100)[:-9])
    with pytest.raises(DataError, match=r"a\.csv\.gz: cannot be read as csv"):
        read_all(CSV, path, ["id"])


@pytest.mark.parametrize(("head", "line"), [(b"", 1), (b"id,n\n1,2\n3,", 3)])
def test_a_line_that_does_not_end_is_refused_and_never_held_whole(tmp_path, head, line, monkeypatch):
    """A small archive may unpack to one. PyArrow reads up to 32 blocks ahead, the more the busier the machine is."""
    monkeypatch.setattr(csv_files, "BLOCK_BYTES", 1 << 20)
    path = tmp_path / "a.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(192):
            file.write(b"x" * 1_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"a\.csv\.gz, line {line}: more than 1,048,576 characters"):
            read_all(CSV, path, ["id"])
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_beside_a_long_cell_the_line_that_is_broken_is_named(tmp_path):
    path = write(tmp_path / "a.csv", f"id,n\n1,{'x' * 200_000}\n2\n")
    with pytest.raises(DataError, match=r"a\.csv, line 3: the number of cells is 1, but 2 in the header"):
        read_all(CSV, path, ["id"])


def test_a_folder_takes_an_ending_in_any_case_and_packed_files_but_no_hidden_ones(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("JAN.csv", "FEB.CSV", "._JAN.csv", "notes.txt"):
        write(tmp_path / name, "id\n1\n")
    (tmp_path / "mar.csv.gz").write_bytes(gzip.compress(b"id\n3\n"))
    assert [path.name for path in list_files(str(tmp_path), ".csv")] == ["FEB.CSV", "JAN.csv", "mar.csv.gz"]
    assert "left out: ._JAN.csv, notes.txt" in caplog.text
    assert read_all(CSV, tmp_path, ["id"])["id"].tolist() == ["1", "1", "3"]


@pytest.mark.parametrize(
    ("name", "advice"), [("a.xls", "save it as .xlsx, or"), ("a.ods", "CSV UTF-8"), ("a.zip", "unpack it")]
)
def test_what_people_have_instead_of_a_csv_file_is_refused_with_the_way_out(tmp_path, name, advice):
    path = write(tmp_path / name, "PK")
    with pytest.raises(DataError, match=rf"{name}: is .*{advice}"):
        read_all(CSV, path)


@pytest.mark.parametrize("way", ["csv", "parquet", "sql"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, monkeypatch, way):
    source, path = FileSource(type=way) if way != "sql" else None, tmp_path / f"a.{way}"
    if way == "csv":
        write(path, "id,fee,fee\n1,2,3\n")
    elif way == "parquet":
        table = pa.table([pa.array([1]), pa.array([2]), pa.array([3])], names=["id", "fee", "fee"])
        pq.write_table(table, path)
    else:
        monkeypatch.setenv(URL, "sqlite://")
        source = SqlSource(type="sql", url_variable=URL, query="SELECT 1 AS id, 2 AS fee, 3 AS fee")
    with pytest.raises(DataError, match="more than one column 'fee'; rename all but one of them"):
        read_all(source, path, ["id", "fee"])
    assert read_all(source, path, ["id"])["id"].astype(int).tolist() == [1]  # others are of no concern


def test_columns_get_other_names(tmp_path):
    path = write(tmp_path / "a.csv", 'id,"plan #1, ""old""",a:b\n1,x,2\n')
    names = {'plan #1, "old"': "plan", "a:b": "ratio"}
    [(_, _, rows)] = read_chunks(CSV, str(path), ["id", "plan", "ratio"], rename=names)
    assert rows.to_dict("records") == [{"id": "1", "plan": "x", "ratio": "2"}]
    with pytest.raises(DataError, match="more than one column 'id'"):
        list(read_chunks(CSV, str(path), ["id"], rename={"a:b": "id"}))


def test_texts_that_mean_a_missing_value(tmp_path):
    write(tmp_path / "a.csv", "id,plan\n1,NULL\n2, ? \n3,NULLS\n")
    pd.DataFrame({"id": [1, 2, 3], "plan": ["NULL", "?", "NULLS"]}).to_parquet(tmp_path / "a.parquet")
    for type_ in ("csv", "parquet"):
        source = FileSource(type=type_, na_values=["NULL", "?"])
        assert read_all(source, tmp_path / f"a.{type_}", ["id", "plan"])["plan"].tolist() == [None, None, "NULLS"]


def test_a_wrong_delimiter_is_guessed_at(tmp_path):
    with pytest.raises(DataError, match=r"no column 'id'; its columns: id;n; is source\.delimiter right\?"):
        read_all(CSV, write(tmp_path / "a.csv", "id;n\n1;2\n"), ["id"])


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
        ids = parse_ids(rows["id"], place="here", row_numbers=pd.Series([1, 2, 3]))
        assert ids.tolist() == [f"{LONG}", f"{LONG + 1}", None]
        assert pd.to_numeric(rows["price"]).tolist()[::2] == [1.5, 2.5]


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
    ("address", "kind"),
    [
        ("sesame", DataError),
        ("nosuchdatabase://user:sesame@host/db", ConfigError),
        ("postgresql+psycopg://user:sesame@host:port/db", DataError),
        ("sqlite:////no/folder/sesame.db", ServiceUnavailable),
    ],
)
def test_a_wrong_address_is_refused_and_never_shown(monkeypatch, address, kind):
    monkeypatch.setenv(URL, address)
    source = SqlSource(type="sql", url_variable=URL, query="SELECT 1")
    with pytest.raises(kind) as error:
        read_all(source, None)
    assert URL in str(error.value)
    assert "sesame" not in str(error.value)


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setenv(URL, "oracle+cx_oracle://user:sesame@host/db")
    source = SqlSource(type="sql", url_variable=URL, query="SELECT 1 FROM dual")
    with pytest.raises(ConfigError, match=r"cx_Oracle.*is not installed") as error:
        read_all(source, None)
    assert "sesame" not in str(error.value)
