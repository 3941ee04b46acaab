"""The controller of releases: one pass gathers evidence, lets a pure function decide, and applies it journal first.

All that it knows between two passes stands in the journal, so that a pass may be killed anywhere, and any other
process may do the next.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import msgspec

from closedloop.adapters.journal import Rollout
from closedloop.adapters.tables import read_table
from closedloop.contract import REFERENCE_FILE, check_digest
from closedloop.core.guardrails import count_scores
from closedloop.core.rollout import Decision, RolloutPolicy, StepEvidence, decide_step
from closedloop.core.sequential import PairedLosses, sum_paired_losses
from closedloop.errors import ConfigError, DataError, GateFailed
from closedloop.stages.deploy import Challenger, Releases, State

if TYPE_CHECKING:
    import pandas as pd

    from closedloop.adapters.mlflow import Tracking
    from closedloop.core.rollout import ArmEvidence

logger = logging.getLogger(__name__)
# Every worker has taken up a new row by then; what was answered before belongs to the step before.
TAKEN_UP_AFTER = dt.timedelta(seconds=2)
Unit = Literal["customer", "request"]


class ArmSource(Protocol):
    """Where an arm's requests are read."""

    def summarise(self, model_name: str, version: str, *, shadow: bool, since: dt.datetime) -> ArmEvidence:
        """What a version answered, or scored in shadow, since a time."""


class OutcomeSource(Protocol):
    """Where closed outcomes are read."""

    def list_outcomes(
        self,
        model_name: str,
        *,
        as_of: dt.datetime,
        horizon_days: int,
        include_shadow: bool,
        versions: Collection[str] | None,
    ) -> pd.DataFrame:
        """Customers scored by these versions of whom it is known what happened."""


class ErrorSource(Protocol):
    """Where failed requests are counted, by "version/variant"."""

    def read_totals(self) -> dict[str, float]:
        """What has been counted so far."""

    def read_since(self, before: dict[str, float], seconds: float, *, version: str) -> dict[str, float]:
        """What was counted since; that nothing is known of ``version`` is an outage."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Gathers what a step is decided on.

    Parameters
    ----------
    unit
        What the split deals out: customers, or requests where a proxy splits.
    horizon_days
        Of the data set's outcomes; None: it has none.
    """

    arms: ArmSource
    outcomes: OutcomeSource
    errors: ErrorSource
    unit: Unit
    horizon_days: int | None

    def gather(self, name: str, rollout: Rollout, *, now: dt.datetime, as_of: dt.datetime) -> StepEvidence:
        """Evidence since the step began by ``now``, the service's clock; outcomes that are known by ``as_of``."""
        since, over = (rollout.routed_at or rollout.step_at) + TAKEN_UP_AFTER, rollout.step == "champion"
        seconds = (now - since).total_seconds()
        failed: dict[str, float] = {}
        if seconds > 0:
            failed = self.errors.read_since(rollout.errors_before or {}, seconds, version=rollout.version)
        arms = []
        for version in (rollout.predecessor, rollout.version):
            # who scores in shadow: the challenger at first, its predecessor at last
            shadow = (version == rollout.version) == (rollout.step == "shadow") and (over or rollout.step == "shadow")
            arm = self.arms.summarise(name, version, shadow=shadow, since=since)
            variants = ("shadow",) if shadow else ("champion", "canary")
            errors = round(sum(failed.get(f"{version}/{variant}", 0.0) for variant in variants))
            arms.append(dataclasses.replace(arm, requests=arm.requests + errors, errors=errors))
        hours = max((now - rollout.step_at).total_seconds() / 3600, 0.0)
        step: Any = rollout.step
        paired = self._pair(name, rollout, as_of)
        return StepEvidence(step, hours, arms[0], arms[1], paired, self.unit, rollout.reference_scores)

    def _pair(self, name: str, rollout: Rollout, as_of: dt.datetime) -> PairedLosses:
        if self.horizon_days is None:
            return PairedLosses()
        versions = (rollout.predecessor, rollout.version)
        rows = self.outcomes.list_outcomes(
            name, as_of=as_of, horizon_days=self.horizon_days, include_shadow=True, versions=versions
        )
        rows = rows[rows["customer_id"].notna()]
        # of a customer's predictions on a snapshot the first is here: the predecessor's may be from before the release
        began = (rows["predicted_at"] >= rollout.started_at) | (rows["model_version"] == rollout.predecessor)
        arms = [
            rows.loc[began & (rows["model_version"] == version), ["customer_id", "snapshot_at", "score", "outcome"]]
            for version in versions
        ]
        both = arms[0].merge(arms[1], on=["customer_id", "snapshot_at"], suffixes=("", "_of_version"))
        scores = both["score"], both["score_of_version"]
        return sum_paired_losses(both["outcome"], *scores, customers=both["customer_id"])


