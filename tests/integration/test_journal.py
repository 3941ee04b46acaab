"""The journal on SQLite and on a real PostgreSQL: one next entry, whoever writes; a change by hand is named."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from closedloop.core.release.entries import Deployment, Entry, Rollout
from closedloop.core.release.hash_chain import find_break
from closedloop.errors import DataError
from closedloop.store.database import Database
from closedloop.store.journal import Journal, JournalChanged, read_entry
from closedloop.store.migrations.tables import JOURNAL
from tests.deployments import change_row

pytestmark = pytest.mark.thorough

NAME = "shop_churn"
NOW = dt.datetime(2024, 1, 1, 12, 30, 15, 123456, tzinfo=dt.UTC)
ROW = Deployment(NAME, 1, "7", "salt", NOW, "8", "canary", 0.05)


@pytest.fixture(params=["sqlite", "postgresql"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journal]:
    url = f"sqlite:///{tmp_path / 'operations.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").create_database()
    made = Journal(Database(url))
    made.database.upgrade()
    yield made
    made.database.close()


def say(action: str, **changes: Any) -> Entry:
    rollout, row = Rollout("8", "7", "canary", NOW, NOW), msgspec.structs.replace(ROW, **changes)
    return Entry(action, "é tester", NOW, "because", row, rollout, evidence={"p": [0.1, None]})


def fill(journal: Journal, count: int = 3) -> None:
    for number in range(count):
        journal.append_entry(say(f"move {number}"), after=journal.read_newest(NAME)[1])


def execute(journal: Journal, statement: sa.Executable) -> None:
    with journal.database.begin() as connection:
        connection.execute(statement)


def test_what_was_appended_is_read_to_the_bit(journal: Journal) -> None:
    assert (journal.read(NAME), journal.read_newest(NAME)) == ([], (None, None))
    fill(journal)
    links = journal.read(NAME)
    assert [read_entry(link) for link in links] == [say(f"move {number}") for number in range(3)]
    assert journal.read_newest(NAME) == (ROW, links[-1])
    assert find_break(links, links[-1].mark) is None
    assert links[0].entry.startswith('{"action":"move 0","actor":"é tester","evidence":{"p":[0.1,null]},')
    assert journal.read("bank_churn") == []


def test_of_many_writers_one_appends_each_entry(journal: Journal) -> None:
    fill(journal, 1)
    _, head = journal.read_newest(NAME)

    def append(number: int) -> bool:
        try:
            journal.append_entry(say(f"of {number}"), after=head)
        except JournalChanged:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(append, range(8)))
    assert sum(written) == 1
    links = journal.read(NAME)
    assert read_entry(links[1]).action == f"of {written.index(True)}"
    assert (len(links), find_break(links)) == (2, None)


def test_the_row_is_replaced_with_the_entry_that_says_so(journal: Journal) -> None:
    fill(journal, 1)
    after = journal.read_newest(NAME)[1]
    alone = Deployment(NAME, 2, "8", "salt", NOW)
    head = journal.append_entry(Entry("confirm", "a test", NOW, "", alone), after=after)
    assert journal.read_newest(NAME) == (alone, head)
    assert journal.read_deployment(NAME) == alone
    assert journal.read_deployment("bank_churn") is None


@pytest.mark.parametrize("revision", [0, 2, 7])
def test_no_entry_is_written_over_a_row_that_was_changed_meanwhile(journal: Journal, revision: int) -> None:
    fill(journal, 1)
    head = journal.read_newest(NAME)[1]
    change_row(journal.database, NAME, revision=revision)
    with pytest.raises(JournalChanged, match=r"another deployment row, by now.*decide again"):
        journal.append_entry(say("the next", revision=9), after=head)
    row, newest = journal.read_newest(NAME)
    assert (row.revision, newest) == (revision, head)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "changes", [{"weight": 1.5}, {"challenger_mode": None}, {"challenger_version": None}, {"challenger_mode": "green"}]
)
def test_no_entry_is_written_for_a_row_that_makes_no_sense(journal: Journal, changes: Any) -> None:
    with pytest.raises(DataError, match=r"operations store|journal of shop_churn, entry 1: .*challenger_mode"):
        journal.append_entry(say("the first", **changes), after=None)
    assert (journal.read(NAME), journal.read_newest(NAME)) == ([], (None, None))


def test_a_changed_byte_a_missing_entry_and_a_cut_tail_are_named(journal: Journal) -> None:
    fill(journal, 4)
    mark = journal.read_newest(NAME)[1].mark  # type: ignore[union-attr]
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
