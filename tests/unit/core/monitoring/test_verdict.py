"""The verdict, case by case: what retrains, what only alerts, and what makes a due retraining wait."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.core.monitoring.verdict import PastCheck, PastRetraining, Verdict, decide, find_judged_at

DAY = dt.timedelta(days=1)
NOW = dt.datetime(2024, 6, 1, tzinfo=dt.UTC)
POLICY = MonitoringPolicy()


def evidence(*, drift: bool = False, falls: bool = False, loss: bool | None = None, days: int = 30) -> dict[str, Any]:
    """Of one check; ``loss`` None: no outcome closed, else those of snapshots up to ``days`` before NOW."""
    found: dict[str, Any] = {
        "drift": {
            "breach": drift,
            "drifted": ["spend"] if drift else [],
            "beyond_limits": [],
            "features": {"spend": {"effect": 0.31, "p_value": 0.0}},
        },
        "estimate": {"breach": falls, "accuracy": 0.812, "drop": 0.041},
    }
    if loss is not None:
        said = ["churn rate 0.400 where 0.250 was expected"] if loss else []
        found |= {"realised": {"breach": loss, "reasons": said}, "outcomes_until": (NOW - days * DAY).isoformat()}
    return found


def judge(
    newest: dict[str, Any],
    *before: dict[str, Any],
    asked: tuple[PastRetraining, ...] = (),
    horizon_days: int = 60,
    **changes: Any,
) -> Any:
    """Of checks 20 days apart: three of them reach back as far as the horizon."""
    previous = [PastCheck(NOW - (place + 2) * 20 * DAY, found) for place, found in enumerate(before)]
    policy, model_as_of = POLICY.model_copy(update=changes), NOW - 100 * DAY
    since = NOW - 20 * DAY
    return decide(
        newest, previous, asked, policy, as_of=NOW, since=since, model_as_of=model_as_of, horizon_days=horizon_days
    )


BAD = evidence(drift=True, falls=True)
QUIET = evidence()


@pytest.mark.parametrize(
    ("checks", "verdict"),
    [
        ([QUIET], "none"),
        ([{}], "none"),
        ([evidence(drift=True)], "watch"),
        ([evidence(drift=True)] * 5, "watch"),  # no fall: nothing says that it does harm
        ([evidence(falls=True)] * 5, "alert"),  # no drift: the customers may just be harder
        ([BAD], "alert"),
        ([BAD, BAD], "alert"),
        ([BAD, BAD, BAD], "retrain"),
        ([BAD, evidence(drift=True), evidence(drift=True)], "retrain"),  # it must fall now
        ([BAD, QUIET, BAD], "alert"),
        ([QUIET, BAD, BAD], "none"),  # in the newest too
        ([BAD, {}, BAD, BAD], "retrain"),  # a check that could not be judged is none of the three
        ([evidence(loss=True)], "retrain"),
        ([evidence(loss=False)], "none"),
        ([evidence(drift=True, loss=True)], "retrain"),
    ],
)
def test_verdicts(checks: list[dict[str, Any]], verdict: str) -> None:
    assert judge(*checks).verdict == verdict


def test_drift_that_did_no_harm_never_retrains() -> None:
    """Outcomes of rows from within the run of drift are closed, and say that all is well."""
    harmless = evidence(drift=True, falls=True, loss=False, days=2)
    assert judge(harmless, BAD, BAD).verdict == "alert"
    assert "outcomes show no harm" in judge(harmless, BAD, BAD).reasons[0]
    quiet_estimate = evidence(drift=True, loss=False, days=2)
    assert judge(quiet_estimate, BAD, BAD).verdict == "watch"
    # remembered from an earlier check
    assert judge(BAD, harmless, BAD, BAD).verdict == "alert"


def test_outcomes_from_before_the_drift_do_not_excuse_it() -> None:
    assert judge(evidence(drift=True, falls=True, loss=False, days=61), BAD, BAD).verdict == "retrain"


def test_drift_waits_until_a_training_can_learn_of_it() -> None:
    """All outcomes of the drifted rows are open: the training would use up the month's, and know nothing of them."""
    found = judge(BAD, BAD, BAD, horizon_days=61)
    assert found.verdict == "alert"
    assert "no outcome of the drifted rows is known yet" in found.reasons[0]
    assert judge(BAD, BAD, BAD, BAD, horizon_days=61).verdict == "retrain"
    assert judge(BAD, BAD, BAD, horizon_days=61, policy="drift").verdict == "retrain"
    assert judge(evidence(drift=True, loss=True), BAD, BAD, horizon_days=61).verdict == "retrain"