class Pass(NamedTuple):
    """What a pass of the controller decided, and the state that it left; None: nothing is being released."""

    decision: Decision | None
    state: State


def start_release(releases: Releases, evidence: Evidence, version: str, *, actor: str, now: dt.datetime) -> State:
    """Put a registered version into shadow, or reject it with the reason.

    Raises
    ------
    ConfigError
        If nothing serves yet, or another version is on its way.
    GateFailed
        If it did not win against the champion offline, or takes other features: it is rejected.
    DataError
        If it was compared with another champion, or never passed its gates.
    """
    state = resume(releases, evidence, now=now)
    row, rollout = state.row, state.rollout
    if row is None:
        raise ConfigError("nothing serves yet, so there is nothing to compare with: 'closedloop release promote' it")
    if rollout is not None and rollout.step != "champion":
        if rollout.version == version:
            return state
        raise ConfigError(f"version {rollout.version} is in {rollout.step}; 'closedloop release rollback' ends that")
    if row.champion_version == version:
        raise ConfigError(f"version {version} is champion already")
    reason = find_obstacle(releases, version, row.champion_version)
    common: dict[str, Any] = {"actor": actor, "now": now, "champion": row.champion_version, "deal_anew": True}
    if reason is not None:
        releases.move(state, action="reject", reason=reason, rejected=version, **common)
        raise GateFailed(f"version {version} is rejected: {reason}")
    releases.tracking.set_challenger(version)
    scores = read_reference_scores(releases.tracking, version)
    rollout = Rollout(version, row.champion_version, "shadow", now, now, evidence.errors.read_totals(), scores)
    challenger: Challenger = (version, "shadow", 0.0)
    started = time.monotonic()
    state = releases.move(state, action="shadow", reason="started", challenger=challenger, rollout=rollout, **common)
    return note_route(releases, evidence, state, now=add_elapsed(now, started))


def resume(releases: Releases, evidence: Evidence, *, now: dt.datetime) -> State:
    """Complete what was begun (`Releases.settle`); a step whose weights had to be set for it counts from here on."""
    started = time.monotonic()
    state = releases.settle()
    return note_route(releases, evidence, state, now=add_elapsed(now, started))


def note_route(releases: Releases, evidence: Evidence, state: State, *, now: dt.datetime) -> State:
    """Let requests be counted from now on, where a proxy's weights are in force only now, or errors were not read yet.

    Setting weights takes as long as it takes, and meanwhile requests are split as before: counted, they would look like
    a broken split.
    """
    rollout = state.rollout
    if rollout is None:
        return state
    by_proxy = evidence.unit == "request" and (state.routed or rollout.routed_at is None)
    if not by_proxy and rollout.errors_before is not None:
        return state
    rollout = msgspec.structs.replace(rollout, routed_at=now, errors_before=evidence.errors.read_totals())
    splits = f"the proxy splits as {rollout.step} says" if by_proxy else "errors are counted"
    reason = f"{splits}, requests count from here on"
    return releases.note_route(state, rollout, actor="controller", reason=reason, now=now)


def add_elapsed(now: dt.datetime, started: float) -> dt.datetime:
    """``now``, which was read at ``started`` (`time.monotonic`), and what has passed since."""
    return now + dt.timedelta(seconds=time.monotonic() - started)


