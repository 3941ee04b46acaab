"""What the monitor measures: windows and outcomes, and that no client alone makes a breach of them."""

from __future__ import annotations

import datetime as dt
import json

import numpy as np
import pandas as pd
import pytest

from closedloop.core.monitoring.evidence import build_baseline, measure_outcomes, measure_window
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.core.monitoring.verdict import Decision, decide
from closedloop.records import LABEL_RULE

NOW = dt.datetime(2024, 6, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


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
LIMITS = MonitoringPolicy()


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
    assert found["gain"]["low"] > LIMITS.gain_min
    (reason,) = found["reasons"]
    assert "a recalibration would win back" in reason
    assert "churn rate" in reason


def test_an_error_of_birth_is_no_norm() -> None:
    """The reference rows are as wrong as the window's: what the model was born with is a loss all the same."""
    born = build_baseline(make_rows(8_000, 1, concept=1.0), {"spend": None, "plan": ["basic", "plus"]}, 0.5)
    found = measure_outcomes(born, make_rows(2_000, 4, concept=1.0), LIMITS)["realised"]
    assert found["breach"]


def test_the_accuracy_floor_is_judged_beyond_chance() -> None:
    rows = make_rows(2_000, 2)
    accuracy = measure_outcomes(BASELINE, rows, LIMITS)["realised"]["accuracy"]
    for floor, breach in ((accuracy + 0.005, False), (accuracy + 0.1, True)):
        limits = LIMITS.model_copy(update={"accuracy_threshold": floor})
        assert measure_outcomes(BASELINE, rows, limits)["realised"]["breach"] is breach


def test_too_few_rows_are_not_judged() -> None:
    rows = make_rows(499, 3, factor=0.3)
    assert measure_window(BASELINE, rows, LIMITS) == {}
    assert measure_outcomes(BASELINE, rows, LIMITS) == {}


def test_fixed_limits_can_be_asked_for() -> None:
    rows = make_rows(2_000, 2)
    rows.loc[:150, "plan"] = None
    by_kind = {
        kind: measure_window(BASELINE, rows, LIMITS.model_copy(update={"limits": kind}))["drift"]
        for kind in ("calibrated", "fixed", "both")
    }
    assert [found["breach"] for found in by_kind.values()] == [False, True, True]
    assert by_kind["fixed"]["beyond_limits"] == ["plan: 0.075 missing, below 0.05 is allowed"]


def judge(window: pd.DataFrame, closed: pd.DataFrame) -> Decision:
    """The verdict of a first check."""
    found = measure_window(BASELINE, window, LIMITS) | measure_outcomes(BASELINE, closed, LIMITS)
    found["outcomes_until"] = NOW.isoformat()
    return decide(found, [], [], LIMITS, as_of=NOW, since=NOW - DAY, model_as_of=NOW - 100 * DAY)


def add_false_outcomes(rows: pd.DataFrame, count: int, client: str) -> pd.DataFrame:
    """The first so many stayed by all scores, and have churned by what the client says."""
    order = rows.sort_values("score").index[:count]
    return rows.assign(
        outcome=rows["outcome"].where(~rows.index.isin(order), 1),
        reported_by=rows["reported_by"].where(~rows.index.isin(order), client),
    )


DRIFTED = make_rows(2_000, 3, factor=0.6)


@pytest.mark.parametrize("honest", [LABEL_RULE, "600d600d"])
@pytest.mark.parametrize("share", [0.06, 0.3, 0.45])
def test_false_outcomes_of_one_client_among_many_retrain_nothing(honest: str, share: float) -> None:
    rows = make_rows(1_060, 5).assign(reported_by=honest)
    assert judge(DRIFTED, rows).verdict == "alert"
    poisoned = add_false_outcomes(rows, round(share * 1_060), "0badc0de")
    found = judge(DRIFTED, poisoned)
    assert found.verdict == "alert"
    assert "realised: without client 0badc0de, which has less than half" in found.reasons
    # the same outcomes, with nobody to tell apart: the attack is one
    assert judge(DRIFTED, poisoned.assign(reported_by=None)).verdict == "retrain"


def test_outcomes_that_are_worse_whoever_is_left_out_retrain() -> None:
    rows = make_rows(2_000, 4, concept=1.0).assign(reported_by=[*["a"] * 700, *["b"] * 700, *[LABEL_RULE] * 600])
    assert judge(DRIFTED, rows).verdict == "retrain"


def test_the_only_client_that_reports_is_believed() -> None:
    rows = make_rows(2_000, 4, concept=1.0).assign(reported_by="600d600d")
    assert judge(DRIFTED, rows).verdict == "retrain"


def test_requests_of_one_client_among_many_are_no_drift() -> None:
    mine = make_rows(900, 6, factor=0.4).assign(client="0badc0de")
    window = pd.concat([make_rows(1_100, 2).assign(client="600d600d"), mine], ignore_index=True)
    found = measure_window(BASELINE, window, LIMITS)
    assert [found[part]["breach"] for part in ("drift", "estimate")] == [False, False]
    assert found["drift"]["without"] == "0badc0de"
    same = measure_window(BASELINE, window.assign(client=None), LIMITS)
    assert [same[part]["breach"] for part in ("drift", "estimate")] == [True, True]
    both = pd.concat([mine, make_rows(1_100, 7, factor=0.4).assign(client="600d600d")], ignore_index=True)
    assert measure_window(BASELINE, both, LIMITS)["drift"]["breach"]


def test_one_client_cannot_hide_what_the_others_show() -> None:
    theirs = make_rows(1_100, 7, factor=0.8).assign(client="600d600d")
    assert measure_window(BASELINE, theirs, LIMITS)["drift"]["breach"]
    mine = make_rows(1_000, 8, factor=1.3).assign(client="0badc0de")
    window = pd.concat([theirs, mine], ignore_index=True)
    assert not measure_window(BASELINE, window.assign(client=None), LIMITS)["drift"]["breach"]
    assert measure_window(BASELINE, window, LIMITS)["drift"]["breach"]
