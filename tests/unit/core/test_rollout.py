from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from closedloop.core.guardrails import count_scores, list_checks, measure_score_distance
from closedloop.core.rollout import STEPS, ArmEvidence, Decision, RolloutPolicy, StepEvidence, decide_step
from closedloop.core.sequential import sum_paired_losses

POLICY = RolloutPolicy()
BY_OUTCOMES = replace(POLICY, evidence="outcomes")
SCORES = (600, 400) + (0,) * 16 + (300, 200)
ARM = ArmEvidence(requests=10_000, errors=100, customers=4_000, latency_p95_ms=20.0, scores=SCORES)
LABELS = (0, 0, 0, 1) * 750
BLIND, SHARP = (0.25,) * 3_000, tuple(0.4 if label else 0.2 for label in LABELS)
LEVEL = sum_paired_losses(LABELS, BLIND, BLIND)
BETTER, WORSE = sum_paired_losses(LABELS, BLIND, SHARP), sum_paired_losses(LABELS, SHARP, BLIND)
GOOD = StepEvidence("canary_50", 10.0, ARM, ARM, losses=LEVEL, reference_scores=SCORES)


def decide(policy: RolloutPolicy = POLICY, evidence: StepEvidence = GOOD, **changes: Any) -> Decision:
    return decide_step(policy, replace(evidence, **changes))


def with_challenger(**changes: Any) -> StepEvidence:
    return replace(GOOD, challenger=replace(ARM, **changes))


def test_a_good_challenger_goes_through_every_step() -> None:
    for step in STEPS[:-1]:
        ours = round(4_000 * step.weight / (1 - step.weight)) or 4_000
        assert decide(step=step.name, challenger=replace(ARM, customers=ours)).verdict == "advance", step.name
    assert [POLICY.next_step(step.name) for step in STEPS] == [*STEPS[1:], None]


