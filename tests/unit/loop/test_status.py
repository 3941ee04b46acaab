"""The one screen: what it says of a loop, and which step it names as the next."""

from __future__ import annotations

import dataclasses
import datetime as dt

import pytest

from closedloop.adapters.checks import Checks, Retraining
from closedloop.adapters.figures import Figures, Share
from closedloop.adapters.journal import Journal
from closedloop.adapters.store import Store
from closedloop.loop.overview import Sources, gather
from closedloop.loop.status import BAD, GOOD, LOOK, describe, find_next_step
from tests.loops import DAY, HORIZON_DAYS, NAME, check, fill

NOW = dt.datetime(2024, 3, 1, 12, tzinfo=dt.UTC)
TODAY = NOW.replace(hour=0)
SERVICE = "http://127.0.0.1:3000"


def read(url):
    sources = Sources(Store(url), Journal(url), Checks(url), Figures(url))
    return gather(sources, NAME, horizon_days=HORIZON_DAYS, now=NOW, as_of=TODAY)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'operations.db'}"


@pytest.fixture
def view(url):
    fill(url, NOW)
    return read(url)


def test_the_screen_says_how_the_loop_stands(view):
    lines = describe(view, SERVICE, "3")
    assert {line.name: line.text for line in lines} == {
        "serves": "version 3 for 40 days (since 2024-01-21 12:00 UTC)",
        "health": "http://127.0.0.1:3000 answers with version 3",
        "release": "version 4 in canary_5 for 2 days: 5% of the answers",
        "last check": "alert, 3 hours ago: version 3 as of 2024-03-01, 2,000 predictions\n"
        "  drift in 1 of the last 1 checks: purchase_count_30d (0.25)",
        "drift": "1 of 3 distributions: purchase_count_30d 0.25",
        "estimated": "accuracy 81.0%, 85.0% on the reference rows",
        "real": "accuracy 74.7% of the last 150 outcomes; Brier score 0.150, 0.140 was expected",
        "outcomes": "known of 75% of the predictions whose horizon has closed",
        "features": "of 2024-03-01, the data's clock says 2024-03-01",
        "retrainings": "1 failed, 1 registered; the last failed 5 days ago: outcomes",
        "next": "closedloop retrain --trigger-id newest",
    }
    styles = {line.name: line.style for line in lines}
    assert (styles["health"], styles["last check"], styles["drift"]) == (GOOD, BAD, LOOK)
    assert styles["retrainings"] == BAD


def test_the_screen_of_a_loop_that_has_not_begun(url):
    Store(url).upgrade()
    shown = {line.name: line.text for line in describe(read(url), SERVICE, None)}
    assert shown["serves"] == "nothing was released yet"
    assert shown["health"] == "no answer from http://127.0.0.1:3000"
    assert shown["next"] == "closedloop run, then closedloop release promote VERSION"


@pytest.mark.parametrize(
    ("answering", "text"),
    [("2", "http://127.0.0.1:3000 answers with version 2"), ("", "http://127.0.0.1:3000 answers with version none")],
)
def test_a_service_that_answers_with_another_version_is_seen(view, answering, text):
    assert {line.text: line.style for line in describe(view, SERVICE, answering)}[text] == BAD


QUIET = check(TODAY, verdict="none", recorded_at=NOW - DAY / 2)
ASKED = Retraining("t1", NAME, "monitor", "drift", NOW, NOW)


@pytest.mark.parametrize(
    ("changes", "answering", "step"),
    [
        ({"row": None}, None, "closedloop run, then closedloop release promote VERSION"),
        ({}, None, "closedloop serve"),
        ({}, "3", "nothing is due"),
        ({"retraining": ASKED}, "3", "closedloop retrain --trigger-id t1"),
        ({"retraining": dataclasses.replace(ASKED, state="running")}, "3", "wait for the retraining t1"),
        ({"retraining": dataclasses.replace(ASKED, state="refused")}, "3", "nothing is due"),
        ({"waiting": "5"}, "3", "closedloop release start 5"),
        ({"check": None}, "3", "closedloop monitor --as-of 2024-03-01"),
        (
            {"check": dataclasses.replace(QUIET, recorded_at=NOW - 2 * DAY)},
            "3",
            "closedloop monitor --as-of 2024-03-01",
        ),
        ({"check": dataclasses.replace(QUIET, verdict="watch")}, "3", "nothing is due"),
        (
            {"check": dataclasses.replace(QUIET, verdict="alert")},
            "3",
            "judge the monitor's reasons: docs/runbook.md#modelsuspect",
        ),
        ({"labelled": Share(4, 10)}, "3", "closedloop outcomes --as-of 2024-03-01"),
        ({"labelled": Share(0, 0)}, "3", "nothing is due"),
    ],
)
def test_the_most_urgent_step_is_named(view, changes, answering, step):
    still = dataclasses.replace(view, rollout=None, retraining=None, check=QUIET, labelled=Share(9, 10))
    assert find_next_step(dataclasses.replace(still, **changes), answering) == step


def test_a_release_under_way_comes_before_the_monitor(view):
    quiet = dataclasses.replace(view, retraining=None)
    assert find_next_step(quiet, "3").startswith("closedloop release check")


def test_a_retrained_version_waits_until_it_was_released(url):
    fill(url, NOW)
    checks = Checks(url)
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
    assert f"none, {said} ago" in {line.name: line.text for line in describe(shown, SERVICE, "3")}["last check"]
