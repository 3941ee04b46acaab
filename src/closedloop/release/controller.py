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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from closedloop.adapters.mlflow import COMPARED_TAG, DIGEST_TAG, EXCUSED_TAG, FEATURES_TAG, KIND_TAG, VERDICT_TAG
from closedloop.contract import REFERENCE_FILE, check_digest, read_contract
from closedloop.core.evaluation.excuses import describe_excused
from closedloop.core.release.decision import decide_step
from closedloop.core.release.entries import OfferTerms, Rollout
from closedloop.core.release.guardrails import count_scores
from closedloop.core.release.policy import ReleasePolicy
from closedloop.core.release.types import StepDecision, StepEvidence
from closedloop.errors import ConfigError, DataError, GateFailed
from closedloop.release.evidence import Evidence
from closedloop.release.money import fix_stake
from closedloop.release.moves import Challenger, Move, Releases, ReleaseState
from closedloop.tabular.tables import read_table

if TYPE_CHECKING:
    from closedloop.adapters.mlflow import Tracking
    from closedloop.core.evaluation.value import CustomerValue

logger = logging.getLogger(__name__)


class Pass(NamedTuple):
    """The decision of a pass of the controller, and the state that it left; None: nothing is being released."""

    decision: StepDecision | None
    state: ReleaseState


def start_release(
    releases: Releases, evidence: Evidence, version: str, *, actor: str, now: dt.datetime
) -> ReleaseState:
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
    if reason is not None:
        releases.move(state, Move("reject", actor, reason, now, row.champion_version, rejected=version, deal_anew=True))
        raise GateFailed(f"version {version} is rejected: {reason}")
    # all evidence first: where it cannot be had, neither alias nor journal has moved
    scores, stake = read_reference(releases.tracking, version, evidence.value, evidence.value_columns)
    before, _ = read_reference(releases.tracking, row.champion_version, None, ())
    errors = evidence.errors.read_totals()
    traffic = evidence.measure_traffic(releases.model_name, now)
    rollout = Rollout(version, row.champion_version, "shadow", now, now, errors, scores, None, traffic, stake, before)
    reason = f"started: {describe_version(releases, version)}"
    shadow = Move("shadow", actor, reason, now, row.champion_version, (version, "shadow", 0.0), rollout)
    releases.tracking.set_challenger(version)
    started = time.monotonic()
    state = releases.move(state, dataclasses.replace(shadow, deal_anew=True))
    return note_route(releases, evidence, state, now=add_elapsed(now, started))


def resume(releases: Releases, evidence: Evidence, *, now: dt.datetime) -> ReleaseState:
    """Complete what a killed pass left (`Releases.mirror`); a step whose weights had to be set counts from here on."""
    started = time.monotonic()
    state = releases.mirror(releases.read_state())
    if releases.journal.keys and state.head is not None and state.head.key_name is None:
        state = releases.note(state, "signed", state.rollout, reason="the journal is signed from here on", now=now)
    return note_route(releases, evidence, state, now=add_elapsed(now, started))


def note_route(releases: Releases, evidence: Evidence, state: ReleaseState, *, now: dt.datetime) -> ReleaseState:
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
    return releases.note(state, "routed", rollout, reason=reason, now=now)


def add_elapsed(now: dt.datetime, started: float) -> dt.datetime:
    """``now``, which was read at ``started`` (`time.monotonic`), and what has passed since."""
    return now + dt.timedelta(seconds=time.monotonic() - started)


def find_obstacle(releases: Releases, version: str, champion: str) -> str | None:
    """Why a version may not be released against this champion; None if it may."""
    new = releases.tracking.require_passed(version)
    old = releases.tracking.read_version(champion)
    services = old.tags.get(FEATURES_TAG), new.tags.get(FEATURES_TAG)
    if services[0] != services[1]:
        return f"its features are of {services[1]}, the champion's of {services[0]}: it needs a service of its own"
    if new.tags.get(COMPARED_TAG) != old.tags.get(DIGEST_TAG):
        raise DataError(f"version {version} was not compared with version {champion}: run 'closedloop evaluate' again")
    verdict = new.tags.get(VERDICT_TAG)
    return None if verdict == "win" else f"the champion-challenger gate said {verdict}, win is needed"


def describe_version(releases: Releases, version: str) -> str:
    """Say whether a version is a training or a recalibration of an earlier one, and which of its gates were excused."""
    tags = releases.tracking.read_version(version).tags
    excused = [name for name in tags.get(EXCUSED_TAG, "none").split(", ") if name != "none"]
    return "; ".join(filter(None, [f"a {tags.get(KIND_TAG, 'training')}", describe_excused(excused)]))