# Per guardrail: evidence in which exactly it fails.
FAULTS = {
    "split": with_challenger(customers=4_600),
    "error ratio": with_challenger(errors=300),
    "error rate": replace(with_challenger(errors=700), stable=replace(ARM, errors=600)),
    "latency": with_challenger(latency_p95_ms=31.0),
    "scores": with_challenger(scores=(100, 400) + (0,) * 16 + (800, 200)),
    "outcomes worse": replace(GOOD, losses=WORSE),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_each_guardrail_alone_rolls_back(name: str) -> None:
    found = decide_step(POLICY, FAULTS[name])
    assert found.verdict == "roll_back"
    assert [reason.split(":")[0] for reason in found.reasons] == [name]
    checks = list_checks(POLICY, POLICY.find_step("canary_50"), FAULTS[name])
    assert [check.state for check in checks if check.sentence != found.reasons[0]] == ["holds"] * (len(checks) - 1)


def test_the_faults_are_those_of_all_guardrails() -> None:
    checks = list_checks(BY_OUTCOMES, POLICY.find_step("canary_50"), GOOD)
    assert {check.sentence.split(":")[0] for check in checks} == {*FAULTS, "sample", "outcomes better"}


# Evidence in which exactly one thing is not known yet.
OPEN = {
    "sample": with_challenger(requests=5_192, errors=52),
    "error ratio": with_challenger(requests=5_200, errors=83),
    "latency": with_challenger(latency_p95_ms=None),
    "scores": with_challenger(scores=()),
}
# Without a sample, what has no test of its own is not judged either.
OPEN_BESIDE = {"sample": {"sample", "latency", "scores"}}


@pytest.mark.parametrize("name", list(OPEN))
def test_what_is_not_known_yet_holds_and_goes_back_at_the_end_of_its_time(name: str) -> None:
    evidence = OPEN[name]
    assert decide_step(POLICY, evidence).verdict == "hold"
    late = decide_step(POLICY, replace(evidence, hours=POLICY.find_step("canary_50").hours_max))
    assert late.verdict == "roll_back"
    assert "undecided at the end of its time" in late.reasons[0]
    assert {reason.split(":")[0] for reason in late.reasons[1:]} == OPEN_BESIDE.get(name, {name})


def test_a_reason_names_figure_and_limit() -> None:
    (reason,) = decide_step(POLICY, FAULTS["error ratio"]).reasons
    assert "0.03000 over the stable arm's 0.01000 is 3.00, at most 1.5 is allowed" in reason
    (reason,) = decide_step(POLICY, FAULTS["latency"]).reasons
    assert "p95 is 31.00 ms, the stable arm's 20.00 ms, at most 30.00 ms is allowed" in reason
    (reason,) = decide_step(POLICY, FAULTS["split"]).reasons
    assert "0.5349 of 8,600 customers, 0.5 were to be dealt to it" in reason
    assert "the split is broken" in reason


def test_a_broken_split_is_reported_before_anything_else() -> None:
    evidence = replace(FAULTS["error ratio"], challenger=replace(ARM, errors=300, customers=4_600))
    assert [reason.split(":")[0] for reason in decide_step(POLICY, evidence).reasons] == ["split"]


def test_a_split_of_requests_is_judged_by_requests() -> None:
    evidence = replace(FAULTS["split"], unit="request")
    assert decide_step(POLICY, evidence).verdict == "advance"
    assert decide(evidence=with_challenger(requests=12_000, errors=120), unit="request").verdict == "roll_back"


def test_a_few_errors_do_not_roll_back_where_the_stable_arm_has_none() -> None:
    evidence = replace(with_challenger(errors=3), stable=replace(ARM, errors=0))
    assert decide_step(POLICY, evidence).verdict == "advance"


def test_many_errors_roll_back_where_the_stable_arm_has_none() -> None:
    """Below the ceiling of 5%: a ratio to nothing is no figure, but evidence."""
    found = decide_step(POLICY, replace(with_challenger(errors=300), stable=replace(ARM, errors=0)))
    assert found.verdict == "roll_back"
    assert [reason.partition(":")[0] for reason in found.reasons] == ["error ratio"]


def test_requests_that_name_nobody_are_dealt_and_judged_one_by_one() -> None:
    nobody = replace(ARM, customers=0)
    assert decide(stable=nobody, challenger=nobody).verdict == "advance"
    for fault, changes in {"split": {"requests": 14_000, "errors": 140}, "scores": {"scores": SCORES[::-1]}}.items():
        found = decide(stable=nobody, challenger=replace(nobody, **changes))
        assert found.verdict == "roll_back"
        assert [reason.partition(":")[0] for reason in found.reasons] == [fault]


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
    early = replace(GOOD, step="canary_25", challenger=replace(ARM, customers=1_333))
    assert decide_step(BY_OUTCOMES, early).verdict == "advance"


def test_a_new_champion_is_tested_against_its_predecessor() -> None:
    watched = replace(GOOD, step="champion", stable=ArmEvidence())
    assert decide_step(POLICY, watched).verdict == "hold"
    assert decide_step(POLICY, replace(watched, losses=WORSE)).verdict == "roll_back"
    assert decide_step(POLICY, replace(watched, challenger=replace(ARM, errors=700))).verdict == "roll_back"
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
    with pytest.raises(ValueError, match="challenger: found 11 errors of 10 requests"):
        decide_step(POLICY, with_challenger(requests=10, errors=11))


def test_scores_unlike_the_champions_pass_where_the_evaluation_said_so() -> None:
    turned = SCORES[::-1]
    assert decide(stable=replace(ARM, scores=turned)).verdict == "advance"
    (reason,) = decide(reference_scores=turned).reasons
    assert "scores: 0.333 apart from those that it was evaluated by, at most 0.2 is allowed" in reason
    assert decide(reference_scores=turned).verdict == "roll_back"


@pytest.mark.parametrize("customers", [5, 200])
def test_scores_that_chance_may_have_moved_hold(customers: int) -> None:
    few = replace(ARM, customers=customers)
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
