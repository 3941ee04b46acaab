"""What people do to a release: promote a version by hand, take one back, and prove the journal."""

from __future__ import annotations

import datetime as dt
from typing import Any, Protocol

from closedloop.adapters.journal import Entry, Rollout
from closedloop.core.chain import find_break
from closedloop.errors import ConfigError, DataError, GateFailed
from closedloop.stages.deploy import Releases, State


class Definitions(Protocol):
    """Where feature services are found."""

    def has_service(self, name: str) -> bool:
        """Whether a feature service, and the views behind it, still exist."""


def promote(
    releases: Releases, definitions: Definitions, version: str, *, actor: str, reason: str, now: dt.datetime
) -> State:
    """Make a version champion at once; its predecessor scores on in shadow, so that closed outcomes test it.

    What is counted of its errors begins with the controller's next pass: the service need not run for this.

    Raises
    ------
    DataError
        If it never passed its gates, or its features do not exist any more.
    """
    from closedloop.adapters.mlflow import FEATURES_TAG

    state = releases.settle(overrule=True)
    before = state.row.champion_version if state.row else None
    if before == version and state.rollout is None:
        return state
    service = releases.tracking.require_passed(version).tags.get(FEATURES_TAG)
    require_features(definitions, version, service, serving=None)
    common: dict[str, Any] = {"actor": actor, "reason": reason, "now": now, "champion": version, "deal_anew": True}
    entries = releases.read_entries()
    if before is None or before == version or find_service(entries, before) != service:
        return releases.move(state, action="promote", **common)
    rollout = Rollout(version, before, "champion", now, now, errors_before=None)
    return releases.move(state, action="promote", challenger=(before, "shadow", 0.0), rollout=rollout, **common)


def roll_back(
    releases: Releases,
    definitions: Definitions,
    *,
    to: str | None,
    actor: str,
    reason: str,
    now: dt.datetime,
    only_open: bool = False,
) -> State:
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
    state = releases.settle(overrule=True, mirror=False)  # the registry is seconds away, and the row is what counts
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
            from closedloop.adapters.mlflow import FEATURES_TAG

            service = releases.tracking.require_passed(target).tags.get(FEATURES_TAG)
        require_features(definitions, target, service, serving=find_service(entries, current))
    rejected = rollout.version if rollout is not None and rollout.version != target else current
    return releases.move(
        state,
        action="roll_back",
        actor=actor,
        reason=reason,
        now=now,
        champion=target,
        rejected=None if rejected == target else rejected,
        deal_anew=True,
    )


def require_features(definitions: Definitions, version: str, service: str | None, *, serving: str | None) -> None:
    """Refuse a version whose features are gone; those that serve now are there.

    Raises
    ------
    DataError
        Naming the feature service.
    """
    if service is None or (service != serving and not definitions.has_service(service)):
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


def verify(releases: Releases) -> int:
    """Prove the journal against itself, the registry's tag and the deployment row; returns how many entries it has.

    Raises
    ------
    GateFailed
        Naming the place where it is broken.
    """
    name = releases.model_name
    links, row = releases.journal.read(name), releases.store.read_deployment(name)
    broken = find_break(links, releases.tracking.read_journal_mark())
    if broken is None and links:
        wanted = releases.read_entries()[-1].row
        behind = wanted.revision - (row.revision if row else 0)
        if behind != 1 and row != wanted:  # one behind: a killed move, which the next pass completes
            broken = f"entry {len(links)} and the deployment row differ: the row was changed without the journal"
    if broken is not None:
        raise GateFailed(f"journal of {name}: {broken}")
    return len(links)
