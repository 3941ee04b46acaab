"""The controller: each pass moves a version one step, or not, and a pass that is killed is done by the next."""

from __future__ import annotations

import dataclasses
import datetime as dt
import time
from pathlib import Path
from typing import Any

import pytest

from closedloop.core.release.policy import ReleasePolicy
from closedloop.errors import ConfigError, DataError, GateFailed, ServiceUnavailable
from closedloop.release.by_hand import find_predecessor, promote, roll_back, verify
from closedloop.release.controller import run_pass, start_release
from closedloop.release.evidence import ROUTED_AFTER
from closedloop.release.moves import deploy_champion
from tests.deployments import change_row
from tests.releases import HOUR, NOW, flow, open_desk

POLICY = ReleasePolicy()
STEPS = ("shadow", "canary_5", "canary_25", "canary_50", "champion")


class Services:
    """Feature services that exist."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def has_service(self, name: str) -> bool:
        return name in self.names


HERE = Services("shop_churn_a")


@pytest.fixture
def desk(tmp_path: Path) -> Any:
    with open_desk(tmp_path) as made:
        deploy_champion(made[0], "1", now=NOW, actor="register", reason="the first version")
        yield made


def advance(desk: Any, *, until: str, now: dt.datetime = NOW) -> dt.datetime:
    """Start version 2 and let it pass all steps up to one."""
    releases, evidence, traffic = desk
    start_release(releases, evidence, "2", actor="a test", now=now)
    for step in STEPS[: STEPS.index(until)]:
        flow(traffic, step)
        now += HOUR
        assert run_pass(releases, evidence, POLICY, now=now, as_of=now).decision.verdict == "advance"  # type: ignore[union-attr]
    return now


def describe(releases: Any) -> tuple[Any, ...]:
    row = releases.read_state().row
    return row.champion_version, row.challenger_version, row.challenger_mode, row.weight


def test_the_journal_says_which_limits_the_champion_excuses(desk: Any) -> None:
    releases, evidence, _ = desk
    releases.tracking.tags["2"] |= {"closedloop.excused": "roc_auc, lift", "closedloop.kind": "training"}
    start_release(releases, evidence, "2", actor="a test", now=NOW)
    said = "roc_auc, lift are missed and stop nothing: the champion misses them too, and loses to this version"
    assert releases.read_entries()[-1].reason == f"started: a training; {said}"


def test_the_journal_says_nothing_of_excuses_where_there_are_none(desk: Any) -> None:
    releases, evidence, _ = desk
    releases.tracking.tags["2"] |= {"closedloop.excused": "none"}
    start_release(releases, evidence, "2", actor="a test", now=NOW)
    assert releases.read_entries()[-1].reason == "started: a training"


def test_a_version_that_holds_passes_every_step_and_each_is_journaled_with_its_evidence(desk: Any) -> None:
    releases, evidence, traffic = desk
    start_release(releases, evidence, "2", actor="a test", now=NOW)
    assert releases.tracking.challenger == "2"
    seen, now, salts = [describe(releases)], NOW, {releases.read_state().row.salt}
    for step in STEPS[:-1]:
        flow(traffic, step)
        now += HOUR
        run_pass(releases, evidence, POLICY, now=now, as_of=now)
        seen.append(describe(releases))
        salts.add(releases.read_state().row.salt)
    assert seen == [
        ("1", "2", "shadow", 0.0),
        ("1", "2", "canary", 0.05),
        ("1", "2", "canary", 0.25),
        ("1", "2", "canary", 0.5),
        ("2", "1", "shadow", 0.0),
    ]
    assert len(salts) == 5  # what a client learnt in one step says nothing of the next
    assert releases.tracking.champion == "2"
    entries = releases.read_entries()
    assert [entry.action for entry in entries] == ["promote", *STEPS]
    assert entries[2].evidence["evidence"]["challenger"]["requests"] == 120_000
    assert "sample: 120,000 of the challenger's requests, one a customer and day, at least 5,193" in entries[2].reason
    # evidence of a step is what came after it had been taken up
    assert traffic.asked[-1] == NOW + 3 * HOUR + dt.timedelta(seconds=2)
    flow(traffic, "champion")
    run_pass(releases, evidence, POLICY, now=now + 61 * 24 * HOUR, as_of=now)
    assert (describe(releases), releases.read_state().rollout) == (("2", None, None, 0.0), None)
    assert verify(releases).entries == 7
    start_release(releases, evidence, "3", actor="a test", now=NOW)
    assert releases.read_state().row.salt not in salts  # the next release deals customers anew


def test_an_undecided_step_holds_and_goes_back_when_its_time_is_over(desk: Any) -> None:
    releases, evidence, traffic = desk
    advance(desk, until="canary_5")
    flow(traffic, "canary_5", requests=8, customers=8)
    traffic.flow("1", requests=152, customers=152)
    found = run_pass(releases, evidence, POLICY, now=NOW + 2 * HOUR, as_of=NOW)
    assert (found.decision.verdict, describe(releases)) == ("hold", ("1", "2", "canary", 0.05))  # type: ignore[union-attr]
    before = len(releases.read_entries())
    found = run_pass(releases, evidence, POLICY, now=NOW + 80 * HOUR, as_of=NOW)
    assert (found.decision.verdict, describe(releases)) == ("roll_back", ("1", None, None, 0.0))  # type: ignore[union-attr]
    assert len(releases.read_entries()) == before + 1
    assert releases.tracking.rejected["2"].startswith("entry 4: undecided at the end of its time")
    assert run_pass(releases, evidence, POLICY, now=NOW, as_of=NOW).decision is None


@pytest.mark.parametrize(
    ("step", "changes", "words"),
    [
        ("canary_5", {"latency_p95_ms": 40.0}, "latency: p95 is 40.00 ms"),
        ("canary_25", {"customers": 1_500}, "the split is broken"),
        (
            "shadow",
            {"scores": (0,) * 19 + (40_000,)},
            "scores: 0.750 apart from those that it was evaluated by, at most 0.2",
        ),
    ],
)
def test_a_guardrail_that_fails_takes_the_version_back(desk: Any, step: str, changes: Any, words: str) -> None:
    releases, evidence, traffic = desk
    now = advance(desk, until=step)
    flow(traffic, step, **changes)
    run_pass(releases, evidence, POLICY, now=now + HOUR, as_of=now)
    entry = releases.read_entries()[-1]
    assert (entry.action, entry.rejected, describe(releases)) == ("reject", "2", ("1", None, None, 0.0))
    assert words in entry.reason


def test_scores_that_customers_moved_take_no_version_back(desk: Any) -> None:
    """What moved a version's scores since its evaluation moved those of the champion, which has one of its own."""
    releases, evidence, traffic = desk
    now = advance(desk, until="shadow")
    moved = {"scores": (0,) * 19 + (40_000,)}
    flow(traffic, "shadow", **moved)
    traffic.flow("1", **moved)
    run_pass(releases, evidence, POLICY, now=now + HOUR, as_of=now)
    assert releases.read_entries()[-1].action == "canary_5"


