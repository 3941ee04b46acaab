"""The guardrails of a release: each a check of recorded evidence, one sentence with figure and limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from closedloop.core.release.policy import ReleasePolicy, Step
from closedloop.core.release.sequential import (
    PairedLosses,
    bound_distribution,
    bound_mean,
    weigh_losses,
    weigh_share,
    weigh_split,
)
from closedloop.core.release.types import StepEvidence
from closedloop.errors import count_noun

SCORE_BINS = 20
# Samples at which the sequential tests are at their most sensitive; they hold at any other too.
SPLIT_PLANNED, ERRORS_PLANNED, CUSTOMERS_PLANNED = 20_000, 200, 1_000


@dataclass(frozen=True)
class Guardrail:
    """One guardrail's answer; ``open``: neither held nor failed yet (``lacks_traffic``: for want of requests)."""

    state: Literal["holds", "open", "failed"]
    sentence: str
    figures: dict[str, float]
    lacks_traffic: bool = False


def list_guardrails(policy: ReleasePolicy, step: Step, evidence: StepEvidence) -> list[Guardrail]:
    """The guardrails of a step; where the split is broken, that alone."""
    split = _check_split(policy, step, evidence)
    if split.state == "failed":
        return [split]
    after = [_check_error_rate(policy, evidence), _confirm(partial(_check_not_worse, policy), evidence)]
    if evidence.profit_unit:
        after.append(_confirm(partial(_check_profit, policy), evidence))
    if step.name == "champion":
        return after
    found = [
        split,
        _check_sample(step, evidence),
        _check_error_ratio(policy, evidence),
        _confirm(partial(_check_latency, policy, step), evidence),
        _confirm(partial(_check_scores, policy, step), evidence),
        *after,
    ]
    following = policy.next_step(step.name)
    if policy.evidence == "outcomes" and following is not None and following.name == "champion":
        found.append(_confirm(partial(_check_better, policy), evidence, proof="holds"))
    return found


def count_scores(scores: npt.ArrayLike) -> tuple[int, ...]:
    """How many scores, shape (n,), lie in each of `SCORE_BINS` equal bins of [0, 1]; an edge belongs to the bin above.

    Examples
    --------
    >>> count_scores([0.0, 0.05, 1.0])[:3]
    (1, 1, 0)
    """
    edges = np.arange(1, SCORE_BINS) / SCORE_BINS
    found = np.bincount(np.searchsorted(edges, np.asarray(scores), side="right"), minlength=SCORE_BINS)
    return tuple(int(count) for count in found)