def test_drift_with_a_gap_does_not_wait_for_ever_where_outcomes_never_come() -> None:
    """2 of the last 3 checks drift, and so it went on longer than a horizon."""
    asked: dict[str, Any] = {"horizon_days": 61, "breaches": 2}
    assert judge(BAD, BAD, QUIET, BAD, **asked).verdict == "retrain"
    assert judge(BAD, BAD, QUIET, QUIET, BAD, **asked).verdict == "alert"
    assert judge(BAD, BAD, evidence(loss=False), BAD, **asked).verdict == "alert"


def test_outcomes_may_be_asked_to_breach_more_than_once() -> None:
    once, fine = evidence(loss=True), evidence(loss=False)
    twice = {"outcome_breaches": 2, "outcome_of_checks": 3}
    assert judge(once, fine, **twice).verdict == "alert"
    assert judge(once, QUIET, fine, once, **twice).verdict == "retrain"
    assert judge(once, fine, fine, once, **twice).verdict == "alert"


def test_an_old_model_is_retrained() -> None:
    assert judge(QUIET, model_age_days_max=100).verdict == "none"
    found = judge(QUIET, model_age_days_max=99)
    assert found.verdict == "retrain"
    assert found.reasons == ("the model is 100 days old, at most 99 are allowed",)
    assert judge({}, model_age_days_max=None).verdict == "none"


def past(days: int, state: str = "registered", **changes: Any) -> PastRetraining:
    return PastRetraining(NOW - days * DAY, state, **changes)


@pytest.mark.parametrize(
    ("asked", "waits"),
    [
        ((past(14),), None),
        ((past(13),), "14 must pass"),
        ((past(90, "requested"),), "one is open"),
        ((past(90, "running"),), "one is open"),
        ((past(15), past(29)), "2 were asked for in the last 30 days"),
        ((past(15), past(30)), None),
        ((past(27, "refused"),), "28 must pass (1 challenger in a row did not win)"),
        ((past(28, "refused"),), None),
        ((past(27, won=False),), "28 must pass (1 challenger in a row did not win)"),  # registered, never champion
        ((past(55, "refused"), past(90, won=False), past(120)), "56 must pass (2 challengers in a row"),
        ((past(56, "refused"), past(90, "refused"), past(120)), None),
        ((past(59, "refused"), *[past(90 + n, "refused") for n in range(9)]), "60 must pass (10 challengers"),
        ((past(60, "refused"), *[past(90 + n, "refused") for n in range(9)]), None),  # a horizon, and no longer
        ((past(27, "failed"), past(50, "refused")), "28 must pass (1 challenger"),  # what failed made no challenger
        ((past(15, "failed"), past(50)), None),
        ((past(15), past(60, "refused")), None),
        ((past(14, "refused"), past(40)), None),  # the next after one that won is tried whatever drifts
        ((past(27, "refused"), past(60, "refused"), past(90)), "56 must pass (2 challengers in a row"),
    ],
)
def test_a_due_retraining_waits_as_an_alert(asked: tuple[PastRetraining, ...], waits: str | None) -> None:
    found = judge(BAD, BAD, BAD, asked=asked)
    assert found.verdict == ("alert" if waits else "retrain")
    if waits:
        assert waits in found.reasons[-1]