def read_reference(
    tracking: Tracking, version: str, value: CustomerValue | None, columns: Sequence[str]
) -> tuple[tuple[int, ...], OfferTerms | None]:
    """The scores that a version was evaluated by, counted in bins; and what is at stake, None without a ``value``.

    Raises
    ------
    DataError
        If its folder is not the registered one.
    """
    with tempfile.TemporaryDirectory(prefix="closedloop-release-") as folder:
        place, digest = tracking.fetch_version(version, Path(folder))
        check_digest(place, digest)
        rows = read_table(place / REFERENCE_FILE, ["score", *columns], made_by="closedloop train")
        names = read_contract(place).feature_names if columns else ()
    stake = None if value is None else fix_stake(value, rows, [names.index(column) for column in columns])
    return count_scores(rows["score"]), stake


def run_pass(
    releases: Releases, evidence: Evidence, policy: ReleasePolicy, *, now: dt.datetime, as_of: dt.datetime
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
    judged = judge(releases, evidence, policy, state, now=now, as_of=as_of)
    if judged is None:
        return Pass(None, state)
    found, decision = judged
    if decision.verdict == "hold":
        logger.info("%s holds: %s", found.step, "; ".join(decision.reasons))
    else:
        state = apply(releases, evidence, policy, state, decision, found, now=now)
    releases.journal.note_pass(releases.model_name, now)
    return Pass(decision, state)


def judge(
    releases: Releases,
    evidence: Evidence,
    policy: ReleasePolicy,
    state: ReleaseState,
    *,
    now: dt.datetime,
    as_of: dt.datetime,
) -> tuple[StepEvidence, StepDecision] | None:
    """Gather and decide, without touching anything; None where no version is being released."""
    if state.row is None or state.rollout is None:
        return None
    found = evidence.gather(releases.model_name, state.rollout, revision=state.row.revision, now=now, as_of=as_of)
    return found, decide_step(fit_policy(policy, state.rollout), found)


def fit_policy(policy: ReleasePolicy, rollout: Rollout) -> ReleasePolicy:
    """The policy with the steps that were worked out as the release began."""
    if policy.requests_a_day is not None or rollout.requests_a_day is None:
        return policy
    return policy.model_copy(update={"requests_a_day": rollout.requests_a_day})


def apply(
    releases: Releases,
    evidence: Evidence,
    policy: ReleasePolicy,
    state: ReleaseState,
    decision: StepDecision,
    found: StepEvidence,
    *,
    now: dt.datetime,
) -> ReleaseState:
    """Do what was decided."""
    rollout, row = state.rollout, state.row
    assert rollout is not None  # noqa: S101 - there is a decision only of a rollout
    assert row is not None  # noqa: S101
    shown = {"evidence": dataclasses.asdict(found), "figures": decision.figures}
    move = Move("reject", "controller", "; ".join(decision.reasons), now, rollout.predecessor, evidence=shown)
    if decision.verdict == "roll_back":
        # before the last step the predecessor serves still
        action = "roll_back" if rollout.step == "champion" else "reject"
        return releases.move(state, dataclasses.replace(move, action=action, rejected=rollout.version))
    step = fit_policy(policy, rollout).next_step(rollout.step)
    if step is None:
        return releases.move(state, dataclasses.replace(move, action="confirm", champion=rollout.version))
    errors, started = evidence.errors.read_totals(), time.monotonic()
    rollout = msgspec.structs.replace(rollout, step=step.name, step_at=now, routed_at=None, errors_before=errors)
    # a proxy deals out requests itself; the stable service goes on scoring in shadow
    mode: Literal["shadow", "canary"] = "shadow" if evidence.unit == "request" else "canary"
    challenger: Challenger = (rollout.version, mode, step.weight)
    # dealt anew, so that no client knows from the step before which customers will be the challenger's
    move = dataclasses.replace(move, action=step.name, challenger=challenger, rollout=rollout, deal_anew=True)
    if step.name == "champion":
        # the predecessor scores on, so that closed outcomes test the new champion
        move = dataclasses.replace(move, champion=rollout.version, challenger=(rollout.predecessor, "shadow", 0.0))
    state = releases.move(state, move)
    return note_route(releases, evidence, state, now=add_elapsed(now, started))
