"""The journal on SQLite and on a real PostgreSQL: one next entry, whoever writes; a change by hand is named."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from closedloop.adapters.journal import Entry, Journal, JournalChanged, Rollout, read_entry
from closedloop.adapters.store import Deployment
from closedloop.core.chain import find_break
from closedloop.errors import DataError
from closedloop.migrations.tables import JOURNAL

pytestmark = pytest.mark.thorough

NAME = "shop_churn"
NOW = dt.datetime(2024, 1, 1, 12, 30, 15, 123456, tzinfo=dt.UTC)
ROW = Deployment(NAME, 1, "7", "salt", NOW, "8", "canary", 0.05)


@pytest.fixture(params=["sqlite", "postgresql"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journal]:
    if request.param == "sqlite":
        made = Journal(f"sqlite:///{tmp_path / 'operations.db'}")
    else:
        made = Journal(request.getfixturevalue("postgres").create_database())
    made.upgrade()
    yield made
    made.close()


def say(action: str) -> Entry:
    rollout = Rollout("8", "7", "canary", NOW, NOW)
    return Entry(action, "é tester", NOW, "because", ROW, rollout, evidence={"p": [0.1, None]})


def fill(journal: Journal, count: int = 3) -> None:
    for number in range(count):
        journal.append(NAME, say(f"move {number}"), after=journal.read_head(NAME))


def execute(journal: Journal, statement: sa.Executable) -> None:
    with journal._begin() as connection:
        connection.execute(statement)


def test_what_was_appended_is_read_to_the_bit(journal: Journal) -> None:
    assert (journal.read(NAME), journal.read_head(NAME)) == ([], None)
    fill(journal)
    links = journal.read(NAME)
    assert [read_entry(link) for link in links] == [say(f"move {number}") for number in range(3)]
    assert journal.read_head(NAME) == links[-1]
    assert find_break(links, links[-1].mark) is None
    assert links[0].entry.startswith('{"action":"move 0","actor":"é tester","evidence":{"p":[0.1,null]},')
    assert journal.read("bank_churn") == []


def test_of_many_writers_one_appends_each_entry(journal: Journal) -> None:
    fill(journal, 1)
    head = journal.read_head(NAME)

    def append(number: int) -> bool:
        try:
            journal.append(NAME, say(f"of {number}"), after=head)
        except JournalChanged:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(append, range(8)))
    assert sum(written) == 1
    links = journal.read(NAME)
    assert read_entry(links[1]).action == f"of {written.index(True)}"
    assert (len(links), find_break(links)) == (2, None)


def test_a_changed_byte_a_missing_entry_and_a_cut_tail_are_named(journal: Journal) -> None:
    fill(journal, 4)
    mark = journal.read_head(NAME).mark  # type: ignore[union-attr]
    table = JOURNAL.c
    execute(journal, sa.delete(JOURNAL).where(table.sequence == 4))
    assert find_break(journal.read(NAME)) is None
    cut = "entry 4 is missing: the journal ends before entry 4, which the registry names"
    assert find_break(journal.read(NAME), mark) == cut
    text = journal.read(NAME)[2].entry
    changed = sa.update(JOURNAL).where(table.sequence == 3).values(entry=text.replace("because", "becausf"))
    execute(journal, changed)
    assert find_break(journal.read(NAME)) == "entry 3 was changed: its hash is not that of its content"
    execute(journal, sa.delete(JOURNAL).where(table.sequence == 2))
    assert find_break(journal.read(NAME)) == "entry 2 is missing: entry 3 follows 1"
    execute(journal, sa.update(JOURNAL).where(table.sequence == 3).values(entry="{}"))
    with pytest.raises(DataError, match="journal of shop_churn, entry 3"):
        read_entry(journal.read(NAME)[1])