def test_the_back_off_ends_when_more_is_lost_than_when_it_was_decided_on() -> None:
    refused = past(20, "refused", gain=0.010)
    for mean, verdict in ((0.010, "alert"), (0.014, "alert"), (0.016, "retrain")):
        newest = evidence(loss=True)
        newest["realised"]["gain"] = {"mean": mean, "error": 0.005}
        assert judge(newest, asked=(refused,)).verdict == verdict
        assert judge(newest, asked=(past(13, "refused", gain=0.010),)).verdict == "alert"  # the cooldown stays
        assert judge(newest, asked=(past(20, "refused"),)).verdict == "alert"  # nothing was known then


@pytest.mark.parametrize(
    ("asked", "verdict"),
    [
        ((), "none"),
        ((past(13),), "none"),  # it waits without an alert
        ((past(14),), "retrain"),
        ((past(28, "refused"), past(60)), "retrain"),
        ((past(13, won=False), past(60)), "none"),
        ((past(14, won=False), past(60)), "retrain"),  # no longer than after the one that won
        ((past(70, "refused"), past(90, won=False), past(120)), "none"),  # two in a row: it is learnt
        ((past(70, "refused"),), "none"),  # none ever won
        ((past(70, "failed"),), "none"),
        ((past(14, monitored=False),), "none"),  # a person asked, and nothing had changed
        ((past(14, recalibrated=True),), "none"),  # two parameters are learnt at once
        ((past(20, "requested"), past(60)), "none"),
    ],
)
def test_after_a_challenger_that_won_the_next_is_tried(asked: tuple[PastRetraining, ...], verdict: str) -> None:
    found = judge(QUIET, asked=asked)
    assert found.verdict == verdict
    if verdict == "retrain":
        assert "won: what changed may not be learnt to its end" in found.reasons[0]


def test_outcomes_that_are_worse_than_promised_are_never_called_harmless() -> None:
    newest = evidence(drift=True, falls=True, loss=False, days=2)
    for real, said in ((0.79, True), (0.77, False)):
        newest["realised"] |= {"accuracy": real, "expected": {"accuracy": 0.80}}
        reasons = judge(newest, BAD, BAD).reasons
        assert any("outcomes show no harm" in reason for reason in reasons) is said


def test_outcomes_that_keep_a_low_promise_are_not_called_harmless() -> None:
    """The scores say themselves that they are right less often than on the reference."""
    newest = evidence(drift=True, falls=True, loss=False, days=2)
    newest["estimate"]["reference"] = {"accuracy": 0.85}
    for real, said in ((0.84, "outcomes show no harm"), (0.80, "accuracy 0.800, 0.050 below the reference's")):
        newest["realised"] |= {"accuracy": real, "expected": {"accuracy": real}}
        assert said in judge(newest, BAD, BAD).reasons[0]


def follow(
    made: list[dict[str, Any]], *, every: int, horizon_days: int | None = 30, **changes: Any
) -> list[tuple[Verdict, tuple[str, ...]]]:
    """The verdicts of checks with this evidence, one every so many days."""
    seen: list[dict[str, Any]] = []
    found = []
    for number, one in enumerate(made):
        at = NOW + number * every * DAY
        judged_at = find_judged_at(one, seen, as_of=at, horizon_days=horizon_days)
        seen.insert(0, {**one, "judged_at": judged_at.isoformat()})
        past = [PastCheck(NOW, earlier) for earlier in seen[1:]]
        policy = POLICY.model_copy(update=changes)
        clock = {"as_of": at, "since": at, "model_as_of": NOW, "horizon_days": horizon_days}
        found.append(tuple(decide(seen[0], past, (), policy, **clock)))
    return found


FEW, ENOUGH = {"window_rows": 80, "outcome_rows": 120}, evidence(loss=False)


