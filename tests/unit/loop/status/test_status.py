"""The one screen: what it says of a loop, and which step it names as the next."""

from __future__ import annotations

import dataclasses
import datetime as dt
import shlex

import msgspec
import pytest
import typer

from closedloop.adapters.service import ServiceHealth
from closedloop.cli.main import app
from closedloop.loop.status.last_run import list_with_results
from closedloop.loop.status.next_step import NextStep, Surroundings, find_next_step
from closedloop.loop.status.overview import Sources, describe_nothing, gather
from closedloop.loop.status.status import BAD, GOOD, LOOK, describe
from closedloop.store.checks import Checks, Retraining
from closedloop.store.database import Database
from closedloop.store.journal import Journal
from closedloop.store.predictions import Predictions
from closedloop.store.status_queries import Share, StatusQueries
from tests.loops import DAY, HORIZON_DAYS, NAME, check, fill, predict

NOW = dt.datetime(2024, 3, 1, 12, tzinfo=dt.UTC)
TODAY = NOW.replace(hour=0)
SERVICE = "http://127.0.0.1:3000"
OURS = ServiceHealth("3", NAME, "d" * 64)
AROUND = Surroundings(SERVICE, OURS, is_live=False)


def sources_of(database):
    return Sources(Journal(database), Checks(database), StatusQueries(database))


def read(url):
    return gather(sources_of(Database(url)), NAME, horizon_days=HORIZON_DAYS, now=NOW, as_of=TODAY)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'operations.db'}"


@pytest.fixture
def view(url):
    fill(url, NOW)
    return read(url)


def test_the_screen_says_how_the_loop_stands(view):
    lines = describe(view, AROUND)
    assert {line.name: line.text for line in lines} == {
        "serves": "version 3 for 40 days (since 2024-01-21 12:00 UTC)",
        "health": "http://127.0.0.1:3000 answers with version 3",
        "release": "version 4 in canary_5 for 2 days: 5% of the answers",
        "last check": "alert, 3 hours ago: version 3 as of 2024-03-01, 2,000 predictions\n"
        "  drift in the newest check: purchase_count_30d (0.25)",
        "drift": "1 of 3 distributions: purchase_count_30d 0.25",
        "estimated": "accuracy 81.0%, 85.0% on the reference rows",
        "real": "accuracy 74.7% of the last 150 outcomes; Brier score 0.150, 0.140 was expected",
        "money": "60,000 is at stake with 2,000 customers; 310 offers would bring about 2,501",
        "outcomes": "known of 75% of the predictions whose horizon has closed",
        "features": "of 2024-03-01, the data's clock says 2024-03-01",
        "retrainings": "1 failed, 1 registered; the last failed 5 days ago: outcomes",
    }
    styles = {line.name: line.style for line in lines}
    assert (styles["health"], styles["last check"], styles["drift"]) == (GOOD, BAD, LOOK)
    assert styles["retrainings"] == BAD


def test_without_a_value_nothing_is_said_of_money(view):
    assert "money" not in {line.name for line in describe(dataclasses.replace(view, money={}), AROUND)}


def test_the_screen_of_a_loop_that_has_not_begun(url):
    Database(url).upgrade()
    shown = {line.name: line.text for line in describe(read(url), Surroundings(SERVICE, None))}
    assert shown["serves"] == "nothing was released yet"
    assert shown["health"] == "no answer from http://127.0.0.1:3000"


def test_the_screen_of_a_folder_without_a_store_says_the_same(url):
    nothing = describe_nothing(NAME, horizon_days=HORIZON_DAYS, now=NOW, as_of=TODAY)
    shown = describe(nothing, Surroundings(SERVICE, None))
    Database(url).upgrade()
    assert shown == describe(read(url), Surroundings(SERVICE, None))


@pytest.mark.parametrize(
    ("service", "text"),
    [
        (ServiceHealth("2", NAME), f"{SERVICE} answers with version 2"),
        (ServiceHealth("", NAME), f"{SERVICE} answers and has no model yet"),
        (ServiceHealth("3", "telco_churn"), f"{SERVICE} answers, but it is the service of telco_churn"),
        (ServiceHealth("", "telco_churn"), f"{SERVICE} answers, but it is the service of telco_churn"),
        (ServiceHealth(), f"{SERVICE} answers, but it is another program"),
        (None, f"no answer from {SERVICE}"),
    ],
)
def test_a_service_that_answers_with_something_else_is_seen(view, service, text):
    lines = describe(view, dataclasses.replace(AROUND, service=service))
    assert {line.text: line.style for line in lines}[text] == BAD


