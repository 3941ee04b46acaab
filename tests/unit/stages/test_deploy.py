"""What serves is changed journal first, and whatever is left half done is completed by whoever comes next."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from closedloop.adapters.journal import Journal, JournalChanged, Rollout, read_entry
from closedloop.adapters.store import Deployment, Store
from closedloop.core.chain import find_break
from closedloop.errors import DataError, GateFailed
from closedloop.loop.rollback import verify
from closedloop.stages.deploy import Releases, deploy_champion
from tests.releases import NAME, NOW, Registry


class Killed(BaseException):
    """As a process that is killed: nothing handles it."""


class Mortal:
    """Another object whose methods are killed before or after they have done their work."""

    def __init__(self, inner: Any, clock: list[int]) -> None:
        self._inner, self._clock = inner, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in ("append", "write_deployment", "mirror_release"):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            self._tick()
            result = found(*arguments, **named)
            self._tick()
            return result

        return call

    def _tick(self) -> None:
        self._clock[0] -= 1
        if self._clock[0] == 0:
            raise Killed


@pytest.fixture
def releases(tmp_path: Path) -> Any:
    url = f"sqlite:///{tmp_path / 'operations.db'}"
    store, journal = Store(url), Journal(url)
    store.upgrade()
    yield Releases(Registry(), store, journal)  # type: ignore[arg-type]
    store.close()
    journal.close()


def promote(releases: Releases, version: str, **more: Any) -> None:
    deploy_champion(releases, version, now=NOW, actor="a test", reason="for the test", **more)


def test_the_first_version_serves_all_and_an_entry_says_so(releases: Releases) -> None:
    promote(releases, "1")
    row = releases.store.read_deployment(NAME)
    assert row == Deployment(NAME, 1, "1", f"{NAME}-1", NOW)
    (link,) = releases.journal.read(NAME)
    entry = read_entry(link)
    assert (entry.action, entry.actor, entry.reason, entry.row) == ("promote", "a test", "for the test", row)
    assert (releases.tracking.champion, releases.tracking.mark) == ("1", link.mark)  # type: ignore[attr-defined]
    promote(releases, "1")
    assert len(releases.journal.read(NAME)) == 1


def test_a_challenger_and_its_rollout_stand_in_row_and_journal(releases: Releases) -> None:
    promote(releases, "1")
    rollout = Rollout("2", "1", "canary", NOW, NOW)
    state = releases.move(
        releases.settle(),
        action="canary",
        actor="a test",
        reason="",
        now=NOW,
        champion="1",
        challenger=("2", "canary", 0.05),
        rollout=rollout,
        evidence={"errors": 3, "share": 0.05},
    )
    assert state.row == Deployment(NAME, 2, "1", f"{NAME}-1", NOW, "2", "canary", 0.05)
    again = releases.settle()
    assert again == state
    assert again.head is not None
    assert read_entry(again.head).evidence == {"errors": 3, "share": 0.05}


# one row, one entry, one mirror: each killed before and after
@pytest.mark.parametrize("moment", range(1, 7))
def test_a_move_that_was_killed_is_completed_or_never_happened(releases: Releases, moment: int) -> None:
    promote(releases, "1")
    clock = [moment]
    mortal = Releases(
        Mortal(releases.tracking, clock),  # type: ignore[arg-type]
        Mortal(releases.store, clock),
        Mortal(releases.journal, clock),  # type: ignore[arg-type]
    )
    with pytest.raises(Killed):
        mortal.move(
            releases.settle(), action="promote", actor="a test", reason="", now=NOW, champion="2", deal_anew=True
        )
    row, links = releases.store.read_deployment(NAME), releases.journal.read(NAME)
    assert row is not None
    # the row never runs ahead of the journal
    assert read_entry(links[-1]).row.revision - row.revision in (0, 1)
    expected = "1" if moment == 1 else "2"
    state = releases.settle()
    assert state.row is not None
    assert state.row.champion_version == releases.tracking.champion == expected  # type: ignore[attr-defined]
    assert state.row == read_entry(releases.journal.read(NAME)[-1]).row
    assert find_break(releases.journal.read(NAME), releases.tracking.mark) is None  # type: ignore[attr-defined]
    assert len(releases.journal.read(NAME)) == (1 if moment == 1 else 2)
    promote(releases, "3")
    assert releases.store.read_deployment(NAME).champion_version == "3"  # type: ignore[union-attr]


def test_of_two_that_decided_on_the_same_state_one_moves(releases: Releases) -> None:
    promote(releases, "1")
    state = releases.settle()
    releases.move(state, action="promote", actor="a", reason="", now=NOW, champion="2")
    with pytest.raises(JournalChanged, match="has an entry 2 by now"):
        releases.move(state, action="promote", actor="b", reason="", now=NOW, champion="3")
    assert releases.settle().row.champion_version == "2"  # type: ignore[union-attr]


def test_one_that_settles_what_another_is_about_to_write_does_no_harm(releases: Releases) -> None:
    class Slow:
        """A store that another process is quicker with."""

        def read_deployment(self, name: str) -> Deployment | None:
            return releases.store.read_deployment(name)

        def write_deployment(self, row: Deployment, expected_revision: int) -> Deployment:
            releases.settle()
            return releases.store.write_deployment(row, expected_revision)

    slow = dataclasses.replace(releases, store=Slow())
    promote(slow, "1")
    promote(slow, "2")
    assert releases.settle().row.champion_version == "2"  # type: ignore[union-attr]


def test_a_move_between_the_reads_of_journal_and_row_is_read_whole(releases: Releases) -> None:
    class Overtaken(Journal):
        """Read by somebody who is overtaken by a move after the first read."""

        overtaken = False

        def read_head(self, model_name: str) -> Any:
            found = super().read_head(model_name)
            if not self.overtaken:
                self.overtaken = True
                promote(releases, "2")
                promote(releases, "3")
            return found

    promote(releases, "1")
    with contextlib.closing(Overtaken(str(releases.journal._engine.url))) as journal:
        state = dataclasses.replace(releases, journal=journal).settle()
    assert (state.row.champion_version, state.head.sequence) == ("3", 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("ahead", ["3 ", "2 "])
def test_the_registrys_tag_is_left_where_the_journal_does_not_hold_against_it(releases: Releases, ahead: str) -> None:
    """Of a tail that was cut, or of a chain that was written anew, it is the proof."""
    promote(releases, "1")
    promote(releases, "2")
    kept = releases.tracking.mark = ahead + "a" * 64  # type: ignore[attr-defined]
    releases.settle()
    promote(releases, "3")
    assert releases.tracking.read_journal_mark() == kept
    assert releases.tracking.champion == "3"  # type: ignore[attr-defined]
    with pytest.raises(GateFailed, match=r"which the registry names|the registry names another hash"):
        verify(releases)


def test_a_row_that_was_changed_by_hand_stops_all_but_people(releases: Releases) -> None:
    promote(releases, "1")
    releases.store.write_deployment(Deployment(NAME, 0, "4", "salt", NOW), expected_revision=1)
    with pytest.raises(DataError, match=r"row is revision 2, which entry 1 of the journal did not write"):
        releases.settle()
    state = releases.settle(overrule=True)
    assert (state.row.champion_version, state.rollout) == ("4", None)  # type: ignore[union-attr]
    promote(releases, "2")
    assert releases.settle().row.revision == 3  # type: ignore[union-attr]


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
    assert releases.store.read_deployment(NAME).champion_version == "1"  # type: ignore[union-attr]
    assert "entry 3 is in force, the registry follows with the next pass" in caplog.text
    assert registry.champion == "2"
    registry.away = False
    releases.settle()
    assert registry.champion == "1"
