from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from closedloop.core.release.decision import decide_step
from closedloop.core.release.guardrails import count_scores, list_guardrails, measure_score_distance
from closedloop.core.release.policy import ReleasePolicy
from closedloop.core.release.sequential import LOSS_GAP_MAX, sum_paired_losses, sum_paired_profits
from closedloop.core.release.types import ArmEvidence, Remainder, StepDecision, StepEvidence

POLICY = ReleasePolicy()
STEPS = POLICY.list_steps()
BY_OUTCOMES = ReleasePolicy(evidence="outcomes")
SCORES = (600, 400) + (0,) * 16 + (300, 200)
ARM = ArmEvidence(requests=10_000, errors=100, customers=9_900, latency_p95_ms=20.0, scores=SCORES)
LABELS = (0, 0, 0, 1) * 750
BLIND, SHARP = (0.25,) * 3_000, tuple(0.4 if label else 0.2 for label in LABELS)
LEVEL = sum_paired_losses(LABELS, BLIND, BLIND)
BETTER, WORSE = sum_paired_losses(LABELS, BLIND, SHARP), sum_paired_losses(LABELS, SHARP, BLIND)
# An offer to each churner brings 15, one to each stayer costs 5; one model knows who is who, the other offers to all.
GAINS, ALL = np.where(np.array(LABELS) == 1, 15.0, -5.0), np.full(3_000, True)
EVEN = sum_paired_profits(GAINS, ALL, ALL, limit=15.0)
POORER = sum_paired_profits(GAINS, np.array(LABELS) == 1, ALL, limit=15.0)
GOOD = StepEvidence(
    "canary_50", 10.0, ARM, ARM, losses=LEVEL, reference_scores=SCORES, profits=EVEN, profit_unit=15.0 / LOSS_GAP_MAX
)


def decide(policy: ReleasePolicy = POLICY, evidence: StepEvidence = GOOD, **changes: Any) -> StepDecision:
    return decide_step(policy, replace(evidence, **changes))


def with_errors(errors: int, asked: int = 10_000) -> ArmEvidence:
    return replace(ARM, errors=errors, customers=asked - errors)


def with_challenger(**changes: Any) -> StepEvidence:
    return replace(GOOD, challenger=replace(ARM, **changes))


