"""How the loop stands: what serves and what is known of it, gathered once for people and for Prometheus."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from closedloop.adapters.checks import OPEN_STATES, Check, Retraining, State
from closedloop.adapters.figures import Share
from closedloop.adapters.journal import Entry, Rollout, read_entry
from closedloop.adapters.store import Deployment

if TYPE_CHECKING:
    from closedloop.adapters.checks import Checks
    from closedloop.adapters.figures import Figures
    from closedloop.adapters.journal import Journal
    from closedloop.adapters.store import Store

CHECKS_READ, ENTRIES_READ, RETRAININGS_READ = 30, 200, 100


@dataclasses.dataclass(frozen=True)
class Sources:
    """The operations store, by what is read of it."""

    store: Store
    journal: Journal
    checks: Checks
    figures: Figures


@dataclasses.dataclass(frozen=True)
class Overview:
    """How a model's loop stands by ``now``, the service's clock, and ``as_of``, the data's.

    ``judged_at`` is when a check last had enough of the champion's predictions to judge, or since when it serves.
    ``drift``, ``estimate`` and ``realised`` are the newest evidence of that kind about the champion; empty: there is
    none yet. ``looked_at`` is when a pass of the controller last judged the rollout, or when its step began.
    ``waiting`` is the version of the newest registered retraining, if it was not released so far.
    ``accuracy`` and ``labelled`` are those of `closedloop.adapters.figures.Figures`.
    """

    model_name: str
    now: dt.datetime
    as_of: dt.datetime
    row: Deployment | None
    serves_since: dt.datetime | None
    rollout: Rollout | None
    looked_at: dt.datetime | None
    waiting: str | None
    check: Check | None
    judged_at: dt.datetime | None
    drift: Mapping[str, Any]
    estimate: Mapping[str, Any]
    realised: Mapping[str, Any]
    accuracy: Share
    labelled: Share
    features_as_of: dt.datetime | None
    retrainings: Mapping[State, int]
    retraining: Retraining | None
    open_since: dt.datetime | None


def gather(
    sources: Sources, model_name: str, *, horizon_days: int | None, now: dt.datetime, as_of: dt.datetime
) -> Overview:
    """Read how it stands; the cost is bounded, however many predictions there are.

    Parameters
    ----------
    horizon_days
        Of the data set's label rule; None: an outcome counts as soon as it is reported.
    as_of
        The data's clock; that of the newest check, if it is later.
    """
    row = sources.store.read_deployment(model_name)
    entries = [read_entry(link) for link in sources.journal.read(model_name, newest=ENTRIES_READ)]
    checks = sources.checks.list_checks(model_name, limit=CHECKS_READ)
    retrainings = sources.checks.list_retrainings(model_name, limit=RETRAININGS_READ)
    champion = row.champion_version if row else ""
    own = [check.evidence for check in checks if check.model_version == champion]
    clock = max([as_of, *(check.as_of for check in checks[:1])])
    closed_by = clock - dt.timedelta(days=horizon_days or 0)
    since = row.updated_at if row else None
    for entry in reversed(entries):
        if entry.row.champion_version != champion:
            break
        since = entry.recorded_at
    waiting = [one.updated_at for one in retrainings if one.state in OPEN_STATES]
    figures = sources.figures
    rollout = entries[-1].rollout if entries else None
    passed_at = sources.journal.read_pass(model_name)
    return Overview(
        model_name=model_name,
        now=now,
        as_of=clock,
        row=row,
        serves_since=since,
        rollout=rollout,
        looked_at=max(rollout.step_at, passed_at or rollout.step_at) if rollout else None,
        waiting=_find_waiting(retrainings, entries),
        check=checks[0] if checks else None,
        judged_at=sources.checks.read_judged_at(model_name, champion) or since,
        **{part: _find_newest(own, part) for part in ("drift", "estimate", "realised")},
        accuracy=figures.measure_accuracy(model_name, champion, closed_by=closed_by),
        labelled=figures.measure_maturity(model_name, closed_by=closed_by),
        features_as_of=figures.read_features_as_of(model_name),
        retrainings=sources.checks.count_retrainings(model_name),
        retraining=retrainings[0] if retrainings else None,
        open_since=min(waiting, default=None),
    )


def _find_newest(evidence: list[dict[str, Any]], part: str) -> Mapping[str, Any]:
    return next((one[part] for one in evidence if part in one), {})


def _find_waiting(retrainings: list[Retraining], entries: list[Entry]) -> str | None:
    version = next((one.model_version for one in retrainings if one.state == "registered"), None)
    tried = {seen for entry in entries for seen in (entry.rejected, entry.row.champion_version)}
    tried |= {entry.row.challenger_version for entry in entries}
    return None if version in tried else version
