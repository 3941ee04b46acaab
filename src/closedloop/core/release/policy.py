"""The rules of a release: its steps, the level of each test, and the limits of each guardrail."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

CanaryName = Literal["canary_5", "canary_25", "canary_50"]
StepName = Literal["shadow", "canary_5", "canary_25", "canary_50", "champion"]


class Step(NamedTuple):
    """One step: the challenger's share of the traffic, its least sample, and how long it may last."""

    name: StepName
    weight: float
    requests_min: int
    hours_max: float


# Share of the traffic, and the sample that finds twice the errors of a stable arm with 1%
# (`closedloop.core.release.experiments.plan_samples`).
WEIGHTS: dict[StepName, float] = {"shadow": 0.0, "canary_5": 0.05, "canary_25": 0.25, "canary_50": 0.5, "champion": 1.0}
SAMPLES: dict[StepName, int] = {"shadow": 5_193, "canary_5": 3_543, "canary_25": 4_032, "canary_50": 5_193}
# What a step may last where traffic is thin, and the share of the requests of that time that its sample is at most.
STRETCH_HOURS, STRETCH_SHARE = 24.0 * 7, 0.7


class ReleasePolicy(BaseModel):
    """The rules of a release; the settings section ``release`` embeds it.

    Attributes
    ----------
    steps
        Those between shadow and champion, in order. In ``shadow`` both models score every request and the stable one
        answers; in ``champion`` the challenger answers everything, and closed outcomes go on testing it against its
        predecessor.
    requests_min
        The challenger's least sample in each step; None: `SAMPLES`.
    requests_a_day
        Requests that the service answers in a day, one a customer; None: each release measures them as it starts. Where
        they are too few for a step's sample, a release has fewer steps, longer ones, or smaller samples (`list_steps`).
    hours_max, last_hours_max, guard_hours_max
        How long a step, the last canary step, and the watch over a new champion may last.
    evidence
        What promotes: ``offline``, the gate's win without which no release begins, and the steps only guard;
        ``outcomes``, in addition a sequential test of the paired log-loss difference before ``champion``.
    alpha
        One-sided level of that test.
    outcomes_planned, outcomes_deviation
        The design's maximum sample, customers (`sequential.size_paired`), and the standard deviation
        of the paired differences, nats, that it was computed with.
    outcomes_min
        Fewer customers are not judged: the first outcomes to close may be unlike the rest.
    guard_alpha
        Level of each guardrail's sequential test: errors, ceiling, outcomes that got worse.
    split_alpha
        Level of the sequential sample-ratio test.
    error_ratio_max
        The challenger's error rate over the stable arm's.
    error_rate_max
        Absolute ceiling, which also judges where the stable arm has no errors.
    latency_ratio_max, latency_slack_ms
        The challenger's p95 is at most the stable arm's times the ratio, or the slack above it, whichever is more.
    score_distance_max
        Largest distance of the challenger's scores from those that it was evaluated by (Kolmogorov and Smirnov's),
        0 to 1. Against the champion's they may differ: after a change the right scores are others. Where the stable
        arm's stand further from its own, that is allowed: its customers changed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    steps: tuple[CanaryName, ...] = ("canary_5", "canary_25", "canary_50")
    requests_min: int | None = Field(default=None, ge=1)
    requests_a_day: float | None = Field(default=None, gt=0)
    hours_max: float = Field(default=72, gt=0)
    last_hours_max: float = Field(default=24 * 45, gt=0)
    guard_hours_max: float = Field(default=24 * 60, gt=0)
    evidence: Literal["offline", "outcomes"] = "offline"
    alpha: float = Field(default=0.05, gt=0, lt=1)
    outcomes_planned: int = Field(default=5_000, ge=1)
    outcomes_deviation: float = Field(default=0.3, gt=0)
    outcomes_min: int = Field(default=200, ge=1)
    guard_alpha: float = Field(default=0.01, gt=0, lt=1)
    split_alpha: float = Field(default=0.001, gt=0, lt=1)
    error_ratio_max: float = Field(default=1.5, ge=1)
    error_rate_max: float = Field(default=0.05, gt=0, lt=1)
    latency_ratio_max: float = Field(default=1.5, ge=1)
    latency_slack_ms: float = Field(default=5.0, ge=0)
    score_distance_max: float = Field(default=0.2, ge=0, le=1)

    def list_steps(self) -> list[Step]:
        """All steps from shadow to champion, in order, as the traffic allows.

        A canary step whose sample would not come together in ``hours_max`` is left out, but for the last one. The steps
        that are left last up to `STRETCH_HOURS`, and need no larger sample than most of what comes in that time.
        """
        names = [name for name in WEIGHTS if name in ("shadow", "champion", *self.steps)]
        hours = [self.hours_max] * (len(names) - 2) + [self.last_hours_max, self.guard_hours_max]
        samples = {name: self.requests_min or SAMPLES[name] for name in SAMPLES}
        steps = [Step(name, WEIGHTS[name], samples.get(name, 0), most) for name, most in zip(names, hours, strict=True)]
        if self.requests_a_day is None:
            return steps
        short = [step for step in steps[1:-2] if self._expect(step, self.hours_max) < step.requests_min]
        return [self._fit(step) for step in steps if step not in short]

    def _expect(self, step: Step, hours: float) -> float:
        """The challenger's requests in so many hours; in shadow it scores every request."""
        return (self.requests_a_day or 0.0) * (step.weight or 1.0) * hours / 24

    def _fit(self, step: Step) -> Step:
        if step.name == "champion" or self._expect(step, self.hours_max) >= step.requests_min:
            return step
        hours = max(step.hours_max, STRETCH_HOURS)
        most = max(round(STRETCH_SHARE * self._expect(step, STRETCH_HOURS)), 1)
        return step._replace(requests_min=min(step.requests_min, most), hours_max=hours)

    def describe_steps(self) -> list[str]:
        """The demands of each step before ``champion``, a line each, for people."""
        return [
            f"{step.name}: {step.requests_min:,} of the challenger's requests, in at most {step.hours_max:g} h"
            for step in self.list_steps()[:-1]
        ]

    def find_step(self, name: str) -> Step:
        """The step of that name.

        Raises
        ------
        ValueError
            If there is none.
        """
        for step in self.list_steps():
            if step.name == name:
                return step
        raise ValueError(f"step: found {name!r}, allowed are {', '.join(step.name for step in self.list_steps())}")

    def next_step(self, name: str) -> Step | None:
        """The step after it; None after the last."""
        steps = self.list_steps()
        place = steps.index(self.find_step(name)) + 1
        return steps[place] if place < len(steps) else None