def find_obstacle(releases: Releases, version: str, champion: str) -> str | None:
    """Why a version may not be released against this champion; None if it may."""
    from closedloop.adapters.mlflow import COMPARED_TAG, DIGEST_TAG, FEATURES_TAG, VERDICT_TAG

    new = releases.tracking.require_passed(version)
    old = releases.tracking.read_version(champion)
    services = old.tags.get(FEATURES_TAG), new.tags.get(FEATURES_TAG)
    if services[0] != services[1]:
        return f"its features are of {services[1]}, the champion's of {services[0]}: it needs a service of its own"
    if new.tags.get(COMPARED_TAG) != old.tags.get(DIGEST_TAG):
        raise DataError(f"version {version} was not compared with version {champion}: run 'closedloop evaluate' again")
    verdict = new.tags.get(VERDICT_TAG)
    return None if verdict == "win" else f"the champion-challenger gate said {verdict}, win is needed"


def read_reference_scores(tracking: Tracking, version: str) -> tuple[int, ...]:
    """The scores that a version was evaluated by, counted in bins.

    Raises
    ------
    DataError
        If its folder is not the registered one.
    """
    with tempfile.TemporaryDirectory(prefix="closedloop-release-") as folder:
        place, digest = tracking.fetch_version(version, Path(folder))
        check_digest(place, digest)
        return count_scores(read_table(place / REFERENCE_FILE, ["score"], made_by="closedloop train")["score"])


def run_pass(
    releases: Releases, evidence: Evidence, policy: RolloutPolicy, *, now: dt.datetime, as_of: dt.datetime
) -> Pass:
    """One pass: complete what was begun, gather, decide, apply.

    Parameters
    ----------
    now
        The service's clock (UTC), by which steps last and predictions are counted.
    as_of
        The outcomes known by then count; ``now``, but where data is replayed.
    """
    state = resume(releases, evidence, now=now)
    if state.rollout is None:
        return Pass(None, state)
    found, decision = judge(releases, evidence, policy, state.rollout, now=now, as_of=as_of)
    if decision.verdict == "hold":
        logger.info("%s holds: %s", state.rollout.step, "; ".join(decision.reasons))
    else:
        state = apply(releases, evidence, policy, state, decision, found, now=now)
    releases.journal.note_pass(releases.model_name, now)
    return Pass(decision, state)


def judge(
    releases: Releases,
    evidence: Evidence,
    policy: RolloutPolicy,
    rollout: Rollout,
    *,
    now: dt.datetime,
    as_of: dt.datetime,
) -> tuple[StepEvidence, Decision]:
    """Gather and decide, without touching anything."""
    found = evidence.gather(releases.model_name, rollout, now=now, as_of=as_of)
    return found, decide_step(policy, found)


def apply(
    releases: Releases,
    evidence: Evidence,
    policy: RolloutPolicy,
    state: State,
    decision: Decision,
    found: StepEvidence,
    *,
    now: dt.datetime,
) -> State:
    """Do what was decided."""
    rollout, row = state.rollout, state.row
    assert rollout is not None  # noqa: S101 - there is a decision only of a rollout
    assert row is not None  # noqa: S101
    shown = {"evidence": dataclasses.asdict(found), "figures": decision.figures}
    common: dict[str, Any] = {"actor": "controller", "reason": "; ".join(decision.reasons), "now": now}
    common["evidence"] = shown
    if decision.verdict == "roll_back":
        action = "roll_back" if rollout.step == "champion" else "reject"
        # before the last step the predecessor serves still
        return releases.move(state, action=action, champion=rollout.predecessor, rejected=rollout.version, **common)
    step = policy.next_step(rollout.step)
    if step is None:
        return releases.move(state, action="confirm", champion=rollout.version, **common)
    errors, started = evidence.errors.read_totals(), time.monotonic()
    rollout = msgspec.structs.replace(rollout, step=step.name, step_at=now, routed_at=None, errors_before=errors)
    champion = rollout.predecessor
    challenger: Challenger = (rollout.version, "canary", step.weight)
    if step.name == "champion":
        # the predecessor scores on, so that closed outcomes test the new champion
        champion, challenger = rollout.version, (rollout.predecessor, "shadow", 0.0)
    elif evidence.unit == "request":  # a proxy deals out requests; the stable service goes on scoring in shadow
        challenger = (rollout.version, "shadow", step.weight)
    state = releases.move(state, action=step.name, champion=champion, challenger=challenger, rollout=rollout, **common)
    return note_route(releases, evidence, state, now=add_elapsed(now, started))
