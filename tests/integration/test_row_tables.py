"""Rows of a database come in chunks of the size that was asked for, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from closedloop.tabular import row_tables

pytestmark = pytest.mark.thorough
VARIABLE = "ROWS_DATABASE_URL"


@pytest.fixture
def rows_table(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(VARIABLE, database)
    engine = sa.create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    table = sa.Table("row_chunks", sa.MetaData(), sa.Column("n", sa.Integer, primary_key=True))
    table.drop(engine, checkfirst=True)
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(table.insert(), [{"n": number} for number in range(12)])
    yield
    table.drop(engine)
    engine.dispose()


def test_a_query_is_read_in_chunks(rows_table: None) -> None:
    chunks = list(row_tables.read_query(VARIABLE, "SELECT n FROM row_chunks ORDER BY n", chunk_rows=5))
    assert [names for names, _ in chunks] == [["n"]] * 4
    assert [[number for (number,) in rows] for _, rows in chunks] == [[], [*range(5)], [*range(5, 10)], [10, 11]]


def test_a_table_is_read_in_chunks(rows_table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_tables, "CHUNK_ROWS", 5)
    table = row_tables.find_table(f"{VARIABLE}#row_chunks")
    assert table is not None
    names, chunks = row_tables.read_rows(table, ["n"], [])
    assert names == ["n"]
    assert [[number for (number,) in rows] for rows in chunks] == [[*range(5)], [*range(5, 10)], [10, 11]]
