"""The one place that changes what serves: the journal says it first, then the row, then what mirrors the row."""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from closedloop.adapters.journal import Entry, Journal, Rollout, read_entry
from closedloop.adapters.store import Deployment, DeploymentChanged
from closedloop.core.chain import find_break
from closedloop.errors import ClosedloopError, DataError

if TYPE_CHECKING:
    from closedloop.adapters.mlflow import Tracking
    from closedloop.core.chain import Link

logger = logging.getLogger(__name__)
FEATURES = "closedloop.feature_service"  # the registry's tag; the registry itself is imported late
Challenger = tuple[str, Literal["shadow", "canary"], float]  # version, mode, weight


class DeploymentTable(Protocol):
    """What is needed of the operations store."""

    def read_deployment(self, model_name: str) -> Deployment | None:
        """The deployment row, None before the first release."""

    def write_deployment(self, deployment: Deployment, expected_revision: int) -> Deployment:
        """Replace the row that was read with ``expected_revision``."""


class Traffic(Protocol):
    """Who splits traffic between champion and challenger."""

    def route(self, row: Deployment) -> bool:
        """Let traffic be split as the row says; whether something had to be written for it."""


class ServiceSplit:
    """The service splits by itself, customer by customer, and follows the row."""

    def route(self, row: Deployment) -> bool:  # noqa: ARG002 - a proxy asks for it
        """Nothing is left to do."""
        return False


class State(NamedTuple):
    """What serves, the newest entry of the journal, which said so, and whether a proxy had to be told."""

    row: Deployment | None
    head: Link | None
    rollout: Rollout | None
    routed: bool = False


@dataclasses.dataclass(frozen=True)
class Releases:
    """What a release is written to, in this order: journal, deployment row, a proxy's weights, aliases, the tag with
    the journal's head.

    An entry holds the whole row that it is about, so that whoever comes next completes what a killed process began
    (`settle`). Of processes that release at once one writes the next entry, the others are told to decide again.
    """

    tracking: Tracking
    store: DeploymentTable
    journal: Journal
    traffic: Traffic = dataclasses.field(default_factory=ServiceSplit)

    @property
    def model_name(self) -> str:
        """Whose releases these are."""
        return self.tracking.model_name

    def settle(self, *, overrule: bool = False, mirror: bool = True) -> State:
        """Complete the newest entry where that is still to be done, and return what is in force.

        Parameters
        ----------
        overrule
            Go on from the row as it is, where somebody changed it without the journal.
        mirror
            Whether the registry is looked at, which takes seconds; the next move mends it in any case.

        Raises
        ------
        DataError
            If the row is not what the journal says, and not what it was before either.
        """
        name = self.model_name
        head, row = self.journal.read_head(name), self.store.read_deployment(name)
        while (newest := self.journal.read_head(name)) != head:  # somebody moved between the two
            head, row = newest, self.store.read_deployment(name)
        if head is None:
            return State(row, None, None)
        entry = read_entry(head)
        revision = row.revision if row else 0
        if revision == entry.row.revision - 1:
            row = self._write_row(entry.row)
        elif row != entry.row:
            found = f"{name}: the deployment row is revision {revision}, which entry {head.sequence} of the journal "
            if not overrule:
                raise DataError(
                    f"{found}did not write; 'closedloop release promote' or 'release rollback' go on from it"
                )
            logger.warning("%sdid not write; it is gone on from", found)
            return State(row, head, None)
        routed = self.traffic.route(entry.row)
        if mirror:
            self._mirror(entry, head)
        return State(row, head, entry.rollout, routed)

    def move(
        self,
        state: State,
        *,
        action: str,
        actor: str,
        reason: str,
        now: dt.datetime,
        champion: str,
        challenger: Challenger | None = None,
        rollout: Rollout | None = None,
        rejected: str | None = None,
        evidence: Mapping[str, Any] | None = None,
        deal_anew: bool = False,
    ) -> State:
        """Let ``champion`` serve, and ``challenger`` (version, mode, weight) beside it: the one function that does.

        Parameters
        ----------
        state
            As `settle` returned it.
        deal_anew
            Deal customers to variants by a new salt: at the beginning of a release.

        Raises
        ------
        JournalChanged
            If somebody else moved first; nothing is written.
        DataError
            If the new champion carries no passed evaluation.
        """
        row, name = state.row, self.model_name
        earlier = [entry for entry in self.read_entries() if entry.row.champion_version == champion]
        # one that was champion may come back while the registry is away
        service = earlier[-1].feature_service if earlier else self.tracking.require_passed(champion).tags.get(FEATURES)
        revision = (row.revision if row else 0) + 1
        salt = row.salt if row and not deal_anew else f"{name}-{revision}"
        target = Deployment(name, revision, champion, salt, now, *(challenger or ()))
        entry = Entry(action, actor, now, reason, target, rollout, rejected, service, dict(evidence or {}))
        head = self.journal.append(name, entry, after=state.head)
        written = self._write_row(target)
        routed = self.traffic.route(written)
        self._mirror(entry, head)
        return State(written, head, rollout, routed)

    def note_route(self, state: State, rollout: Rollout, *, actor: str, reason: str, now: dt.datetime) -> State:
        """Journal that traffic is split as the row says by now: an entry ``routed`` with the same row."""
        assert state.head is not None
        earlier = read_entry(state.head)
        entry = Entry("routed", actor, now, reason, earlier.row, rollout, feature_service=earlier.feature_service)
        head = self.journal.append(self.model_name, entry, after=state.head)
        self._mirror(entry, head)
        return State(state.row, head, rollout)

    def read_entries(self) -> list[Entry]:
        """All that was ever moved, the oldest first."""
        return [read_entry(link) for link in self.journal.read(self.model_name)]

    def _write_row(self, target: Deployment) -> Deployment:
        """The row of an entry; another process may have written the same."""
        try:
            return self.store.write_deployment(target, expected_revision=target.revision - 1)
        except DeploymentChanged:
            if self.store.read_deployment(target.model_name) != target:
                raise
            return target

    def _mirror(self, entry: Entry, head: Link) -> None:
        """Let aliases and tags say what the row does; what the registry refuses is left to the next pass.

        A journal that does not hold against the registry's tag leaves that as it is: it is the proof.
        """
        reason = f"entry {head.sequence}: {entry.reason}"
        try:
            known = self.tracking.read_journal_mark()  # first: what is read after it holds it
            broken = find_break(self.journal.read(self.model_name), known)
            if broken:
                logger.error("the journal does not hold, see 'closedloop release verify': %s", broken)
            mark = None if broken or known == head.mark else head.mark
            self.tracking.mirror_release(entry.row.champion_version, rejected=entry.rejected, reason=reason, mark=mark)
        except ClosedloopError as error:
            logger.warning("entry %d is in force, the registry follows with the next pass: %s", head.sequence, error)


def deploy_champion(releases: Releases, version: str, *, now: dt.datetime, actor: str, reason: str) -> None:
    """Let a version serve all customers, and its alias say so; nothing changes where it does already."""
    state = releases.settle(overrule=True)
    if state.row is None or state.row.champion_version != version:
        releases.move(state, action="promote", actor=actor, reason=reason, now=now, champion=version, deal_anew=True)
