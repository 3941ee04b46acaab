"""The state of the loop: the serving version and the evidence about it, gathered once for people and for Prometheus."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from closedloop.core.release.entries import Deployment, Entry, Rollout
from closedloop.store.checks import OPEN_STATES, Check, Retraining, RetrainingState
from closedloop.store.journal import read_entry
from closedloop.store.status_queries import Share

if TYPE_CHECKING:
    from closedloop.store.checks import Checks
    from closedloop.store.journal import Journal
    from closedloop.store.status_queries import StatusQueries

CHECKS_READ, ENTRIES_READ, RETRAININGS_READ = 30, 200, 100


@dataclasses.dataclass(frozen=True)
class Sources:
    """The parts of the operations store that an overview reads."""

    journal: Journal
    checks: Checks
    queries: StatusQueries


@dataclasses.dataclass(frozen=True)
class Overview:
    """The state of a model's loop at ``now``, the service's clock, and ``as_of``, the data's clock.

    ``drift``, ``estimate``, ``realised`` and ``money`` are the newest evidence of that kind about the champion, empty
    if there is none yet. ``looked_at`` is when a pass of the controller last judged the rollout, or else when
    its step began. ``waiting`` is the version of the newest registered retraining if it has not been released.
    ``horizon_days`` is that of the data set's label rule; None: it has no such rule, and outcomes are reported.
    ``predicted_at`` is when the newest counted prediction was made, ``unchecked_at`` the champion's newest one before
    the midnight of ``as_of`` that no check has seen; None: there is none.
    ``accuracy`` and ``labelled`` are those of `closedloop.store.status_queries.StatusQueries`.
    """

    model_name: str
    now: dt.datetime
    as_of: dt.datetime
    horizon_days: int | None
    row: Deployment | None
    serves_since: dt.datetime | None
    rollout: Rollout | None
    looked_at: dt.datetime | None
    waiting: str | None
    check: Check | None
    drift: Mapping[str, Any]
    estimate: Mapping[str, Any]
    realised: Mapping[str, Any]
    money: Mapping[str, Any]
    accuracy: Share
    labelled: Share
    features_as_of: dt.datetime | None
    predicted_at: dt.datetime | None
    unchecked_at: dt.datetime | None
    retrainings: Mapping[RetrainingState, int]
    retraining: Retraining | None
    open_since: dt.datetime | None


def gather(
    sources: Sources, model_name: str, *, horizon_days: int | None, now: dt.datetime, as_of: dt.datetime
) -> Overview:
    """Read the state of the loop; the cost is bounded, however many predictions there are.

    Parameters
    ----------
    horizon_days
        The horizon of the data set's label rule; None: an outcome counts as soon as it is reported.
    as_of
        The data's clock; the date of the newest check is used instead if it is later.
    """
    row = sources.journal.read_deployment(model_name)
    entries = [read_entry(link) for link in sources.journal.read(model_name, newest=ENTRIES_READ)]
    checks = sources.checks.list_checks(model_name, limit=CHECKS_READ)
    retrainings = sources.checks.list_retrainings(model_name, limit=RETRAININGS_READ)
    champion = row.champion_version if row else ""
    own = [check.evidence for check in checks if check.model_version == champion]
    clock = max([as_of, *(check.as_of for check in checks[:1])])
    closed_by = clock - dt.timedelta(days=horizon_days or 0)
    since = _find_beginning(entries, row)
    waiting = [one.updated_at for one in retrainings if one.state in OPEN_STATES]
    queries = sources.queries
    rollout = entries[-1].rollout if entries else None
    passed_at = sources.journal.read_pass(model_name)
    return Overview(
        model_name=model_name,
        now=now,
        as_of=clock,
        horizon_days=horizon_days,
        row=row,
        serves_since=since,
        rollout=rollout,
        looked_at=max(rollout.step_at, passed_at or rollout.step_at) if rollout else None,
        waiting=_find_waiting(retrainings, entries),
        check=checks[0] if checks else None,
        **{part: _find_newest(own, part) for part in ("drift", "estimate", "realised", "money")},
        accuracy=queries.measure_accuracy(model_name, champion, closed_by=closed_by),
        labelled=queries.measure_maturity(model_name, closed_by=closed_by),
        features_as_of=queries.read_features_as_of(model_name),
        predicted_at=queries.read_predicted_at(model_name),
        unchecked_at=_find_unchecked(queries, model_name, champion, clock, checks),
        retrainings=sources.checks.count_retrainings(model_name),
        retraining=retrainings[0] if retrainings else None,
        open_since=min(waiting, default=None),
    )


def describe_nothing(model_name: str, *, horizon_days: int | None, now: dt.datetime, as_of: dt.datetime) -> Overview:
    """The state of a loop whose store has no tables yet."""
    unknown = dict.fromkeys(field.name for field in dataclasses.fields(Overview))
    empty: dict[str, Any] = {part: {} for part in ("drift", "estimate", "realised", "money", "retrainings")}
    known = {"model_name": model_name, "now": now, "as_of": as_of, "horizon_days": horizon_days}
    return Overview(**unknown | empty | known | {"accuracy": Share(), "labelled": Share()})  # type: ignore[arg-type]


def _find_unchecked(
    queries: StatusQueries, model_name: str, champion: str, clock: dt.datetime, checks: list[Check]
) -> dt.datetime | None:
    midnight = clock.replace(hour=0, minute=0, second=0, microsecond=0)
    found = queries.read_predicted_at(model_name, version=champion, until=midnight)
    seen = next((check.until for check in checks if check.model_version == champion), found)
    return found if found is not None and seen is not None and found >= seen else None


def _find_beginning(entries: list[Entry], row: Deployment | None) -> dt.datetime | None:
    """Since when the champion serves, as far as these entries go back."""
    since = row.updated_at if row else None
    for entry in reversed(entries):
        if row is None or entry.row.champion_version != row.champion_version:
            break
        since = entry.recorded_at
    return since


def _find_newest(evidence: list[dict[str, Any]], part: str) -> Mapping[str, Any]:
    return next((one[part] for one in evidence if part in one), {})


def _find_waiting(retrainings: list[Retraining], entries: list[Entry]) -> str | None:
    version = next((one.model_version for one in retrainings if one.state == "registered"), None)
    tried = {seen for entry in entries for seen in (entry.rejected, entry.row.champion_version)}
    tried |= {entry.row.challenger_version for entry in entries}
    return None if version in tried else version
