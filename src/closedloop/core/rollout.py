"""How a release moves: one pure function decides a step on recorded evidence - advance, hold or roll back.

The controller gathers `StepEvidence`, calls `decide_step`, applies the verdict and journals all three. Every sequential
test in it may be looked at as often as one likes (`closedloop.core.sequential`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from closedloop.core.guardrails import list_checks
from closedloop.core.sequential import PairedLosses

Verdict = Literal["advance", "hold", "roll_back"]
StepName = Literal["shadow", "canary_5", "canary_25", "canary_50", "champion"]
Unit = Literal["customer", "request"]


@dataclass(frozen=True)
class Step:
    """One step: the challenger's share of the traffic, its least sample, and how long it may last."""

    name: StepName
    weight: float
    requests_min: int
    hours_max: float


# Samples that find twice the errors of a stable arm with 1% (`closedloop.core.experiments.plan_policy`).
STEPS = (
    Step("shadow", 0.0, 5_193, 72),
    Step("canary_5", 0.05, 3_543, 72),
    Step("canary_25", 0.25, 4_032, 72),
    Step("canary_50", 0.5, 5_193, 24 * 45),
    Step("champion", 1.0, 0, 24 * 60),
)


@dataclass(frozen=True)
class RolloutPolicy:
    """What a release has to show.

    Attributes
    ----------
    steps
        In order. In ``shadow`` both models score every request and the stable one answers; in ``champion`` the
        challenger answers everything, and closed outcomes go on testing it against its predecessor.
        ``requests_min`` counts the challenger's (`closedloop.core.experiments.plan_policy`).
    evidence
        What promotes: ``offline``, the gate's win without which no release begins, and the steps only guard;
        ``outcomes``, in addition a sequential test of the paired log-loss difference before ``champion``.
    alpha, power
        One-sided level of that test, and the power that ``outcomes_planned`` was computed for.
    outcomes_planned, outcomes_deviation
        The design's maximum sample, customers (`closedloop.core.sequential.size_paired`), and the standard deviation
        of the paired differences, nats, that it was computed with.
    outcomes_min
        Fewer customers are not judged: the first outcomes to close may be unlike the rest.
    guard_alpha
        Level of each guardrail's sequential test: errors, ceiling, outcomes that got worse.
    error_ratio_max
        The challenger's error rate over the stable arm's.
    error_rate_max
        Absolute ceiling, which also judges where the stable arm has no errors.
    latency_ratio_max, latency_slack_ms
        The challenger's p95 is at most the stable arm's times the ratio, or the slack above it, whichever is more.
    split_alpha
        Level of the sequential sample-ratio test.
    score_distance_max
        Largest distance of the challenger's scores from those that it was evaluated by (Kolmogorov and Smirnov's),
        0 to 1. Against the champion's they may differ: after a change the right scores are others.
    """

    steps: tuple[Step, ...] = STEPS
    evidence: Literal["offline", "outcomes"] = "offline"
    alpha: float = 0.05
    power: float = 0.8
    outcomes_planned: int = 5_000
    outcomes_deviation: float = 0.3
    outcomes_min: int = 200
    guard_alpha: float = 0.01
    error_ratio_max: float = 1.5
    error_rate_max: float = 0.05
    latency_ratio_max: float = 1.5
    latency_slack_ms: float = 5.0
    split_alpha: float = 0.001
    score_distance_max: float = 0.2

    def find_step(self, name: str) -> Step:
        """The step of that name.

        Raises
        ------
        ValueError
            If there is none.
        """
        for step in self.steps:
            if step.name == name:
                return step
        raise ValueError(f"step: found {name!r}, allowed are {', '.join(step.name for step in self.steps)}")

    def next_step(self, name: str) -> Step | None:
        """The step after it; None after the last."""
        place = self.steps.index(self.find_step(name)) + 1
        return self.steps[place] if place < len(self.steps) else None


@dataclass(frozen=True)
class ArmEvidence:
    """What one model did since the step began.

    ``scores`` is as `count_scores` gives it; ``latency_p95_ms`` is None if it was not measured.
    In shadow the challenger's requests and errors are those of its shadow scoring.
    """

    requests: int = 0
    errors: int = 0
    customers: int = 0
    latency_p95_ms: float | None = None
    scores: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepEvidence:
    """All that a decision is made of, as the journal keeps it (`dataclasses.asdict`).

    ``hours`` since the step began. ``losses`` since the release began: paired differences, challenger minus stable, on
    customers with closed outcomes that both models scored (in ``champion``: minus its predecessor). ``unit`` is what
    the split deals out: customers, or requests where a proxy splits. ``reference_scores`` are counts, as in
    `ArmEvidence`, of the challenger's reference rows.
    """

    step: StepName
    hours: float
    stable: ArmEvidence
    challenger: ArmEvidence
    losses: PairedLosses = field(default_factory=PairedLosses)
    unit: Unit = "customer"
    reference_scores: tuple[int, ...] = ()


@dataclass(frozen=True)
class Decision:
    """The verdict; its reasons, each a sentence with figure and limit; and every figure by name that is one."""

    verdict: Verdict
    reasons: tuple[str, ...]
    figures: dict[str, float]


def decide_step(policy: RolloutPolicy, evidence: StepEvidence) -> Decision:
    """Decide a step of a rollout.

    A broken split is reported before anything else, since nothing measured across it means what it says. Then any
    guardrail that failed rolls back; anything still open holds, and rolls back when the step's time is over. A step
    advances when all hold. In ``champion`` only what closes later is judged, and a version that nothing was proved
    against is kept at the end of its time: ``advance`` there says that the release is over.

    Raises
    ------
    ValueError
        If the policy has no such step, or counts are impossible.

    Examples
    --------
    >>> scores = (4000,) + (0,) * 18 + (2000,)
    >>> arm = ArmEvidence(requests=6000, errors=60, customers=3000, latency_p95_ms=8.0, scores=scores)
    >>> decide_step(RolloutPolicy(), StepEvidence("shadow", 2.0, arm, arm, reference_scores=scores)).verdict
    'advance'
    """
    step = policy.find_step(evidence.step)
    _require_counts(evidence)
    checks = list_checks(policy, step, evidence)
    measured = [item for check in checks for item in check.figures.items()]
    figures = {name: value for name, value in measured if math.isfinite(value)}
    by_state = {state: [c.sentence for c in checks if c.state == state] for state in ("failed", "open", "holds")}
    time = f"{evidence.hours:.1f} of at most {step.hours_max:g} hours in {step.name}"
    if by_state["failed"]:
        return Decision("roll_back", tuple(by_state["failed"]), figures)
    if step.name == "champion":
        over = evidence.hours >= step.hours_max
        return Decision("advance" if over else "hold", (*by_state["holds"], time), figures)
    if not by_state["open"]:
        return Decision("advance", tuple(by_state["holds"]), figures)
    if evidence.hours < step.hours_max:
        return Decision("hold", (*by_state["open"], time), figures)
    return Decision("roll_back", (f"undecided at the end of its time: {time}", *by_state["open"]), figures)


def _require_counts(evidence: StepEvidence) -> None:
    for name, arm in (("stable", evidence.stable), ("challenger", evidence.challenger)):
        if not 0 <= arm.errors <= arm.requests or arm.customers < 0:
            raise ValueError(f"{name}: found {arm.errors} errors of {arm.requests} requests, allowed are 0 to requests")
