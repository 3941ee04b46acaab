"""The evidence of a release, and the decision on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from closedloop.core.release.policy import StepName
from closedloop.core.release.sequential import PairedLosses


@dataclass(frozen=True)
class ArmEvidence:
    """The record of one model since the step began, so counted that no client can multiply its own part.

    ``customers`` are different ones that were answered, each judged by its first request of the step: its latency, its
    score. ``errors`` are customers with a request that failed. ``requests`` are one a customer and day. ``scores`` is
    as `count_scores` gives it; ``latency_p95_ms`` is None if it was not measured.
    In shadow the challenger's figures are those of its shadow scoring.
    """

    requests: int = 0
    errors: int = 0
    customers: int = 0
    latency_p95_ms: float | None = None
    scores: tuple[int, ...] = ()

    @property
    def asked(self) -> int:
        """Customers that were answered, and those that were not."""
        return self.customers + self.errors


@dataclass(frozen=True)
class Remainder:
    """The evidence without one client: its requests, its reported outcomes, or both, where they are the minority."""

    client: str
    stable: ArmEvidence
    challenger: ArmEvidence
    losses: PairedLosses
    profits: PairedLosses = field(default_factory=PairedLosses)


@dataclass(frozen=True)
class StepEvidence:
    """All that a decision is made of, as the journal keeps it (`dataclasses.asdict`).

    ``hours`` since the step began. ``losses`` since the release began: paired differences, challenger minus stable, on
    customers with closed outcomes that both models scored (in ``champion``: minus its predecessor).
    ``profits`` are those of the same customers' offers, as losses (`sum_paired_profits`), where one nat stands for
    ``profit_unit`` of money; 0: the data set has no value. ``reference_scores`` are counts, as in `ArmEvidence`, of the
    challenger's reference rows, ``predecessor_scores`` those of the stable version's. ``without``: the same without
    each client that has less than half of it.
    """

    step: StepName
    hours: float
    stable: ArmEvidence
    challenger: ArmEvidence
    losses: PairedLosses = field(default_factory=PairedLosses)
    reference_scores: tuple[int, ...] = ()
    without: tuple[Remainder, ...] = ()
    profits: PairedLosses = field(default_factory=PairedLosses)
    profit_unit: float = 0.0
    predecessor_scores: tuple[int, ...] = ()

    def list_remainders(self) -> list[StepEvidence]:
        """The same evidence without each of those clients."""
        return [
            replace(
                self,
                stable=one.stable,
                challenger=one.challenger,
                losses=one.losses,
                profits=one.profits,
                without=(),
            )
            for one in self.without
        ]


@dataclass(frozen=True)
class StepDecision:
    """The verdict; its reasons, each a sentence with figure and limit; and every figure by name that is one."""

    verdict: Literal["advance", "hold", "roll_back"]
    reasons: tuple[str, ...]
    figures: dict[str, float]
