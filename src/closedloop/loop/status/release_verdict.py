"""The last decision about a release, for tools that wait for it: read from the journal, and never decided here."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from closedloop.core.release.entries import Entry
from closedloop.errors import ConfigError
from closedloop.store.journal import read_entry

if TYPE_CHECKING:
    from closedloop.store.journal import Journal

CHAMPION, REPLACED, ENTRIES_READ = "champion", "replaced", 200


class ReleaseVerdict(msgspec.Struct, frozen=True):
    """``stage`` is the step under way, "champion", "rejected" or "replaced"; None: the journal knows no such version.

    ``verdict`` is "promote" while the version serves all customers, "hold" while it is in a step before that or is not
    known, and "rollback" once it was taken back or another version took its place.
    """

    model_name: str
    version: str | None
    stage: str | None
    verdict: Literal["promote", "hold", "rollback"]
    reason: str
    decided_at: dt.datetime | None


def read_verdict(journal: Journal, model_name: str, query: Mapping[str, str]) -> ReleaseVerdict:
    """The verdict on the ``version`` of an HTTP query, or on the version that was moved last.

    Raises
    ------
    ConfigError
        If the query has another parameter, or a version that is no number.
    DataError
        If the journal is not to be believed.
    """
    version = query.get("version")
    if query.keys() - {"version"} or not (version is None or version.isdecimal()):
        raise ConfigError("the one parameter is version, a number")
    journal.read_deployment(model_name)
    entries = [read_entry(link) for link in journal.read(model_name, newest=ENTRIES_READ)]
    return find_verdict(model_name, entries, version)


def find_verdict(model_name: str, entries: Sequence[Entry], version: str | None = None) -> ReleaseVerdict:
    """The verdict of the newest entry about a version; None: the version that was moved last."""
    if version is None and entries:
        newest = entries[-1]
        under_way = newest.rollout.version if newest.rollout else newest.row.champion_version
        version = newest.rejected or under_way
    after = None  # the entry after the one that is looked at
    for entry in reversed(entries):
        if entry.rejected == version:
            return ReleaseVerdict(model_name, version, "rejected", "rollback", entry.reason, entry.recorded_at)
        stage = _find_stage(entry, version)
        if stage is None:
            after = entry
        elif after is None:
            verdict: Literal["promote", "hold"] = "promote" if stage == CHAMPION else "hold"
            return ReleaseVerdict(model_name, version, stage, verdict, entry.reason, entry.recorded_at)
        else:
            reason = f"version {after.row.champion_version} took its place: {after.reason}"
            return ReleaseVerdict(model_name, version, REPLACED, "rollback", reason, after.recorded_at)
    unknown = "nothing was released" if version is None else f"the journal's newest entries name no version {version}"
    return ReleaseVerdict(model_name, version, None, "hold", unknown, None)


def _find_stage(entry: Entry, version: str | None) -> str | None:
    """Where the entry leaves the version: in a step before the last, champion, or neither."""
    rollout = entry.rollout
    if rollout is not None and rollout.version == version and rollout.step != CHAMPION:
        return rollout.step
    return CHAMPION if entry.row.champion_version == version else None
