"""Moves of a release by hand: promote a version by hand, take one back, and prove the journal."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import TYPE_CHECKING, NamedTuple

from closedloop.adapters.mlflow import DIGEST_TAG, FEATURES_TAG
from closedloop.core.release.entries import Entry, Rollout
from closedloop.core.release.hash_chain import Link, find_break
from closedloop.errors import ConfigError, DataError, GateFailed
from closedloop.release.moves import Move, Releases, ReleaseState
from closedloop.store.journal import find_difference, read_entry

if TYPE_CHECKING:
    from closedloop.adapters.feast import Features


def promote(
    releases: Releases, features: Features, version: str, *, actor: str, reason: str, now: dt.datetime
) -> ReleaseState:
    """Make a version champion at once; its predecessor scores on in shadow, so that closed outcomes test it.

    What is counted of its errors begins with the controller's next pass: the service need not run for this.

    Raises
    ------
    DataError
        If it never passed its gates, or its features do not exist any more.
    """
    state = releases.read_state(overrule=True)
    before = state.row.champion_version if state.row else None
    if before == version and state.rollout is None and state.journaled:
        return releases.mirror(state)
    service = releases.tracking.require_passed(version).tags.get(FEATURES_TAG)
    require_features(features, version, service, serving=None)
    move = Move("promote", actor, reason, now, version, deal_anew=True)
    entries = releases.read_entries()
    if before is None or before == version or find_service(entries, before) != service:
        return releases.move(state, move)
    rollout = Rollout(version, before, "champion", now, now, errors_before=None)
    return releases.move(state, dataclasses.replace(move, challenger=(before, "shadow", 0.0), rollout=rollout))


def roll_back(
    releases: Releases,
    features: Features,
    *,
    to: str | None,
    actor: str,
    reason: str,
    now: dt.datetime,
    only_open: bool = False,
) -> ReleaseState:
    """End what is on its way, or else give the champion's place back; model, features and thresholds in one.

    Parameters
    ----------
    to
        The version that serves afterwards; None: the champion that stays if a version is in shadow or canary, else
        the champion before.
    only_open
        End a shadow or canary, and else change nothing: whoever asks may have been overtaken by the controller.

    Raises
    ------
    ConfigError
        If there is nothing to go back to.
    DataError
        If the version's features do not exist any more.
    """
    state = releases.read_state(overrule=True)
    if state.row is None:
        raise ConfigError("nothing serves yet, so there is nothing to go back from")
    entries, current = releases.read_entries(), state.row.champion_version
    rollout = state.rollout
    open_release = rollout is not None and rollout.step != "champion"
    if only_open and not open_release:
        return state
    target = to or (current if open_release else find_predecessor(entries, current))
    if target is None:
        raise ConfigError(f"version {current} has no predecessor in the journal; name one with --to")
    if target == current and not open_release:
        raise ConfigError(f"version {current} is what serves")
    if target != current:
        service = find_service(entries, target)
        if service is None:
            service = releases.tracking.require_passed(target).tags.get(FEATURES_TAG)
        require_features(features, target, service, serving=find_service(entries, current))
    lost = rollout.version if rollout is not None and rollout.version != target else current
    rejected = None if lost == target else lost
    return releases.move(state, Move("roll_back", actor, reason, now, target, rejected=rejected, deal_anew=True))


def require_features(features: Features, version: str, service: str | None, *, serving: str | None) -> None:
    """Refuse a version whose features are gone; those that serve now are there.

    Raises
    ------
    DataError
        Naming the feature service.
    """
    if service is None or (service != serving and not features.has_service(service)):
        raise DataError(
            f"version {version} takes the features of {service or 'no service that is known'}, which the feature store "
            "does not hold any more: it could not score a customer"
        )


def find_predecessor(entries: list[Entry], current: str) -> str | None:
    """The champion to go back to from ``current``: going back twice goes two back, not back and forth.

    None if the journal knows no other.
    """
    stack: list[str] = []
    for entry in entries:
        version = entry.row.champion_version
        stack = [*stack[: stack.index(version)], version] if version in stack else [*stack, version]
    return next((version for version in reversed(stack) if version != current), None)


def find_service(entries: list[Entry], version: str) -> str | None:
    """The feature service of a former champion, as the journal knows it."""
    known = (entry.feature_service for entry in reversed(entries) if entry.row.champion_version == version)
    return next(known, None)


class Proof(NamedTuple):
    """The result of `verify`: how many entries, how many of the newest are signed, and whether there is a key."""

    entries: int
    signed: int
    keyed: bool


def verify(releases: Releases) -> Proof:
    """Prove the journal by itself, by the registry's tags, and the deployment row by the newest entry.

    Raises
    ------
    GateFailed
        Naming the place where it is broken.
    ConfigError
        If it is signed, and there is no key here to prove it by.
    """
    name, journal = releases.model_name, releases.journal
    links = journal.read(name)
    signed = sum(link.key_name is not None for link in links)
    if signed and not journal.keys:
        raise ConfigError(f"the journal of {name} is signed: set CLOSEDLOOP_RELEASE__JOURNAL_KEY to prove it")
    row, head = journal.read_newest(name)
    broken = find_break(links, releases.tracking.read_journal_mark(), journal.keys) or find_difference(row, head)
    if broken is None and head is not None:
        broken = releases.find_forgery(head) or _find_other_digest(releases, head)
    if broken is not None:
        raise GateFailed(f"journal of {name}: {broken}")
    return Proof(len(links), signed, bool(journal.keys))


def describe_proof(proof: Proof) -> list[str]:
    """The facts that were proved, and those that were not."""
    lines = [
        f"the journal holds: {proof.entries} {'entry' if proof.entries == 1 else 'entries'}, {proof.signed} signed"
    ]
    if not proof.keyed:
        lines.append(
            "not protected: no key is set, so whoever can write the operations store can forge the next entry, and "
            "with it what serves. Set CLOSEDLOOP_RELEASE__JOURNAL_KEY where others can reach the store"
        )
    elif proof.signed < proof.entries:
        before = proof.entries - proof.signed
        held = "the first signed one holds them" if proof.signed else "'closedloop release step' signs them"
        lines.append(f"the first {before} are from before the key: the registry's tag proves them, and {held}")
    return lines


def _find_other_digest(releases: Releases, head: Link) -> str | None:
    """A version that serves, whose registered digest is not the one that it was released with."""
    for version, digest in read_entry(head).row.digests.items():
        found = releases.tracking.read_version(version).tags.get(DIGEST_TAG)
        if found != digest:
            return f"version {version} was released with the digest {digest[:12]}, the registry names {str(found)[:12]}"
    return None