def measure_score_distance(left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Largest distance of two cumulative distributions given as counts in the same bins; nan if one is empty.

    Examples
    --------
    >>> measure_score_distance((5, 5, 0), (0, 5, 5))
    0.5
    """
    if not sum(left) or not sum(right) or len(left) != len(right):
        return math.nan
    gap, largest = 0.0, 0.0
    for a, b in zip(left, right, strict=True):
        gap += a / sum(left) - b / sum(right)
        largest = max(largest, abs(gap))
    return largest


def _confirm(
    judge: Callable[[StepEvidence], Guardrail], evidence: StepEvidence, proof: Literal["failed", "holds"] = "failed"
) -> Guardrail:
    """The guardrail's answer; where clients can be told apart, that without any one of them that is a minority.

    A ``proof`` must be one whoever is left out, and what one client adds cannot hide it either.
    """
    found = judge(evidence)
    answers = [judge(remainder) for remainder in evidence.list_remainders()]
    if not answers:
        return found
    place = next((place for place, answer in enumerate(answers) if answer.state != proof), 0)
    if answers[place].state == found.state:
        return found
    said = f" (without client {evidence.without[place].client}, which is less than half)"
    return replace(answers[place], sentence=answers[place].sentence + said)


def _check_split(policy: ReleasePolicy, step: Step, evidence: StepEvidence) -> Guardrail:
    if not 0 < step.weight < 1:
        return Guardrail("holds", f"split: nothing is split in {step.name}", {})
    ours, total = evidence.challenger.customers, evidence.challenger.customers + evidence.stable.customers
    weighed = weigh_split(ours, total, step.weight, planned=SPLIT_PLANNED, alpha=policy.split_alpha)
    share = ours / total if total else math.nan
    limit = math.log(1 / policy.split_alpha)
    broken = weighed >= limit
    sentence = (
        f"split: the challenger has {share:.4f} of {count_noun(total, 'customer')}, {step.weight:g} were to be dealt"
    )
    sentence += f" to it ({_weigh(weighed, policy.split_alpha)})"
    sentence += "; the split is broken, and nothing measured across it counts" if broken else ""
    return Guardrail("failed" if broken else "holds", sentence, {"split_share": share, "split_evidence": weighed})


def _check_sample(step: Step, evidence: StepEvidence) -> Guardrail:
    found = evidence.challenger.requests
    sentence = f"sample: {found:,} of the challenger's requests, one a customer and day, at least "
    sentence += f"{step.requests_min:,} are needed"
    enough = found >= step.requests_min
    return Guardrail("holds" if enough else "open", sentence, {"requests": found}, lacks_traffic=not enough)


def _check_error_ratio(policy: ReleasePolicy, evidence: StepEvidence) -> Guardrail:
    stable, challenger = evidence.stable, evidence.challenger
    if not stable.errors + challenger.errors or not stable.asked or not challenger.asked:
        return Guardrail("holds", "error ratio: no errors to compare, the ceiling judges", {})
    rates = challenger.errors / challenger.asked, stable.errors / stable.asked
    ratio = rates[0] / rates[1] if stable.errors else math.inf
    # Equal rates: a customer with an error is as often the challenger's as any customer is.
    weighed = weigh_share(
        challenger.errors,
        challenger.errors + stable.errors,
        challenger.asked / (challenger.asked + stable.asked),
        planned=ERRORS_PLANNED,
        alpha=policy.guard_alpha,
        greater=True,
    )
    proved = weighed >= math.log(1 / policy.guard_alpha)
    state: Literal["holds", "open", "failed"] = "holds"
    if ratio > policy.error_ratio_max:
        # a few of them say nothing where the stable arm has none
        state = "failed" if proved else "open" if stable.errors else "holds"
    sentence = f"error ratio: {rates[0]:.5f} over the stable arm's {rates[1]:.5f} is {ratio:.2f}, at most "
    sentence += f"{policy.error_ratio_max:g} is allowed ({_weigh(weighed, policy.guard_alpha)} that it is worse at all)"
    figures = {"error_ratio": ratio} if stable.errors else {}
    return Guardrail(state, sentence, {**figures, "error_ratio_evidence": weighed})


def _check_error_rate(policy: ReleasePolicy, evidence: StepEvidence) -> Guardrail:
    errors, asked = evidence.challenger.errors, evidence.challenger.asked
    rate = errors / asked if asked else 0.0
    weighed = weigh_share(
        errors,
        asked,
        policy.error_rate_max,
        planned=CUSTOMERS_PLANNED,
        alpha=policy.guard_alpha,
        greater=True,
    )
    state: Literal["holds", "open", "failed"] = "holds"
    if rate > policy.error_rate_max:
        state = "failed" if weighed >= math.log(1 / policy.guard_alpha) else "open"
    sentence = f"error rate: {rate:.5f} of the challenger's customers, at most {policy.error_rate_max:g} is allowed"
    return Guardrail(state, f"{sentence} ({_weigh(weighed, policy.guard_alpha)})", {"error_rate": rate})


def _check_latency(policy: ReleasePolicy, step: Step, evidence: StepEvidence) -> Guardrail:
    stable, challenger = (
        math.nan if arm.latency_p95_ms is None else arm.latency_p95_ms for arm in (evidence.stable, evidence.challenger)
    )
    limit = max(stable * policy.latency_ratio_max, stable + policy.latency_slack_ms)
    sentence = (
        f"latency: p95 is {challenger:.2f} ms, the stable arm's {stable:.2f} ms, at most {limit:.2f} ms is allowed"
    )
    return _judge_sampled(step, evidence, challenger, limit, sentence, {"latency_p95_ms": challenger})


def _check_scores(policy: ReleasePolicy, step: Step, evidence: StepEvidence) -> Guardrail:
    arm, own = evidence.challenger, evidence.reference_scores
    distance = measure_score_distance(own, arm.scores)
    # customers who changed move the scores of every version: the stable one's show how far
    moved = measure_score_distance(evidence.predecessor_scores, evidence.stable.scores)
    limit = policy.score_distance_max if math.isnan(moved) else max(policy.score_distance_max, moved)
    # half of the level for each of the two samples
    counts = sum(own), arm.customers
    chance = sum(bound_distribution(rows, alpha=policy.guard_alpha / 2) for rows in counts)
    sentence = f"scores: {distance:.3f} apart from those that it was evaluated by, at most {limit:.3g} is allowed"
    sentence += f" (chance explains {min(chance, 1.0):.3f})"
    found = _judge_sampled(step, evidence, distance, limit, sentence, {"score_distance": distance})
    unproved = found.state == "failed" and distance - chance <= limit
    return replace(found, state="open") if unproved else found


def _judge_sampled(
    step: Step, evidence: StepEvidence, figure: float, limit: float, sentence: str, figures: dict[str, float]
) -> Guardrail:
    """A figure without a test of its own is judged once the step's least sample is there; nan is never judged."""
    too_few = evidence.challenger.requests < step.requests_min
    if too_few or math.isnan(figure) or math.isnan(limit):
        return Guardrail("open", f"{sentence}; not judged yet", figures, lacks_traffic=too_few)
    return Guardrail("holds" if figure <= limit else "failed", sentence, figures)


def _check_not_worse(policy: ReleasePolicy, evidence: StepEvidence) -> Guardrail:
    return _judge_losses(policy, evidence.losses, better=False, alpha=policy.guard_alpha)


def _check_better(policy: ReleasePolicy, evidence: StepEvidence) -> Guardrail:
    return _judge_losses(policy, evidence.losses, better=True, alpha=policy.alpha)


def _judge_losses(policy: ReleasePolicy, losses: PairedLosses, *, better: bool, alpha: float) -> Guardrail:
    word = "better" if better else "worse"
    found = f"outcomes {word}: {count_noun(losses.customers, 'customer')} with closed outcomes"
    if losses.customers < policy.outcomes_min:
        state: Literal["holds", "open", "failed"] = "open" if better else "holds"
        return Guardrail(state, f"{found}, from {policy.outcomes_min:,} on they are judged", {})
    planned, deviation = policy.outcomes_planned, policy.outcomes_deviation
    weighed = weigh_losses(losses, better=better, planned=planned, deviation=deviation, alpha=alpha)
    low, high = bound_mean(losses, planned=planned, alpha=alpha)
    proved = weighed >= math.log(1 / alpha)
    sentence = f"{found}, log loss changes by {losses.mean:+.5f}, {low:+.5f} to {high:+.5f} ({_weigh(weighed, alpha)})"
    figures = {f"outcomes_{word}_evidence": weighed, "log_loss_difference": losses.mean}
    if better:
        return Guardrail("holds" if proved else "open", f"{sentence}; it must be proved better", figures)
    return Guardrail("failed" if proved else "holds", f"{sentence}; it must not be proved worse", figures)


def _check_profit(policy: ReleasePolicy, evidence: StepEvidence) -> Guardrail:
    """The profit of offers must not be proved lower; that it is higher is shown, and decides nothing."""
    profits, unit, plan = evidence.profits, evidence.profit_unit, (policy.outcomes_planned, policy.outcomes_deviation)
    found = f"profit worse: {count_noun(profits.customers, 'customer')} with closed outcomes"
    if profits.customers < policy.outcomes_min:
        return Guardrail("holds", f"{found}, from {policy.outcomes_min:,} on they are judged", {})
    worse, better = (
        weigh_losses(profits, better=is_better, planned=plan[0], deviation=plan[1], alpha=alpha)
        for is_better, alpha in ((False, policy.guard_alpha), (True, policy.alpha))
    )
    low, high = bound_mean(profits, planned=plan[0], alpha=policy.guard_alpha)
    sentence = f"{found}, profit changes by {-profits.mean * unit:+.4g} a customer, {-high * unit:+.4g} to "
    sentence += f"{-low * unit:+.4g} ({_weigh(worse, policy.guard_alpha)}; that it is more: "
    sentence += f"{_weigh(better, policy.alpha)}); it must not be proved worse"
    figures = {"profit_worse_evidence": worse, "profit_better_evidence": better}
    figures["profit_difference"] = -profits.mean * unit
    return Guardrail("failed" if worse >= math.log(1 / policy.guard_alpha) else "holds", sentence, figures)


def _weigh(weighed: float, alpha: float) -> str:
    return f"e-value {math.exp(min(weighed, 30.0)):.3g} of {1 / alpha:g}"
