"""A data set behind a query: it is read like a file, and no error shows the database's password."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import sqlalchemy
import yaml

SECRET = "s3cr3t-w0rd"
VARIABLE = "CLUB_DATABASE"
QUERY = "SELECT id, visits, joined_at, plan, left_club FROM members ORDER BY id"


def describe(query=QUERY):
    return {
        "name": "club",
        "model_name": "club_churn",
        "description": "Members of a club, in a database.",
        "kind": "table",
        "source": {"type": "sql", "url_variable": VARIABLE, "query": query},
        "columns": {
            "entity_id": "id",
            "numeric": ["visits"],
            "categorical": ["plan"],
            "label": {"column": "left_club", "churned": "1", "stayed": "0"},
        },
        "expectations": [],
    }


@pytest.fixture
def club(project, monkeypatch):
    """A project whose data are 40 rows of an SQLite database."""
    draw = np.random.default_rng(5)
    rows = pd.DataFrame({"id": range(1, 41), "visits": draw.integers(0, 9, 40), "joined_at": "2024-01-01"})
    rows["plan"], rows["left_club"] = (
        np.where(rows["id"] % 3 == 0, "family", "basic"),
        (rows["id"] % 4 == 0).astype(int),
    )
    # an engine, since pandas changes how sqlite3 reads times in this whole process when it is given a connection
    engine = sqlalchemy.create_engine(f"sqlite:///{project.root / 'club.db'}")
    rows.to_sql("members", engine, index=False)
    engine.dispose()
    write_config(project, describe())
    project.change_params({"dataset": "club"})
    monkeypatch.setenv(VARIABLE, f"sqlite:///{project.root / 'club.db'}")
    return project


def write_config(project, config):
    (project.root / "configs/datasets/club.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def refuse(project, kind, *words):
    output = project.run("ingest", status=1).output
    text = " ".join(output.split())
    assert f"{kind}: " in text
    for word in words:
        assert word in text
    assert SECRET not in output
    assert "Traceback" not in output
    assert len(output.splitlines()) <= 25
    assert not (project.root / "data/raw").exists()
    assert not (project.root / "metrics").exists()


def test_a_query_is_read(club):
    club.run("ingest")
    rows = pd.read_parquet(club.root / "data/raw/customers.parquet")
    assert len(rows) == 40
    assert rows["customer_id"].tolist() == sorted(str(number) for number in range(1, 41))
    assert rows["churned"].sum() == 10


def test_an_unset_variable(club, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    refuse(club, "ConfigError", f"source.url_variable: the environment variable {VARIABLE} is not set")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("SELECT * FROM nobody", "no such table: nobody"),
        ("SELEC id FROM members", 'near "SELEC": syntax error'),
        ("SELECT id, plan FROM members", "the query: no column 'visits', 'left_club'; its columns: id, plan"),
        (f"{QUERY.split('ORDER')[0]} WHERE id > 99", "there are column names, but no rows"),
        ("SELECT id, visits, plan, 'x' AS left_club FROM members", "must be '1' (churned) or '0' (stayed), found 'x'"),
    ],
)
def test_a_query_that_fails(club, query, words):
    write_config(club, describe(query))
    refuse(club, "DataError", words)


@pytest.mark.parametrize(
    ("address", "kind", "words"),
    [
        (
            f"sqlite:////nowhere/{SECRET}/club.db",
            "ServiceUnavailable",
            f"source.query ({VARIABLE}): unable to open database file",
        ),
        (f"nosuchdatabase://reader:{SECRET}@host/club", "ConfigError", "needs a driver of nosuchdatabase"),
        (f"no address at all, but {SECRET}", "DataError", f"source.query ({VARIABLE}): "),
        (f"oracle+oracledb://reader:{SECRET}@host/club", "ConfigError", "needs the Python package oracledb"),
        (f"postgresql+psycopg://reader:{SECRET}@127.0.0.1:1/club", "ServiceUnavailable", f"{VARIABLE}"),
        (f"postgresql+psycopg://reader:{SECRET}@host:port/club", "DataError", f"{VARIABLE}"),
    ],
    ids=["no file", "unknown database", "no address", "no driver", "refused", "bad port"],
)
def test_an_address_that_does_not_work_keeps_its_password(club, monkeypatch, address, kind, words):
    monkeypatch.setenv(VARIABLE, address)
    refuse(club, kind, words)


@pytest.mark.parametrize(
    ("query", "status"),
    [
        (f"{QUERY}; DROP TABLE members", 1),
        ("DELETE FROM members", 1),
        ("DELETE FROM members RETURNING *", 0),  # it gives rows, and is not committed
    ],
)
def test_a_query_that_writes_changes_nothing(club, query, status):
    write_config(club, describe(query))
    club.run("ingest", status=status)
    engine = sqlalchemy.create_engine(f"sqlite:///{club.root / 'club.db'}")
    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("SELECT count(*) FROM members")).scalar() == 40
    engine.dispose()