def test_the_same_version_of_another_store_is_told_by_its_digest(view):
    row = msgspec.structs.replace(view.row, digests={"3": "d" * 64})
    known = dataclasses.replace(view, row=row)
    assert {line.name: line.style for line in describe(known, AROUND)}["health"] == GOOD
    other = dataclasses.replace(AROUND, service=ServiceHealth("3", NAME, "e" * 64))
    health = {line.name: line for line in describe(known, other)}["health"]
    assert (health.text, health.style) == (
        f"{SERVICE} answers with version 3 of another store: its digest is not the released one's",
        BAD,
    )
    assert find_next_step(dataclasses.replace(known, rollout=None, retraining=None), other).command == "doctor"


def test_without_a_label_rule_outcomes_are_reported_and_no_horizon_is_named(view):
    table = dataclasses.replace(view, **QUIETLY | {"labelled": Share(0, 2), "horizon_days": None})
    assert {line.name: line.text for line in describe(table, AROUND)}["outcomes"] == "known of 0% of the predictions"
    assert find_next_step(table, AROUND).text.endswith(f"POST {SERVICE}/outcomes")


def test_records_of_another_clock_are_dated_and_a_replay_is_told_apart(view):
    ahead = dataclasses.replace(view, check=dataclasses.replace(QUIET, recorded_at=NOW + 699 * DAY))
    text = {line.name: line.text for line in describe(ahead, AROUND)}["last check"]
    assert text.startswith("none, on 2026-01-29: version 3")
    step = find_next_step(ahead, dataclasses.replace(AROUND, is_replayed=True))
    assert step == ("nothing is due: a replay has ended here, and loop.html tells it", "")


QUIET = check(TODAY, verdict="none", recorded_at=NOW - DAY / 2)
ASKED = Retraining("t1", NAME, "monitor", "drift", NOW, NOW)
QUIETLY = {
    "rollout": None,
    "retraining": None,
    "check": QUIET,
    "labelled": Share(9, 10),
    "predicted_at": NOW,
    "unchecked_at": None,
}
OLD, TALKED = NOW - 40 * DAY, NOW - 14 * dt.timedelta(hours=1)
LIVE = {"is_live": True}


