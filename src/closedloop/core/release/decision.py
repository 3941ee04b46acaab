"""How a release moves: one pure function decides a step on recorded evidence - advance, hold or roll back.

The controller gathers `StepEvidence`, calls `decide_step`, applies the verdict and journals all three. Every sequential
test in it may be looked at as often as one likes (`closedloop.core.release.sequential`).
"""

from __future__ import annotations

import math

from closedloop.core.release.guardrails import list_guardrails
from closedloop.core.release.policy import ReleasePolicy
from closedloop.core.release.types import StepDecision, StepEvidence

THIN_REQUESTS_MIN = 10  # with fewer the challenger may not have been reached at all


def decide_step(policy: ReleasePolicy, evidence: StepEvidence) -> StepDecision:
    """Decide a step of a release.

    A broken split is reported before anything else, since nothing measured across it means what it says. Then any
    guardrail that failed rolls back; anything still open holds, and rolls back when the step's time is over. A step
    advances when all hold. A canary step that lacks nothing but traffic when its time is over advances too: in shadow
    the version held for every customer, and more requests are not to be had. In ``champion`` only what closes later is
    judged, and a version that nothing was proved against is kept at the end of its time: ``advance`` there says that
    the release is over.

    Raises
    ------
    ValueError
        If the policy has no such step, or counts are impossible.

    Examples
    --------
    >>> from closedloop.core.release.types import ArmEvidence
    >>> scores = (4000,) + (0,) * 18 + (2000,)
    >>> arm = ArmEvidence(requests=6000, errors=30, customers=3000, latency_p95_ms=8.0, scores=scores)
    >>> decide_step(ReleasePolicy(), StepEvidence("shadow", 2.0, arm, arm, reference_scores=scores)).verdict
    'advance'
    """
    step = policy.find_step(evidence.step)
    _require_counts(evidence)
    guardrails = list_guardrails(policy, step, evidence)
    measured = [item for one in guardrails for item in one.figures.items()]
    figures = {name: value for name, value in measured if math.isfinite(value)}
    by_state = {
        state: [one.sentence for one in guardrails if one.state == state] for state in ("failed", "open", "holds")
    }
    open_ones = [one for one in guardrails if one.state == "open"]
    time = f"{evidence.hours:.1f} h of at most {step.hours_max:g} h in {step.name}"
    if by_state["failed"]:
        return StepDecision("roll_back", tuple(by_state["failed"]), figures)
    if step.name == "champion":
        over = evidence.hours >= step.hours_max
        return StepDecision("advance" if over else "hold", (*by_state["holds"], time), figures)
    if not by_state["open"]:
        return StepDecision("advance", tuple(by_state["holds"]), figures)
    if evidence.hours < step.hours_max:
        return StepDecision("hold", (*by_state["open"], time), figures)
    enough = evidence.challenger.requests >= THIN_REQUESTS_MIN
    if 0 < step.weight < 1 and enough and all(one.lacks_traffic for one in open_ones):
        said = f"only traffic is wanting at the end of its time, and shadow showed the version to be no worse: {time}"
        return StepDecision("advance", (said, *by_state["open"], *by_state["holds"]), figures)
    return StepDecision("roll_back", (f"undecided at the end of its time: {time}", *by_state["open"]), figures)


def _require_counts(evidence: StepEvidence) -> None:
    for name, arm in (("stable", evidence.stable), ("challenger", evidence.challenger)):
        for figure in ("requests", "customers", "errors"):
            if (found := getattr(arm, figure)) < 0:
                raise ValueError(f"{name}: found {found} {figure}, at least 0 is allowed")
