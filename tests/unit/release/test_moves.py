"""What serves is changed with its entry of the journal, at once; the next pass completes what mirrors it."""

from __future__ import annotations

import copy
import dataclasses
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from closedloop.core.release.entries import Deployment, Rollout
from closedloop.core.release.hash_chain import find_break
from closedloop.errors import DataError, GateFailed
from closedloop.release.by_hand import verify
from closedloop.release.moves import Move, Releases, deploy_champion
from closedloop.store.database import Database
from closedloop.store.journal import Journal, JournalChanged, read_entry
from tests.deployments import change_row
from tests.releases import DIGESTS, NAME, NOW, Registry


class Killed(BaseException):
    """As a process that is killed: nothing handles it."""


@pytest.fixture
def releases(tmp_path: Path) -> Any:
    with closing(Database(f"sqlite:///{tmp_path / 'operations.db'}")) as database:
        database.upgrade()
        yield Releases(Registry(), Journal(database), draw_salt=lambda: "salt 1")  # type: ignore[arg-type]


def promote(releases: Releases, version: str, **more: Any) -> None:
    deploy_champion(releases, version, now=NOW, actor="a test", reason="for the test", **more)


def test_salts_are_drawn_at_random_where_nobody_gives_any(releases: Releases) -> None:
    """Of a salt that can be guessed a client foretells who is in the canary."""
    drawn = [Releases(releases.tracking, releases.journal).draw_salt() for _ in range(20)]
    assert len(set(drawn)) == 20
    assert min(map(len, drawn)) >= 32


def test_the_first_version_serves_all_and_an_entry_says_so(releases: Releases) -> None:
    promote(releases, "1")
    row = releases.journal.read_deployment(NAME)
    assert row == Deployment(NAME, 1, "1", "salt 1", NOW, digests={"1": DIGESTS[1]})
    (link,) = releases.journal.read(NAME)
    entry = read_entry(link)
    assert (entry.action, entry.actor, entry.reason, entry.row) == ("promote", "a test", "for the test", row)
    assert (releases.tracking.champion, releases.tracking.mark) == ("1", link.mark)  # type: ignore[attr-defined]
    promote(releases, "1")
    assert len(releases.journal.read(NAME)) == 1


def test_a_challenger_and_its_rollout_stand_in_row_and_journal(releases: Releases) -> None:
    promote(releases, "1")
    rollout = Rollout("2", "1", "canary", NOW, NOW)
    move = Move("canary", "a test", "", NOW, "1", ("2", "canary", 0.05), rollout, evidence={"errors": 3, "share": 0.05})
    state = releases.move(releases.read_state(), move)
    assert state.row == Deployment(NAME, 2, "1", "salt 1", NOW, "2", "canary", 0.05, {"1": DIGESTS[1], "2": DIGESTS[2]})
    again = releases.read_state()
    assert again == state
    assert again.head is not None
    assert read_entry(again.head).evidence == {"errors": 3, "share": 0.05}


