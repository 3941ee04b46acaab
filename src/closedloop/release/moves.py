"""The one place that changes what serves: journal entry and deployment row at once, then what mirrors the row."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from closedloop.adapters.mlflow import DIGEST_TAG, FEATURES_TAG
from closedloop.core.release.entries import Deployment, Entry, Rollout
from closedloop.core.release.hash_chain import find_break
from closedloop.errors import ClosedloopError, DataError, ServiceUnavailable
from closedloop.store.journal import Journal, find_difference, read_entry

if TYPE_CHECKING:
    from closedloop.adapters.kubectl import TrafficSplit
    from closedloop.adapters.mlflow import Tracking
    from closedloop.core.release.hash_chain import Link

logger = logging.getLogger(__name__)
SENT_FIELDS = ("model_name", "champion_version", "challenger_version", "challenger_mode", "canary_percent")
Challenger = tuple[str, Literal["shadow", "canary"], float]  # version, mode, weight


class ReleaseState(NamedTuple):
    """The version that serves, the journal's newest entry, and the rollout that is under way.

    ``routed``: a proxy had to be told its weights. ``journaled``: the entry wrote the row; else a person changed it.
    """

    row: Deployment | None
    head: Link | None
    rollout: Rollout | None
    routed: bool = False
    journaled: bool = True


@dataclasses.dataclass(frozen=True)
class Move:
    """The versions to serve from now on, and why: ``champion``, and beside it ``challenger`` (version, mode, weight).

    ``rejected`` is the version that lost with this move. ``deal_anew`` deals customers to variants by a new salt: as
    each step begins, so that no client knows beforehand which customers will be the challenger's.
    """

    action: str
    actor: str
    reason: str
    now: dt.datetime
    champion: str
    challenger: Challenger | None = None
    rollout: Rollout | None = None
    rejected: str | None = None
    evidence: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    deal_anew: bool = False


@dataclasses.dataclass(frozen=True)
class Releases:
    """Writes a release to journal and deployment row in one transaction, and then to the mirrors of both.

    A proxy's weights, the registry's aliases and its tag with the journal's head follow the row; the next pass
    completes (`mirror`) what a killed process left of them. Of processes that release at once one writes the next
    entry, the others are told to decide again.
    ``traffic`` is a proxy that splits requests; None: the service splits them itself, and follows the row.
    ``draw_salt`` gives salts that nobody can guess; no route, log, metric or message shows one. ``tell``, such as a
    webhook's, is told what moved.
    """

    tracking: Tracking
    journal: Journal
    traffic: TrafficSplit | None = None
    draw_salt: Callable[[], str] = secrets.token_hex
    tell: Callable[..., None] = lambda *_, **__: None

    @property
    def model_name(self) -> str:
        """Whose releases these are."""
        return self.tracking.model_name

    def read_state(self, *, overrule: bool = False) -> ReleaseState:
        """The state that is in force, by the store alone.

        Parameters
        ----------
        overrule
            Go on from the row as it is, where a person changed it without the journal.

        Raises
        ------
        DataError
            If the row is not what the newest entry wrote, or that entry is forged.
        """
        row, head = self.journal.read_newest(self.model_name)
        if head is None:
            return ReleaseState(row, None, None)
        fault = find_difference(row, head) or self.find_forgery(head)
        if fault and not overrule:
            raise DataError(fault)
        if fault:
            logger.warning("%s", fault)
            return ReleaseState(row, head, None, journaled=False)
        entry = read_entry(head)
        return ReleaseState(entry.row, head, entry.rollout)

    def find_forgery(self, head: Link) -> str | None:
        """`Journal.find_forgery`, by what the registry names as the head where the entry is from before the key."""
        before_key = bool(self.journal.keys) and head.key_name is None
        return self.journal.find_forgery(head, known_head=self.tracking.read_journal_mark() if before_key else None)

    def mirror(self, state: ReleaseState) -> ReleaseState:
        """Let the proxy's weights and the registry follow, where a killed process or a person left them behind."""
        if state.head is None or not state.journaled:
            return state
        entry = read_entry(state.head)
        routed = self.traffic.route(entry.row.canary_percent) if self.traffic else False
        self._mirror_in_registry(entry, state.head)
        return state._replace(routed=routed)

    def move(self, state: ReleaseState, move: Move) -> ReleaseState:
        """Let another version serve, or another share: the one function that does.

        Raises
        ------
        JournalChanged
            If another process moved since ``state`` was read; nothing is written.
        DataError
            If the new champion carries no passed evaluation.
        """
        row, name, entries = state.row, self.model_name, self.read_entries()
        earlier = [entry for entry in entries if entry.row.champion_version == move.champion]
        # a former champion may come back while the registry is away
        tags = {} if earlier else self.tracking.require_passed(move.champion).tags
        service = earlier[-1].feature_service if earlier else tags.get(FEATURES_TAG)
        revision = (row.revision if row else 0) + 1
        salt = row.salt if row and not move.deal_anew else self.draw_salt()
        target = Deployment(name, revision, move.champion, salt, move.now, *(move.challenger or ()))
        target = msgspec.structs.replace(target, digests=self._find_digests(target, entries))
        entry = Entry(
            action=move.action,
            actor=move.actor,
            recorded_at=move.now,
            reason=move.reason,
            row=target,
            rollout=move.rollout,
            rejected=move.rejected,
            feature_service=service,
            evidence=dict(move.evidence),
        )
        head = self.journal.append_entry(entry, after=state.head)
        sent = {name: getattr(target, name) for name in SENT_FIELDS}
        sent |= {"sequence": head.sequence, "rejected": move.rejected, "action": move.action}
        sent |= {"actor": move.actor, "reason": move.reason}
        self.tell("release.moved", f"{target.model_name} {head.sequence}", sent, now=move.now)
        return self.mirror(ReleaseState(target, head, move.rollout))

    def note(
        self, state: ReleaseState, action: str, rollout: Rollout | None, *, reason: str, now: dt.datetime
    ) -> ReleaseState:
        """Journal what the controller did, ``routed`` or ``signed``, in an entry with the same row."""
        assert state.head is not None  # noqa: S101 - narrows the type
        earlier = read_entry(state.head)
        row = msgspec.structs.replace(earlier.row, digests=self._find_digests(earlier.row, [earlier]))
        entry = Entry(action, "controller", now, reason, row, rollout, feature_service=earlier.feature_service)
        head = self.journal.append_entry(entry, after=state.head)
        self._mirror_in_registry(entry, head)
        return ReleaseState(row, head, rollout)

    def _find_digests(self, row: Deployment, entries: Sequence[Entry]) -> dict[str, str]:
        """The digests of a row's versions: as they were first journaled, else as the registry's tags say them."""
        known: dict[str, str] = {}
        for entry in reversed(entries):
            known |= entry.row.digests
        found = {}
        for version in filter(None, (row.champion_version, row.challenger_version)):
            digest = known.get(version)
            if digest is None:
                released = any(version in (e.row.champion_version, e.row.challenger_version) for e in entries)
                # one that was released before digests were journaled may come back while the registry is away
                with contextlib.suppress(*[ServiceUnavailable] if released else []):
                    digest = self.tracking.read_version(version).tags.get(DIGEST_TAG)
            if digest is not None:
                found[version] = digest
        return found

    def read_entries(self) -> list[Entry]:
        """All that was ever moved, the oldest first."""
        return [read_entry(link) for link in self.journal.read(self.model_name)]

    def _mirror_in_registry(self, entry: Entry, head: Link) -> None:
        """Let aliases and tags say what the row does; what the registry refuses is left to the next pass.

        A journal that does not hold against the registry's tag leaves that as it is: it is the proof.
        """
        reason = f"entry {head.sequence}: {entry.reason}"
        try:
            known = self.tracking.read_journal_mark()  # first: what is read after it holds it
            broken = find_break(self.journal.read(self.model_name), known, self.journal.keys)
            if broken:
                logger.error("the journal does not hold, see 'closedloop release verify': %s", broken)
            mark = None if broken or known == head.mark else head.mark
            self.tracking.mirror_release(entry.row.champion_version, rejected=entry.rejected, reason=reason, mark=mark)
        except ClosedloopError as error:
            logger.warning("entry %d is in force, the registry follows with the next pass: %s", head.sequence, error)


def deploy_champion(releases: Releases, version: str, *, now: dt.datetime, actor: str, reason: str) -> None:
    """Let a version serve all customers, and its alias say so; nothing changes where it does already."""
    state = releases.read_state(overrule=True)
    if state.journaled and state.row is not None and state.row.champion_version == version:
        releases.mirror(state)
        return
    releases.move(state, Move("promote", actor, reason, now, version, deal_anew=True))