def test_a_monitor_with_too_little_to_judge_says_so_after_two_horizons_and_until_there_is_enough() -> None:
    found = follow([FEW, FEW, FEW, FEW, ENOUGH, FEW, FEW], every=20)
    assert [verdict for verdict, _ in found] == ["none"] * 3 + ["cannot tell"] + ["none"] * 3
    assert found[3][1] == (
        "for 60 days there was too little to judge the model by: 80 customers since the last window, 500 are needed; "
        "120 outcomes, 500 are needed",
    )


def test_predictions_alone_judge_no_model_whose_outcomes_are_promised() -> None:
    made = [{**QUIET, "outcome_rows": 498}] * 3
    promised, others = follow(made, every=30), follow(made, every=30, horizon_days=None)
    assert promised[2] == (
        "cannot tell",
        ("for 60 days there was too little to judge the model by: 498 outcomes, 500 are needed",),
    )
    assert others[2][0] == "none"
    assert follow([FEW] * 3, every=30, horizon_days=None)[2][0] == "cannot tell"


def test_a_window_that_is_longer_than_two_horizons_is_gathered_first() -> None:
    assert [verdict for verdict, _ in follow([FEW] * 6, every=7, horizon_days=7)] == ["none"] * 5 + ["cannot tell"]


def test_what_the_monitor_sees_goes_before_what_it_does_not() -> None:
    for one, verdict in ((evidence(drift=True), "watch"), (BAD, "retrain"), (evidence(falls=True), "alert")):
        assert follow([one] * 4, every=30)[3][0] == verdict


def test_reasons_say_figures() -> None:
    assert judge(BAD, BAD, BAD).reasons == (
        "drift in 3 of the last 3 checks: spend (0.31); estimated accuracy 0.812, 0.041 below the reference's",
    )
    assert judge(evidence(loss=True)).reasons == ("outcomes: churn rate 0.400 where 0.250 was expected",)


LOSS, DRIFTS = evidence(loss=True), evidence(drift=True)


@pytest.mark.parametrize(
    ("policy", "verdicts"),
    [
        # outcomes that lose; drift with a fall; drift alone; drift that outcomes call harmless; nothing, an old model
        ("own", ["retrain", "retrain", "watch", "alert", "retrain"]),
        ("outcomes", ["retrain", "alert", "watch", "alert", "none"]),
        ("recalibrate", ["retrain", "alert", "watch", "alert", "none"]),
        ("drift", ["alert", "retrain", "retrain", "retrain", "none"]),
        ("never", ["alert", "alert", "watch", "alert", "none"]),
        ("every_100_days", ["retrain"] * 5),
        ("every_101_days", ["alert", "alert", "watch", "alert", "none"]),
    ],
)
def test_a_policy_heeds_its_own_evidence_alone(policy: str, verdicts: list[str]) -> None:
    harmless = evidence(drift=True, falls=True, loss=False, days=2)
    cases = [(LOSS,), (BAD, BAD, BAD), (DRIFTS, DRIFTS, DRIFTS), (harmless, BAD, BAD)]
    found = [judge(*checks, policy=policy).verdict for checks in cases]
    assert [*found, judge(QUIET, policy=policy, model_age_days_max=99).verdict] == verdicts


def test_the_calendar_counts_from_the_last_retraining_and_no_policy_but_the_own_follows_up() -> None:
    found = judge(QUIET, policy="every_30_days", asked=(past(29),))
    assert found.verdict == "none"
    found = judge(QUIET, policy="every_30_days", asked=(past(30),))
    assert found == ("retrain", ("30 days have passed since the last training (policy every_30_days)",))
    won = (past(20, won=True),)
    assert [judge(QUIET, policy=one, asked=won).verdict for one in ("own", "outcomes")] == ["retrain", "none"]


@pytest.mark.parametrize("policy", ["sometimes", "every_0_days", "every_days", "every_30_days_or_so", ""])
def test_an_unknown_policy_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match="policy"):
        MonitoringPolicy(policy=policy)