# the entry, the row, the commit, and each part of the mirror
@pytest.mark.parametrize("moment", range(1, 6))
def test_a_move_that_was_killed_happened_as_a_whole_or_not_at_all(releases: Releases, moment: int) -> None:
    promote(releases, "1")
    left, database, registry = [moment], releases.journal.database, releases.tracking

    def tick(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    def write(connection: sa.Connection, _: Any, statement: str, *__: Any) -> None:
        if statement.startswith("INSERT"):
            connection.info["wrote"] = True
            tick()

    def commit(connection: sa.Connection) -> None:
        if connection.info.pop("wrote", False):
            tick()

    def mirror(*arguments: Any, **named: Any) -> None:
        tick()
        Registry.mirror_release(registry, *arguments, **named)  # type: ignore[arg-type]
        tick()

    mortal = dataclasses.replace(releases, tracking=copy.copy(registry))
    mortal.tracking.mirror_release = mirror  # type: ignore[method-assign]
    sa.event.listen(database.engine, "before_cursor_execute", write)
    sa.event.listen(database.engine, "commit", commit)
    with pytest.raises(Killed):
        mortal.move(releases.read_state(), Move("promote", "a test", "", NOW, "2", deal_anew=True))
    sa.event.remove(database.engine, "before_cursor_execute", write)
    sa.event.remove(database.engine, "commit", commit)
    row, head = releases.journal.read_newest(NAME)
    assert row is not None
    assert head is not None
    assert releases.journal.read_deployment(NAME) == read_entry(head).row  # never one without the other
    expected = "1" if moment <= 3 else "2"
    state = releases.mirror(releases.read_state())
    assert state.row is not None
    assert state.row.champion_version == registry.champion == expected  # type: ignore[attr-defined]
    assert find_break(releases.journal.read(NAME), registry.mark) is None  # type: ignore[attr-defined]
    assert len(releases.journal.read(NAME)) == int(expected)
    promote(releases, "3")
    assert releases.journal.read_deployment(NAME).champion_version == "3"  # type: ignore[union-attr]


def test_of_two_that_decided_on_the_same_state_one_moves(releases: Releases) -> None:
    promote(releases, "1")
    state = releases.read_state()
    releases.move(state, Move("promote", "a", "", NOW, "2"))
    with pytest.raises(JournalChanged, match="has an entry 2 of the journal, or another deployment row, by now"):
        releases.move(state, Move("promote", "b", "", NOW, "3"))
    assert releases.read_state().row.champion_version == "2"  # type: ignore[union-attr]


@pytest.mark.parametrize("ahead", ["3 ", "2 "])
def test_the_registrys_tag_is_left_where_the_journal_does_not_hold_against_it(releases: Releases, ahead: str) -> None:
    """Of a tail that was cut, or of a chain that was written anew, it is the proof."""
    promote(releases, "1")
    promote(releases, "2")
    kept = releases.tracking.mark = ahead + "a" * 64  # type: ignore[attr-defined]
    releases.mirror(releases.read_state())
    promote(releases, "3")
    assert releases.tracking.read_journal_mark() == kept
    assert releases.tracking.champion == "3"  # type: ignore[attr-defined]
    with pytest.raises(GateFailed, match=r"which the registry names|the registry names another hash"):
        verify(releases)


def test_a_row_that_was_changed_by_hand_stops_all_but_people(releases: Releases) -> None:
    promote(releases, "1")
    change_row(releases.journal.database, NAME, revision=2, champion_version="4")
    for read in (releases.read_state, lambda: releases.journal.read_deployment(NAME)):  # a controller, an agent
        with pytest.raises(DataError, match=r"\(revision 2, champion 4\) is another; entry 1 of the journal did not"):
            read()
    state = releases.read_state(overrule=True)
    assert (state.row.champion_version, state.rollout) == ("4", None)  # type: ignore[union-attr]
    promote(releases, "4")  # although the row names it already: the entry is what was missing
    assert releases.read_state().row.revision == 3  # type: ignore[union-attr]


def test_a_version_that_failed_its_gates_leaves_no_trace(releases: Releases) -> None:
    promote(releases, "1")
    with pytest.raises(DataError, match="no passed evaluation"):
        promote(releases, "5")
    assert len(releases.journal.read(NAME)) == 1


def test_while_the_registry_is_away_a_former_champion_comes_back(
    releases: Releases, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(releases, "1")
    promote(releases, "2")
    registry: Any = releases.tracking
    registry.away = True
    monkeypatch.setattr(registry, "require_passed", lambda _: pytest.fail("the registry is away"))
    monkeypatch.setattr(logging.getLogger("closedloop"), "propagate", True)
    promote(releases, "1")
    assert releases.journal.read_deployment(NAME).champion_version == "1"  # type: ignore[union-attr]
    assert "entry 3 is in force, the registry follows with the next pass" in caplog.text
    assert registry.champion == "2"
    registry.away = False
    releases.mirror(releases.read_state())
    assert registry.champion == "1"