def test_a_pass_is_noted_once_it_is_done_whether_it_holds_or_moves_and_not_where_it_fails(
    desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases, evidence, traffic = desk
    start_release(releases, evidence, "2", actor="a test", now=NOW)
    assert releases.journal.read_pass("shop_churn") is None
    assert run_pass(releases, evidence, POLICY, now=NOW + HOUR, as_of=NOW).decision.verdict == "hold"  # type: ignore[union-attr]
    assert releases.journal.read_pass("shop_churn") == NOW + HOUR
    flow(traffic, "shadow")
    monkeypatch.setattr(traffic, "read_since", away)
    with pytest.raises(ServiceUnavailable):
        run_pass(releases, evidence, POLICY, now=NOW + 2 * HOUR, as_of=NOW)
    assert releases.journal.read_pass("shop_churn") == NOW + HOUR
    monkeypatch.undo()
    monkeypatch.setattr(traffic, "read_totals", away)  # as the next step begins
    with pytest.raises(ServiceUnavailable):
        run_pass(releases, evidence, POLICY, now=NOW + 3 * HOUR, as_of=NOW)
    assert releases.journal.read_pass("shop_churn") == NOW + HOUR
    monkeypatch.undo()
    assert run_pass(releases, evidence, POLICY, now=NOW + 4 * HOUR, as_of=NOW).decision.verdict == "advance"  # type: ignore[union-attr]
    assert releases.journal.read_pass("shop_churn") == NOW + 4 * HOUR


def away(*_: Any, **__: Any) -> Any:
    raise ServiceUnavailable("Prometheus is away")


def test_errors_are_counted_from_the_beginning_of_the_step(desk: Any) -> None:
    releases, evidence, traffic = desk
    traffic.errors = {"2/canary": 5_000.0, "1/champion": 3.0}
    now = advance(desk, until="canary_5")
    flow(traffic, "canary_5")
    traffic.errors["1/champion"] += 2.0
    assert run_pass(releases, evidence, POLICY, now=now + HOUR, as_of=now).decision.verdict == "advance"  # type: ignore[union-attr]
    arms = releases.read_entries()[-1].evidence["evidence"]
    assert (arms["stable"]["errors"], arms["stable"]["customers"], arms["challenger"]["errors"]) == (2, 28_500, 0)
    flow(traffic, "canary_25")
    traffic.errors["2/canary"] += 6_000.0
    run_pass(releases, evidence, POLICY, now=now + 2 * HOUR, as_of=now)
    entry = releases.read_entries()[-1]
    assert (entry.action, entry.rejected) == ("reject", "2")
    assert "error rate: 0.44444 of the challenger's customers, at most 0.05 is allowed" in entry.reason


def test_outcomes_of_customers_that_both_scored_take_a_worse_champion_back(desk: Any) -> None:
    releases, evidence, traffic = desk
    now = advance(desk, until="champion")
    flow(traffic, "champion")
    for number in range(600):
        outcome = int(number % 3 == 0)
        for version, variant in (("2", "champion"), ("1", "shadow")):
            score = 0.5 if version == "2" else 0.2 + 0.5 * outcome + 0.001 * (number % 7)
            # of a snapshot the predecessor's first prediction counts, which may be older than the release
            asked_at = NOW - HOUR if version == "1" and number % 2 else now
            who = (f"p{version}{number}", f"C{number}", NOW, asked_at, version, variant)
            traffic.rows.append((*who, "http", False, score, 0, outcome, now, None))
    later = now + 40 * 24 * HOUR
    found = run_pass(releases, evidence, POLICY, now=later, as_of=later)
    assert found.decision.verdict == "roll_back"  # type: ignore[union-attr]
    entry = releases.read_entries()[-1]
    assert (entry.action, entry.rejected, describe(releases)) == ("roll_back", "2", ("1", None, None, 0.0))
    assert entry.evidence["evidence"]["losses"]["customers"] == 600


class Proxy:
    """Weights that are set by a slow program, and that somebody may set otherwise."""

    seconds = 0.0
    dies = ""

    def __init__(self) -> None:
        self.split: int | None = None
        self.written = 0

    def route(self, canary_percent: int) -> bool:
        if self.split == canary_percent:
            return False
        if self.dies == "before":
            raise ServiceUnavailable("kubectl: no route to host")
        time.sleep(self.seconds)
        self.split = canary_percent
        self.written += 1
        if self.dies == "after":
            raise ServiceUnavailable("kubectl: timed out")
        return True


@pytest.fixture
def proxied(desk: Any) -> Any:
    releases, evidence, traffic = desk
    return dataclasses.replace(releases, traffic=Proxy()), dataclasses.replace(evidence, unit="request"), traffic


def test_behind_a_proxy_the_stable_service_scores_in_shadow_and_weights_are_routed(proxied: Any) -> None:
    releases, evidence, traffic = proxied
    advance(proxied, until="canary_25")
    assert describe(releases) == ("1", "2", "shadow", 0.25)
    assert releases.traffic.split == 25
    flow(traffic, "canary_25")
    found = run_pass(releases, evidence, POLICY, now=NOW + 5 * HOUR, as_of=NOW)
    assert found.decision.verdict == "advance"  # type: ignore[union-attr]
    assert releases.traffic.split == 50
    assert releases.traffic.written == 4
    assert [entry.action for entry in releases.read_entries()[1:5]] == ["shadow", "routed", "canary_5", "routed"]
    assert verify(releases).entries == 9


def test_behind_a_proxy_requests_count_from_when_its_weights_are_in_force(proxied: Any) -> None:
    releases, evidence, traffic = proxied
    releases.traffic.seconds = 0.2
    now = advance(proxied, until="canary_5")
    rollout = releases.read_state().rollout
    assert rollout.step_at == now
    assert rollout.routed_at >= now + dt.timedelta(seconds=0.2)
    flow(traffic, "canary_5")
    run_pass(releases, evidence, POLICY, now=now + HOUR, as_of=now)
    assert traffic.asked[-1] == rollout.routed_at + ROUTED_AFTER


@pytest.mark.parametrize("cause", ["killed before the weights", "killed after the weights", "others set them"])
def test_behind_a_proxy_a_step_counts_anew_once_its_weights_are_set(proxied: Any, cause: str) -> None:
    releases, evidence, traffic = proxied
    now = advance(proxied, until="canary_5")
    flow(traffic, "canary_5")
    if cause == "others set them":
        releases.traffic.split = 0
    else:
        releases.traffic.dies = cause.split()[1]
        with pytest.raises(ServiceUnavailable):
            run_pass(releases, evidence, POLICY, now=now + HOUR, as_of=now)
        releases.traffic.dies = ""
    step = releases.read_entries()[-1].rollout.step
    traffic.errors = {"2/canary": 9_000.0}  # by the split of before
    traffic.arms.clear()
    traffic.asked.clear()
    run_pass(releases, evidence, POLICY, now=now + 2 * HOUR, as_of=now)
    assert all(since > now + 2 * HOUR for since in traffic.asked)
    entry = releases.read_entries()[-1]
    assert (entry.action, entry.rollout.step) == ("routed", step)
    assert entry.rollout.errors_before == {"2/canary": 9_000.0}
    assert releases.traffic.split == entry.row.canary_percent
    flow(traffic, step)
    found = run_pass(releases, evidence, POLICY, now=now + 3 * HOUR, as_of=now)
    assert found.decision.verdict == "advance"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"closedloop.comparison": "inconclusive"}, "the champion-challenger gate said inconclusive, win is needed"),
        ({"closedloop.feature_service": "shop_churn_b"}, "it needs a service of its own"),
    ],
)
def test_a_version_that_cannot_be_released_is_rejected_with_the_reason(desk: Any, tags: Any, words: str) -> None:
    releases, evidence, _ = desk
    releases.tracking.tags["2"] |= tags
    with pytest.raises(GateFailed, match=words):
        start_release(releases, evidence, "2", actor="a test", now=NOW)
    assert (describe(releases), releases.read_entries()[-1].action) == (("1", None, None, 0.0), "reject")
    assert words in releases.tracking.rejected["2"]