# What the store says, what stands beside it, and what is to be typed ("": nothing).
STATES = {
    "nothing has run": ({"row": None}, {"service": None}, "run"),
    "a gate refused the first model": ({"row": None}, {"stopped_by": "the data gate (x)"}, "run"),
    "registered, not released": ({"row": None}, {"registered": "7"}, "release promote 7"),
    "registered before a gate refused": (
        {"row": None},
        {"registered": "7", "stopped_by": "the gate accuracy (x)"},
        "release promote 7",
    ),
    "nothing serves": ({}, {"service": None}, "serve"),
    "nothing serves, a release is open": ({"rollout": "open"}, {"service": None}, "serve"),
    "another data set's service has the port": (
        {},
        {"service": ServiceHealth("3", "telco_churn", "d" * 64)},
        "serve --port 3001 --metrics-port 3002",
    ),
    "another program has the port": ({}, {"service": ServiceHealth()}, "serve --port 3001 --metrics-port 3002"),
    "a service that names no model": ({}, {"service": ServiceHealth("3")}, ""),
    "the service has loaded nothing": ({}, {"service": ServiceHealth("", NAME)}, "doctor"),
    "the service has another version": ({}, {"service": ServiceHealth("2", NAME)}, "doctor"),
    "all is well": ({}, {}, ""),
    "all is well in production": ({}, LIVE, ""),
    "a retraining is asked for": ({"retraining": ASKED}, {}, "retrain --trigger-id t1"),
    "a retraining failed": (
        {"retraining": dataclasses.replace(ASKED, state="failed", detail="ingest: no such file")},
        {},
        "retrain --trigger-id t1",
    ),
    "a retraining runs": ({"retraining": dataclasses.replace(ASKED, state="running")}, {}, ""),
    "a retraining was ended": (
        {"retraining": dataclasses.replace(ASKED, state="running", updated_at=NOW - DAY)},
        {},
        "retrain --trigger-id t1",
    ),
    "a retraining was refused": ({"retraining": dataclasses.replace(ASKED, state="refused")}, {}, ""),
    "a release is open": ({"rollout": "open"}, {}, "release check"),
    "a version waits": ({"waiting": "5"}, {}, "release start 5"),
    "no prediction yet": ({"predicted_at": None, "check": None}, {}, "demo"),
    "no prediction yet in production": ({"predicted_at": None, "check": None}, LIVE, ""),
    "predictions of today alone": ({"check": None}, LIVE, ""),
    "predictions newer than the data": ({"check": None}, {}, "demo"),
    "predictions to check": ({"check": None, "unchecked_at": TALKED}, {}, "monitor --as-of 2024-03-01"),
    "predictions to check in production": ({"check": None, "unchecked_at": TALKED}, LIVE, "monitor --as-of 2024-03-01"),
    "checked as of this date already": ({"unchecked_at": TALKED, "check": check(TODAY, verdict="none")}, {}, ""),
    "checked yesterday evening": (
        {"unchecked_at": TALKED, "check": check(TODAY - DAY, verdict="none", recorded_at=NOW - DAY)},
        LIVE,
        "",
    ),
    "checked two days ago": (
        {"unchecked_at": TALKED, "check": check(TODAY - 2 * DAY, verdict="none", recorded_at=NOW - 2 * DAY)},
        LIVE,
        "monitor --as-of 2024-03-01",
    ),
    "checked long ago, and nothing since": (
        {"check": check(TODAY - 2 * DAY, verdict="none", recorded_at=NOW - 2 * DAY)},
        LIVE,
        "",
    ),
    "a demo's check of long ago by the wall": (
        {"check": check(TODAY, verdict="none", recorded_at=NOW + 699 * DAY), "now": NOW + 701 * DAY},
        {},
        "",
    ),
    "the monitor watches": ({"check": dataclasses.replace(QUIET, verdict="watch")}, {}, ""),
    "the monitor alerts": ({"check": dataclasses.replace(QUIET, verdict="alert")}, {}, ""),
    "outcomes have closed": ({"labelled": Share(4, 10)}, {}, "outcomes --as-of 2024-03-01"),
    "every horizon is open": ({"labelled": Share(0, 0)}, {}, ""),
    "a replay ended here": ({}, {"is_replayed": True, "service": None}, ""),
}


@pytest.mark.parametrize(("changes", "beside", "command"), STATES.values(), ids=STATES)
def test_the_next_step_is_a_command_of_ours_that_fits(view, changes, beside, command):
    if changes.get("rollout") == "open":
        changes = changes | {"rollout": view.rollout}
    now = dataclasses.replace(view, **QUIETLY | changes)
    step = find_next_step(now, dataclasses.replace(AROUND, **beside))
    assert step.command == command, step
    assert step.text
    if command:
        parse(command)


def test_a_service_that_has_just_started_is_waited_for(view):
    step = find_next_step(
        dataclasses.replace(view, **QUIETLY), dataclasses.replace(AROUND, service=ServiceHealth("", NAME))
    )
    assert step.text.startswith("wait until the service has loaded version 3")


def parse(command: str) -> None:
    """Read a command line as it would be read, and run nothing."""
    found, words = typer.main.get_command(app), shlex.split(command)
    while hasattr(found, "commands"):
        found = found.commands[words.pop(0)]
    found.make_context("closedloop", words)


def test_an_alert_about_the_version_before_is_nobodys_next_step(view):
    before = dataclasses.replace(QUIET, verdict="alert", model_version="2")
    assert find_next_step(dataclasses.replace(view, **QUIETLY | {"check": before}), AROUND).text == "nothing is due"
    still = dataclasses.replace(before, model_version="3")
    step = find_next_step(dataclasses.replace(view, **QUIETLY | {"check": still}), AROUND)
    assert step.text == "judge the monitor's reasons: docs/runbook.md#modelsuspect"


def test_predictions_that_no_check_has_seen_are_found(url):
    fill(url, NOW)
    database = Database(url)
    assert read(url).predicted_at == NOW - dt.timedelta(hours=1)
    assert read(url).unchecked_at is None  # those of today are checked from tomorrow on
    Predictions(database).insert([predict(9_000, TODAY - dt.timedelta(hours=3), features_as_of=None)])
    assert read(url).unchecked_at is None  # it carried its features: nothing counts it
    clock = TODAY + DAY
    later = gather(sources_of(database), NAME, horizon_days=HORIZON_DAYS, now=NOW + DAY, as_of=clock)
    assert later.unchecked_at == NOW - dt.timedelta(hours=1)
    Checks(database).record_check(check(clock, verdict="none"))
    assert gather(sources_of(database), NAME, horizon_days=HORIZON_DAYS, now=NOW, as_of=clock).unchecked_at is None