def test_a_good_challenger_goes_through_every_step() -> None:
    for step in STEPS[:-1]:
        ours = round(9_900 * step.weight / (1 - step.weight)) or 9_900
        assert (
            decide(step=step.name, challenger=replace(ARM, customers=ours, errors=ours // 99)).verdict == "advance"
        ), step.name
    assert [POLICY.next_step(step.name) for step in STEPS] == [*STEPS[1:], None]


# Per guardrail: evidence in which exactly it fails.
FAULTS = {
    "split": with_challenger(customers=11_400, errors=114),
    "error ratio": replace(GOOD, challenger=with_errors(300)),
    "error rate": replace(GOOD, challenger=with_errors(700), stable=with_errors(600)),
    "latency": with_challenger(latency_p95_ms=31.0),
    "scores": with_challenger(scores=(100, 400) + (0,) * 16 + (800, 200)),
    "outcomes worse": replace(GOOD, losses=WORSE),
    "profit worse": replace(GOOD, profits=POORER),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_each_guardrail_alone_rolls_back(name: str) -> None:
    found = decide_step(POLICY, FAULTS[name])
    assert found.verdict == "roll_back"
    assert [reason.split(":")[0] for reason in found.reasons] == [name]
    checks = list_guardrails(POLICY, POLICY.find_step("canary_50"), FAULTS[name])
    assert [check.state for check in checks if check.sentence != found.reasons[0]] == ["holds"] * (len(checks) - 1)


def test_the_faults_are_those_of_all_guardrails() -> None:
    checks = list_guardrails(BY_OUTCOMES, POLICY.find_step("canary_50"), GOOD)
    assert {check.sentence.split(":")[0] for check in checks} == {*FAULTS, "sample", "outcomes better"}


# Evidence in which exactly one thing is not known yet.
OPEN = {
    "sample": with_challenger(requests=5_192),
    "error ratio": replace(GOOD, challenger=with_errors(40, 2_500), stable=with_errors(25, 2_500)),
    "latency": with_challenger(latency_p95_ms=None),
    "scores": with_challenger(scores=()),
}


@pytest.mark.parametrize("name", [name for name in OPEN if name != "sample"])
def test_what_is_not_known_yet_holds_and_goes_back_at_the_end_of_its_time(name: str) -> None:
    evidence = OPEN[name]
    assert decide_step(POLICY, evidence).verdict == "hold"
    late = decide_step(POLICY, replace(evidence, hours=POLICY.find_step("canary_50").hours_max))
    assert late.verdict == "roll_back"
    assert "undecided at the end of its time" in late.reasons[0]
    assert {reason.split(":")[0] for reason in late.reasons[1:]} == {name}


def test_a_canary_that_lacks_only_traffic_goes_on_at_the_end_of_its_time() -> None:
    evidence = OPEN["sample"]
    assert decide_step(POLICY, evidence).verdict == "hold"
    end = POLICY.find_step("canary_50").hours_max
    late = decide_step(POLICY, replace(evidence, hours=end))
    assert late.verdict == "advance"
    assert "only traffic is wanting at the end of its time" in late.reasons[0]
    assert [reason.split(":")[0] for reason in late.reasons[1:4]] == ["sample", "latency", "scores"]
    # what failed, or is open for another reason, is no want of traffic
    changes: tuple[dict[str, Any], ...] = (
        {"losses": WORSE},
        {"challenger": replace(evidence.challenger, requests=9)},
        {"challenger": replace(with_errors(40, 2_500), requests=5_192), "stable": with_errors(25, 2_500)},
    )
    for each in changes:
        assert decide_step(POLICY, replace(evidence, hours=end, **each)).verdict == "roll_back"
    # in shadow every customer is scored: who is not seen there was never reached
    assert decide_step(POLICY, replace(evidence, step="shadow", hours=POLICY.hours_max)).verdict == "roll_back"


@pytest.mark.parametrize(
    ("requests_a_day", "steps"),
    [
        (None, ["shadow", "canary_5", "canary_25", "canary_50"]),
        (100_000, ["shadow", "canary_5", "canary_25", "canary_50"]),
        (10_000, ["shadow", "canary_25", "canary_50"]),
        (1_000, ["shadow", "canary_50"]),
        (20, ["shadow", "canary_50"]),
    ],
)
def test_the_steps_suit_the_traffic(requests_a_day: float | None, steps: list[str]) -> None:
    fitted = ReleasePolicy(requests_a_day=requests_a_day)
    assert [step.name for step in fitted.list_steps()] == [*steps, "champion"]
    assert len(fitted.describe_steps()) == len(steps)
    for step in fitted.list_steps()[:-1]:
        full = POLICY.find_step(step.name)
        assert step.requests_min <= full.requests_min
        if requests_a_day is not None:  # what is asked for can come together in time
            assert step.requests_min <= max(requests_a_day * (step.weight or 1) * step.hours_max / 24, 1)


def test_samples_are_not_made_smaller_than_thin_traffic_forces() -> None:
    fitted = ReleasePolicy(requests_a_day=1_000, requests_min=200)
    assert fitted.find_step("canary_50") == ReleasePolicy(requests_min=200).find_step("canary_50")
    assert ReleasePolicy(requests_a_day=1_000).find_step("shadow").requests_min == 4_900
    assert ReleasePolicy(requests_a_day=1_000).find_step("shadow").hours_max == 168


def test_a_reason_names_figure_and_limit() -> None:
    (reason,) = decide_step(POLICY, FAULTS["error ratio"]).reasons
    assert "0.03000 over the stable arm's 0.01000 is 3.00, at most 1.5 is allowed" in reason
    (reason,) = decide_step(POLICY, FAULTS["latency"]).reasons
    assert "p95 is 31.00 ms, the stable arm's 20.00 ms, at most 30.00 ms is allowed" in reason
    (reason,) = decide_step(POLICY, FAULTS["split"]).reasons
    assert "0.5352 of 21,300 customers, 0.5 were to be dealt to it" in reason
    assert "the split is broken" in reason


def test_a_broken_split_is_reported_before_anything_else() -> None:
    evidence = replace(FAULTS["error ratio"], challenger=replace(ARM, errors=300, customers=11_400))
    assert [reason.split(":")[0] for reason in decide_step(POLICY, evidence).reasons] == ["split"]


def test_a_few_errors_do_not_roll_back_where_the_stable_arm_has_none() -> None:
    evidence = replace(GOOD, challenger=with_errors(3), stable=with_errors(0))
    assert decide_step(POLICY, evidence).verdict == "advance"


def test_many_errors_roll_back_where_the_stable_arm_has_none() -> None:
    """Below the ceiling of 5%: a ratio to nothing is no figure, but evidence."""
    found = decide_step(POLICY, replace(GOOD, challenger=with_errors(300), stable=with_errors(0)))
    assert found.verdict == "roll_back"
    assert [reason.partition(":")[0] for reason in found.reasons] == ["error ratio"]


def test_a_small_latency_may_double() -> None:
    evidence = replace(with_challenger(latency_p95_ms=4.0), stable=replace(ARM, latency_p95_ms=1.0))
    assert decide_step(POLICY, evidence).verdict == "advance"


def test_by_outcomes_only_a_proof_promotes() -> None:
    assert decide(BY_OUTCOMES).verdict == "hold"
    assert decide(BY_OUTCOMES, losses=sum_paired_losses(LABELS[:199], BLIND[:199], SHARP[:199])).verdict == "hold"
    assert decide(BY_OUTCOMES, losses=BETTER).verdict == "advance"
    assert decide(BY_OUTCOMES, losses=WORSE).verdict == "roll_back"
    assert decide(BY_OUTCOMES, hours=24 * 45).verdict == "roll_back"
    # The earlier steps do not wait for outcomes.
    early = replace(GOOD, step="canary_25", challenger=replace(ARM, customers=3_300, errors=33))
    assert decide_step(BY_OUTCOMES, early).verdict == "advance"


def test_a_new_champion_is_tested_against_its_predecessor() -> None:
    watched = replace(GOOD, step="champion", stable=ArmEvidence())
    assert decide_step(POLICY, watched).verdict == "hold"
    assert decide_step(POLICY, replace(watched, losses=WORSE)).verdict == "roll_back"
    assert decide_step(POLICY, replace(watched, challenger=with_errors(700))).verdict == "roll_back"
    assert decide_step(POLICY, replace(watched, hours=24 * 60)).verdict == "advance"


def test_nothing_gathered_holds() -> None:
    nothing = StepEvidence("canary_5", 0.0, ArmEvidence(), ArmEvidence())
    assert decide_step(POLICY, nothing).verdict == "hold"


def test_evidence_and_decision_go_into_a_journal() -> None:
    for evidence in (GOOD, StepEvidence("canary_5", 0.0, ArmEvidence(), ArmEvidence())):
        text = json.dumps([dataclasses.asdict(evidence), dataclasses.asdict(decide_step(POLICY, evidence))])
        assert "NaN" not in text
        assert "Infinity" not in text


def test_unknown_steps_and_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed are shadow, canary_5"):
        POLICY.find_step("canary_10")
    with pytest.raises(ValueError, match="challenger: found -1 errors, at least 0 is allowed"):
        decide_step(POLICY, with_challenger(errors=-1))


def test_scores_unlike_the_champions_pass_where_the_evaluation_said_so() -> None:
    turned = SCORES[::-1]
    assert decide(stable=replace(ARM, scores=turned)).verdict == "advance"
    (reason,) = decide(reference_scores=turned).reasons
    assert "scores: 0.333 apart from those that it was evaluated by, at most 0.2 is allowed" in reason
    assert decide(reference_scores=turned).verdict == "roll_back"


def test_scores_that_moved_as_far_as_the_champions_pass() -> None:
    """Customers change between the evaluation, a horizon ago, and the release: no version scores as it did then."""
    turned, moved = replace(ARM, scores=SCORES[::-1]), tuple(reversed(SCORES))
    assert decide(challenger=turned).verdict == "roll_back"
    assert decide(challenger=turned, stable=turned, predecessor_scores=SCORES).verdict == "advance"
    assert decide(challenger=turned, predecessor_scores=SCORES).verdict == "roll_back"  # the champion's did not move
    assert decide(challenger=turned, predecessor_scores=moved, stable=turned).verdict == "roll_back"


@pytest.mark.parametrize("customers", [5, 200])
def test_scores_that_chance_may_have_moved_hold(customers: int) -> None:
    few = replace(ARM, customers=customers, errors=0)
    evidence = replace(GOOD, stable=few, challenger=few, reference_scores=SCORES[::-1])
    found = decide_step(POLICY, evidence)
    assert found.verdict == "hold"
    assert [reason.split(":")[0] for reason in found.reasons[:-1]] == ["scores"]


def test_without_reference_scores_nothing_advances() -> None:
    assert decide(reference_scores=()).verdict == "hold"


def test_scores_are_counted_as_the_store_counts_them() -> None:
    found = count_scores([0.0, 0.049, 0.05, 0.5, 0.949, 0.95, 1.0])
    assert found == (2, 1, *[0] * 8, 1, *[0] * 7, 1, 2)


def test_score_distance_by_hand() -> None:
    assert measure_score_distance((1, 1, 2), (2, 1, 1)) == 0.25
    assert measure_score_distance((1, 2), (2, 4)) == 0


@given(st.floats(0, 2000), st.integers(0, 10_000), st.sampled_from([step.name for step in STEPS]))
def test_a_worse_challenger_never_advances_by_time(hours: float, errors: int, step: str) -> None:
    """More errors never turn a roll back into an advance, and time never turns a hold into one."""
    evidence = replace(with_challenger(errors=errors), step=step, hours=hours)
    later = replace(evidence, hours=hours + 100)
    if step != "champion" and decide_step(POLICY, evidence).verdict == "hold":
        assert decide_step(POLICY, later).verdict in ("hold", "roll_back")
    if errors < 10_000 and decide_step(POLICY, evidence).verdict == "roll_back":
        assert decide_step(POLICY, replace(evidence, challenger=replace(ARM, errors=errors + 1))).verdict != "advance"


# Per guardrail that a client's part could move: evidence that fails with that client's part.
BY_ONE_CLIENT = {name: FAULTS[name] for name in ("latency", "scores", "outcomes worse")}


@pytest.mark.parametrize("name", list(BY_ONE_CLIENT))
def test_what_fails_with_the_part_of_one_client_alone_is_no_failure(name: str) -> None:
    without = Remainder("0badc0de", GOOD.stable, GOOD.challenger, GOOD.losses)
    found = decide_step(POLICY, replace(BY_ONE_CLIENT[name], without=(without,)))
    assert found.verdict == "advance"
    (reason,) = [reason for reason in found.reasons if reason.startswith(name)]
    assert reason.endswith("(without client 0badc0de, which is less than half)")


@pytest.mark.parametrize("name", list(BY_ONE_CLIENT))
def test_one_client_cannot_hide_what_fails_for_the_others(name: str) -> None:
    fault = BY_ONE_CLIENT[name]
    without = Remainder("0badc0de", fault.stable, fault.challenger, fault.losses)
    assert decide_step(POLICY, replace(GOOD, without=(without,))).verdict == "roll_back"


@pytest.mark.parametrize("name", list(BY_ONE_CLIENT))
def test_what_fails_without_any_one_client_too_is_a_failure(name: str) -> None:
    fault = BY_ONE_CLIENT[name]
    parts = tuple(Remainder(client, fault.stable, fault.challenger, fault.losses) for client in ("a", "b"))
    assert decide_step(POLICY, replace(fault, without=parts)).verdict == "roll_back"


def test_a_proof_that_rests_on_one_clients_outcomes_promotes_nothing() -> None:
    proved = replace(GOOD, losses=BETTER)
    assert decide_step(BY_OUTCOMES, proved).verdict == "advance"
    without = Remainder("0badc0de", GOOD.stable, GOOD.challenger, LEVEL)
    found = decide_step(BY_OUTCOMES, replace(proved, without=(without,)))
    assert found.verdict == "hold"
    assert "(without client 0badc0de, which is less than half)" in found.reasons[0]
    # nor do one client's outcomes keep what the others prove from being a proof
    without = Remainder("0badc0de", GOOD.stable, GOOD.challenger, BETTER)
    assert decide_step(BY_OUTCOMES, replace(GOOD, losses=LEVEL, without=(without,))).verdict == "advance"