def test_what_cannot_be_judged_is_refused_without_a_trace(desk: Any) -> None:
    releases, evidence, _ = desk
    with pytest.raises(DataError, match="version 3 was not compared with version 1"):
        start_release(releases, evidence, "3", actor="a test", now=NOW)
    with pytest.raises(DataError, match="no passed evaluation"):
        start_release(releases, evidence, "5", actor="a test", now=NOW)
    with pytest.raises(ConfigError, match="version 1 is champion already"):
        start_release(releases, evidence, "1", actor="a test", now=NOW)
    start_release(releases, evidence, "2", actor="a test", now=NOW)
    with pytest.raises(ConfigError, match="version 2 is in shadow"):
        start_release(releases, evidence, "3", actor="a test", now=NOW)
    assert len(releases.read_entries()) == 2


def test_nothing_moves_before_all_evidence_is_there(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    releases, evidence, traffic = desk
    monkeypatch.setattr(traffic, "read_totals", away)
    with pytest.raises(ServiceUnavailable):
        start_release(releases, evidence, "2", actor="a test", now=NOW)
    assert (releases.tracking.challenger, len(releases.read_entries())) == (None, 1)


def test_a_version_whose_folder_is_not_the_registered_one_does_not_begin(desk: Any) -> None:
    releases, evidence, _ = desk
    releases.tracking.tags["2"] |= {"closedloop.folder_sha256": "another"}
    with pytest.raises(DataError, match="the registry says another"):
        start_release(releases, evidence, "2", actor="a test", now=NOW)
    assert len(releases.read_entries()) == 1


def test_a_rollback_ends_a_canary_first_and_the_champion_after(desk: Any) -> None:
    releases, _, _ = desk
    now = advance(desk, until="canary_25")
    roll_back(releases, HERE, to=None, actor="me", reason="complaints", now=now)
    assert (describe(releases), releases.tracking.rejected["2"]) == (("1", None, None, 0.0), "entry 5: complaints")
    with pytest.raises(ConfigError, match="version 1 has no predecessor in the journal"):
        roll_back(releases, HERE, to=None, actor="me", reason="", now=now)
    for version in ("2", "3"):
        promote(releases, HERE, version, actor="me", reason="", now=now)
    assert describe(releases) == ("3", "2", "shadow", 0.0)
    for version in ("2", "1"):
        roll_back(releases, Services(), to=None, actor="me", reason="", now=now)
        assert describe(releases) == (version, None, None, 0.0)
    roll_back(releases, HERE, to="3", actor="me", reason="", now=now)
    assert describe(releases)[0] == "3"


def test_a_rollback_of_what_is_open_alone_never_touches_a_champion(desk: Any) -> None:
    releases, _, _ = desk
    now = advance(desk, until="canary_25")
    roll_back(releases, HERE, to=None, actor="CI", reason="", now=now, only_open=True)
    assert describe(releases) == ("1", None, None, 0.0)
    for version in ("2", "3"):
        promote(releases, HERE, version, actor="me", reason="", now=now)
    entries = len(releases.read_entries())
    roll_back(releases, HERE, to=None, actor="CI", reason="", now=now, only_open=True)  # 3 is watched, 2 is in shadow
    assert describe(releases) == ("3", "2", "shadow", 0.0)
    assert len(releases.read_entries()) == entries


def test_errors_from_before_a_promotion_by_hand_are_not_held_against_it(desk: Any) -> None:
    """The service counts on, and nobody has asked it when the version was promoted."""
    releases, evidence, traffic = desk
    promote(releases, HERE, "2", actor="me", reason="", now=NOW)
    traffic.errors = {"2/canary": 40.0}
    traffic.flow("2", share=0.001)
    traffic.flow("1", shadow=True, share=0.001)
    found = run_pass(releases, evidence, POLICY, now=NOW + HOUR, as_of=NOW)
    assert (found.decision.verdict, describe(releases)) == ("hold", ("2", "1", "shadow", 0.0))  # type: ignore[union-attr]
    assert releases.read_entries()[-1].rollout.errors_before == {"2/canary": 40.0}
    traffic.errors = {"2/champion": 40.0}
    found = run_pass(releases, evidence, POLICY, now=NOW + 2 * HOUR, as_of=NOW)
    assert (found.decision.verdict, describe(releases)[0]) == ("roll_back", "1")  # type: ignore[union-attr]


def test_a_rollback_needs_no_registry(desk: Any) -> None:
    releases, _, _ = desk
    promote(releases, HERE, "2", actor="me", reason="", now=NOW)
    releases.tracking.away = True
    roll_back(releases, Services(), to=None, actor="me", reason="", now=NOW)
    assert releases.journal.read_deployment("shop_churn").champion_version == "1"


def test_a_rollback_to_features_that_are_gone_is_refused(desk: Any) -> None:
    releases, _, _ = desk
    releases.tracking.tags["2"] |= {"closedloop.feature_service": "shop_churn_b"}
    promote(releases, Services("shop_churn_b"), "2", actor="me", reason="", now=NOW)
    assert describe(releases) == ("2", None, None, 0.0)  # the predecessor cannot score its requests
    with pytest.raises(DataError, match=r"version 1 takes the features of shop_churn_a, which the feature"):
        roll_back(releases, Services("shop_churn_b"), to=None, actor="me", reason="", now=NOW)
    assert describe(releases)[0] == "2"
    roll_back(releases, HERE, to=None, actor="me", reason="", now=NOW)
    assert describe(releases)[0] == "1"


def test_going_back_twice_goes_two_back(desk: Any) -> None:
    releases, _, _ = desk
    for version in ("2", "3"):
        promote(releases, HERE, version, actor="me", reason="", now=NOW)
    assert find_predecessor(releases.read_entries(), "3") == "2"
    roll_back(releases, HERE, to=None, actor="me", reason="", now=NOW)
    assert find_predecessor(releases.read_entries(), "2") == "1"
    promote(releases, HERE, "4", actor="me", reason="", now=NOW)
    assert find_predecessor(releases.read_entries(), "4") == "2"


def test_verify_names_what_is_wrong(desk: Any) -> None:
    releases, _, _ = desk
    promote(releases, HERE, "2", actor="me", reason="", now=NOW)
    assert verify(releases).entries == 2
    # as was once taken for a move that a kill had interrupted
    change_row(releases.journal.database, "shop_churn", revision=1, champion_version="6")
    with pytest.raises(GateFailed, match=r"row \(revision 1, champion 6\) is another; entry 2 of the journal did not"):
        verify(releases)
    change_row(releases.journal.database, "shop_churn", revision=2, champion_version="2", weight=0.9)
    with pytest.raises(GateFailed, match=r"row \(revision 2, champion 2\) is another"):
        verify(releases)
    releases.tracking.mark = "3 " + "a" * 64
    with pytest.raises(GateFailed, match="entry 3 is missing: the journal ends before entry 3"):
        verify(releases)


BY_OUTCOMES = ReleasePolicy(evidence="outcomes")


def add_outcomes(traffic: Any, now: dt.datetime, *, better: bool) -> None:
    """600 customers whom both models scored in the canary; version 2 knows more, or as much."""
    traffic.rows.clear()
    for number in range(600):
        outcome = int(number % 3 == 0)
        knows = 0.2 + 0.5 * outcome + 0.001 * (number % 7)
        for version, variant in (("1", "champion"), ("2", "shadow")):
            score = knows if better and version == "2" else 0.4
            who = (f"p{version}{number}", f"C{number}", NOW, now, version, variant)
            traffic.rows.append((*who, "http", False, score, 0, outcome, now, None))


def test_by_outcomes_the_controller_waits_for_a_proof_and_promotes_on_it(desk: Any) -> None:
    releases, evidence, traffic = desk
    now = advance(desk, until="canary_50")
    flow(traffic, "canary_50")
    found = run_pass(releases, evidence, BY_OUTCOMES, now=now + HOUR, as_of=now)
    assert found.decision.verdict == "hold"  # type: ignore[union-attr]
    assert "outcomes better: 0 customers with closed outcomes" in found.decision.reasons[0]  # type: ignore[union-attr]
    add_outcomes(traffic, now, better=True)
    run_pass(releases, evidence, BY_OUTCOMES, now=now + 2 * HOUR, as_of=now)
    assert describe(releases) == ("2", "1", "shadow", 0.0)
    entry = releases.read_entries()[-1]
    assert "outcomes better: 600 customers with closed outcomes" in entry.reason
    assert entry.evidence["figures"]["outcomes_better_evidence"] > 3
    assert entry.evidence["evidence"]["losses"]["customers"] == 600


def test_by_outcomes_a_version_that_is_not_proved_better_goes_back_at_the_end_of_its_time(desk: Any) -> None:
    releases, evidence, traffic = desk
    now = advance(desk, until="canary_50")
    flow(traffic, "canary_50")
    add_outcomes(traffic, now, better=False)
    for hours, expected in ((100, "hold"), (24 * 45, "roll_back")):
        found = run_pass(releases, evidence, BY_OUTCOMES, now=now + hours * HOUR, as_of=now)
        assert found.decision.verdict == expected  # type: ignore[union-attr]
    assert (describe(releases), releases.read_entries()[-1].rejected) == (("1", None, None, 0.0), "2")
