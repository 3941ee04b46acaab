"""The verdict, case by case: what retrains, what only alerts, and what makes a due retraining wait."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.core.monitoring import (
    AlarmLimits,
    PastCheck,
    PastRetraining,
    Policy,
    build_baseline,
    decide,
    measure_outcomes,
    measure_window,
)

DAY = dt.timedelta(days=1)
NOW = dt.datetime(2024, 6, 1, tzinfo=dt.UTC)
POLICY = Policy()


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
    newest: dict[str, Any], *before: dict[str, Any], asked: tuple[PastRetraining, ...] = (), **changes: Any
) -> Any:
    previous = [PastCheck(NOW - (place + 2) * DAY, found) for place, found in enumerate(before)]
    policy = dataclasses.replace(POLICY, **changes)
    return decide(newest, previous, asked, policy, as_of=NOW, since=NOW - DAY, model_as_of=NOW - dt.timedelta(days=100))


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
    assert judge(evidence(drift=True, falls=True, loss=False, days=30), BAD, BAD).verdict == "retrain"


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


def past(days: int, state: str = "registered") -> PastRetraining:
    return PastRetraining(NOW - days * DAY, state)


@pytest.mark.parametrize(
    ("asked", "waits"),
    [
        ((past(14),), None),
        ((past(13),), "14 must pass"),
        ((past(90, "requested"),), "one is open"),
        ((past(90, "running"),), "one is open"),
        ((past(15), past(29)), "2 were asked for in the last 30 days"),
        ((past(15), past(30)), None),
        ((past(27, "refused"),), "28 must pass (1 challengers in a row were refused)"),
        ((past(28, "refused"),), None),
        ((past(55, "refused"), past(90, "refused"), past(120)), "56 must pass (2 challengers"),
        ((past(56, "refused"), past(90, "refused"), past(120)), None),
        ((past(15), past(60, "refused")), None),
    ],
)
def test_a_due_retraining_waits_as_an_alert(asked: tuple[PastRetraining, ...], waits: str | None) -> None:
    found = judge(BAD, BAD, BAD, asked=asked)
    assert found.verdict == ("alert" if waits else "retrain")
    if waits:
        assert waits in found.reasons[-1]


def test_reasons_say_figures() -> None:
    assert judge(BAD, BAD, BAD).reasons == (
        "drift in 3 of the last 3 checks: spend (0.31); estimated accuracy 0.812, 0.041 below the reference's",
    )
    assert judge(evidence(loss=True)).reasons == ("outcomes: churn rate 0.400 where 0.250 was expected",)


def make_rows(rows: int, seed: int, **shift: float) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    spend = rng.gamma(2.0, 30.0, rows) * shift.get("factor", 1.0)
    plan = rng.choice(["basic", "plus"], rows)
    true = 1 / (1 + np.exp(spend / 25 - 1.5 - shift.get("concept", 0.0)))
    score = 1 / (1 + np.exp(spend / 25 - 1.5))
    labels = rng.random(rows) < true
    frame = pd.DataFrame({"spend": spend, "plan": plan, "score": score, "churned": labels})
    return frame.assign(customer_id=[f"c{number}" for number in range(rows)], outcome=labels.astype(int))


BASELINE = build_baseline(make_rows(8_000, 1), {"spend": None, "plan": ["basic", "plus"]}, 0.5)
LIMITS = AlarmLimits()


def test_a_window_like_the_reference_is_quiet() -> None:
    rows = make_rows(2_000, 2)
    found = measure_window(BASELINE, rows, LIMITS) | measure_outcomes(BASELINE, rows, LIMITS)
    assert [found[part]["breach"] for part in ("drift", "estimate", "realised")] == [False, False, False]
    assert found["estimate"]["accuracy"] == pytest.approx(found["realised"]["accuracy"], abs=0.03)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_shifted_window_drifts_and_says_which_feature() -> None:
    found = measure_window(BASELINE, make_rows(2_000, 3, factor=0.6), LIMITS)
    assert found["drift"]["breach"]
    assert set(found["drift"]["drifted"]) == {"spend", "score"}
    assert found["estimate"]["breach"]  # scores came nearer to a half


def test_another_concept_is_seen_in_outcomes_alone() -> None:
    rows = make_rows(2_000, 4, concept=1.0)
    quiet = measure_window(BASELINE, rows, LIMITS)
    assert not quiet["drift"]["breach"]
    found = measure_outcomes(BASELINE, rows, LIMITS)["realised"]
    assert found["breach"]
    assert len(found["reasons"]) == 2


def test_the_accuracy_floor_is_judged_beyond_chance() -> None:
    rows = make_rows(2_000, 2)
    accuracy = measure_outcomes(BASELINE, rows, LIMITS)["realised"]["accuracy"]
    for floor, breach in ((accuracy + 0.005, False), (accuracy + 0.1, True)):
        limits = dataclasses.replace(LIMITS, accuracy_threshold=floor)
        assert measure_outcomes(BASELINE, rows, limits)["realised"]["breach"] is breach


def test_too_few_rows_are_not_judged() -> None:
    rows = make_rows(499, 3, factor=0.3)
    assert measure_window(BASELINE, rows, LIMITS) == {}
    assert measure_outcomes(BASELINE, rows, LIMITS) == {}


def test_fixed_limits_can_be_asked_for() -> None:
    rows = make_rows(2_000, 2)
    rows.loc[:150, "plan"] = None
    by_kind = {
        kind: measure_window(BASELINE, rows, dataclasses.replace(LIMITS, limits=kind))["drift"]
        for kind in ("calibrated", "fixed", "both")
    }
    assert [found["breach"] for found in by_kind.values()] == [False, True, True]
    assert by_kind["fixed"]["beyond_limits"] == ["plan: 0.075 missing, below 0.05 is allowed"]