def test_a_retrained_version_waits_until_it_was_released(url):
    fill(url, NOW)
    checks = Checks(Database(url))
    for trigger, version in (("known", "4"), ("new", "5")):
        asked = dataclasses.replace(ASKED, trigger_id=trigger, as_of=NOW + DAY * int(version))
        checks.request_retraining(dataclasses.replace(asked, state="registered", model_version=version))
        assert read(url).waiting == (None if version == "4" else "5")


@pytest.mark.parametrize(
    ("ago", "said"),
    [
        (dt.timedelta(seconds=-5), "a minute"),
        (dt.timedelta(seconds=119), "a minute"),
        (dt.timedelta(minutes=2), "2 minutes"),
        (dt.timedelta(minutes=119), "119 minutes"),
        (dt.timedelta(hours=47), "47 hours"),
        (dt.timedelta(hours=48), "2 days"),
    ],
)
def test_how_long_ago(view, ago, said):
    shown = dataclasses.replace(view, check=dataclasses.replace(QUIET, recorded_at=NOW - ago))
    assert f"none, {said} ago" in {line.name: line.text for line in describe(shown, AROUND)}["last check"]


def test_a_monitor_that_cannot_tell_is_shown_and_sends_to_its_page(view):
    blind = dataclasses.replace(QUIET, verdict="cannot tell")
    shown = dataclasses.replace(view, **QUIETLY | {"check": blind})
    text, style = next((line.text, line.style) for line in describe(shown, AROUND) if line.name == "last check")
    assert text.startswith("cannot tell, ")
    assert style == LOOK
    assert "too little to judge by: docs/runbook.md#monitorblind" in find_next_step(shown, AROUND).text


def test_after_a_file_was_scored_nobody_is_told_that_no_features_were_ever_looked_up(view) -> None:
    scored = dataclasses.replace(view, features_as_of=None)
    said = {line.name: line.text for line in describe(scored, AROUND)}["features"]
    assert said == "none were looked up for the newest predictions, which came with theirs"
    before = dataclasses.replace(scored, predicted_at=None)
    assert {line.name: line.text for line in describe(before, AROUND)}["features"] == "none were looked up yet"


def test_a_level_without_a_service_is_offered_none(view) -> None:
    missing = {"serve": "serve", "demo": "serve", "retrain": "kfp"}
    lower = Surroundings(SERVICE, None, is_live=False, missing=missing)
    quiet = dataclasses.replace(view, **QUIETLY)
    assert find_next_step(quiet, Surroundings(SERVICE, None, is_live=False)).command == "serve"
    assert find_next_step(quiet, lower) == NextStep("nothing is due")
    assert {line.name: line.text for line in describe(quiet, lower)}["health"] == (
        "no service: closedloop[serve] is not installed"
    )
    fresh = dataclasses.replace(quiet, predicted_at=None, unchecked_at=None, check=None)
    assert find_next_step(fresh, lower) == NextStep("nothing is due; to serve the model, install closedloop[serve]")
    asked = find_next_step(dataclasses.replace(quiet, retraining=ASKED), lower)
    assert asked.text == "run the retraining that was asked for (install closedloop[kfp] first)"


def test_a_run_that_failed_has_no_results_and_one_that_a_gate_stopped_has(tmp_path) -> None:
    files = {
        "failed": ("params.yaml", "{}"),
        "stopped": ("metrics/data_quality.json", '{"failed_critical": 1}'),
        "broken-later": ("metrics/data_quality.json", '{"failed_critical": 0}'),
        "trained": ("metrics/train_metrics.json", "{}"),
    }
    for name, (file, text) in files.items():
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).write_text(text, encoding="utf-8")
    (tmp_path / "loop/shop").mkdir(parents=True)
    assert list_with_results(tmp_path) == ["stopped", "trained"]


def test_where_another_data_set_has_results_its_status_is_the_next_step() -> None:
    """Whoever brought data of their own need not train the shop first."""
    around = Surroundings(SERVICE, None, others=("members", "telco"))
    nothing = describe_nothing(NAME, horizon_days=HORIZON_DAYS, now=NOW, as_of=TODAY)
    assert find_next_step(nothing, around).command == "--dataset members status"
    assert find_next_step(nothing, Surroundings(SERVICE, None)).command == "run"
