"""What Prometheus is shown of a loop whose figures are known."""

from __future__ import annotations

import dataclasses
import datetime as dt
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from closedloop.errors import ServiceUnavailable
from closedloop.loop.status.exporter import GAUGES, build_registry
from closedloop.loop.status.overview import Overview, Sources, gather
from closedloop.records import Outcome
from closedloop.store.checks import Checks
from closedloop.store.database import Database
from closedloop.store.journal import Journal
from closedloop.store.predictions import Predictions
from closedloop.store.status_queries import Share, StatusQueries
from tests.loops import DAY, HORIZON_DAYS, NAME, check, fill, predict

NOW = dt.datetime(2024, 3, 1, 12, tzinfo=dt.UTC)
TODAY = NOW.replace(hour=0)
CLOSED_BY = TODAY - HORIZON_DAYS * DAY

NOTHING = dict.fromkeys(field.name for field in dataclasses.fields(Overview))
EMPTY = Overview(
    **NOTHING
    | {"model_name": NAME, "now": NOW, "as_of": NOW, "accuracy": Share(), "labelled": Share()}
    | {part: {} for part in ("drift", "estimate", "realised", "money", "retrainings")}
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'operations.db'}"


def scrape(url, now=NOW):
    from prometheus_client import generate_latest

    database = Database(url)
    sources = Sources(Journal(database), Checks(database), StatusQueries(database))
    registry = build_registry(lambda: gather(sources, NAME, horizon_days=HORIZON_DAYS, now=now, as_of=TODAY))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def test_every_figure_is_what_the_store_says(url):
    fill(url, NOW)
    found = scrape(url)
    assert {name for name, *_ in found} == set(GAUGES)
    hour = 3_600.0
    assert found == {
        ("operations_store_up",): 1,
        ("model_champion_info", "3"): 1,
        ("model_champion_age_seconds",): 40 * 24 * hour,
        ("model_release_step_info", "4", "canary_5"): 1,
        ("model_release_step_age_seconds",): 48 * hour,
        ("model_release_look_age_seconds",): 48 * hour,
        ("model_release_weight",): 0.05,
        ("monitor_check_age_seconds",): 3 * hour,
        ("monitor_judged_age_seconds",): 0,
        ("monitor_check_predictions",): 2_000,
        ("monitor_verdict", "none"): 0,
        ("monitor_verdict", "watch"): 0,
        ("monitor_verdict", "alert"): 1,
        ("monitor_verdict", "retrain"): 0,
        ("monitor_verdict", "cannot tell"): 0,
        ("data_drift_score", "purchase_count_30d"): 0.25,
        ("data_drift_score", "age"): 0.02,
        ("data_drift_score", "score"): 0.08,
        ("data_drift_alarm", "purchase_count_30d"): 1,
        ("data_drift_alarm", "age"): 0,
        ("data_drift_alarm", "score"): 0,
        ("model_accuracy_estimated",): 0.81,
        ("model_accuracy_reference",): 0.85,
        ("model_accuracy_rolling",): 112 / 150,
        ("model_brier_realised",): 0.15,
        ("model_brier_expected",): 0.14,
        ("money_at_stake",): 60_000.4,
        ("money_offers",): 310,
        ("money_expected_profit",): 2_500.6,
        ("label_maturity_ratio",): 0.75,
        ("feature_age_seconds",): 0,
        ("model_retrainings", "requested"): 0,
        ("model_retrainings", "running"): 0,
        ("model_retrainings", "registered"): 1,
        ("model_retrainings", "refused"): 0,
        ("model_retrainings", "failed"): 1,
        ("model_retraining_state", "requested"): 0,
        ("model_retraining_state", "running"): 0,
        ("model_retraining_state", "registered"): 0,
        ("model_retraining_state", "refused"): 0,
        ("model_retraining_state", "failed"): 1,
        ("model_retraining_open_age_seconds",): 0,
    }


def test_the_monitor_was_blind_since_a_check_had_enough_to_judge_by(url):
    fill(url, NOW)
    judged_at = {"judged_at": (TODAY - 30 * DAY).isoformat()}
    with closing(Database(url)) as database:
        Checks(database).record_check(check(TODAY + 31 * DAY, verdict="cannot tell", evidence=judged_at))
    found = scrape(url, now=NOW + 31 * DAY)
    assert found["monitor_judged_age_seconds",] == 61 * 24 * 3_600
    assert found["monitor_verdict", "cannot tell"] == 1


def test_a_release_was_last_looked_at_when_a_pass_judged_it(url):
    fill(url, NOW)
    for hours in (60, 1):  # one before its step began, and one since
        Journal(Database(url)).note_pass(NAME, NOW - dt.timedelta(hours=hours))
        assert scrape(url)["model_release_look_age_seconds",] == min(hours, 48) * 3_600


@pytest.mark.parametrize(("outcomes", "shown"), [(99, False), (100, True)])
def test_the_rolling_accuracy_needs_100_outcomes(url, outcomes, shown):
    fill(url, NOW, outcomes=outcomes)
    assert (("model_accuracy_rolling",) in scrape(url)) == shown


def test_a_store_that_is_away_is_said_and_nothing_crashes(url):
    fill(url, NOW)
    Path(url.removeprefix("sqlite:///")).write_bytes(b"no database" * 100)
    assert scrape(url) == {("operations_store_up",): 0}


def test_a_store_that_comes_back_is_read_again():
    answers = iter([ServiceUnavailable("away"), EMPTY])

    def read():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    registry = build_registry(read)
    assert [registry.get_sample_value("operations_store_up") for _ in range(2)] == [0, 1]


def test_nothing_is_shown_of_a_loop_that_has_not_begun(url):
    Database(url).upgrade()
    found = scrape(url)
    assert {name for name, *_ in found} == {
        "operations_store_up",
        "model_retrainings",
        "model_retraining_open_age_seconds",
    }


def test_the_evidence_of_another_version_is_not_the_champions(url):
    fill(url, NOW)
    checks = Checks(Database(url))
    checks.record_check(check(TODAY + DAY, model_version="2", verdict="none", recorded_at=NOW, evidence={"drift": {}}))
    found = scrape(url)
    assert found["monitor_verdict", "none"] == 1
    assert found["data_drift_score", "purchase_count_30d"] == 0.25


def test_rolling_accuracy_counts_what_it_should(url):
    store, figures = Predictions(Database(url)), StatusQueries(Database(url))
    store.database.upgrade()
    at = CLOSED_BY - DAY
    rows = [
        predict(1, at),  # right
        predict(2, at, customer_id="C1"),  # of the same customer and snapshot: not the first, though its outcome is
        predict(3, at, variant="shadow"),
        predict(4, at, forced=True),
        predict(5, at, model_version="2"),
        predict(6, CLOSED_BY + DAY),  # its horizon is open
        predict(7, at, customer_id=None),  # wrong
        predict(8, at, customer_id=None),  # right, and corrected later: the first report counts
    ]
    reports = [(2, 0), (1, 1), (3, 0), (4, 0), (5, 0), (6, 0), (7, 0), (8, 1)]
    store.insert([*rows, *[Outcome(f"{number:048x}", truth, NOW) for number, truth in reports]])
    store.insert([Outcome(f"{8:048x}", 0, NOW + DAY)])
    assert figures.measure_accuracy(NAME, "3", closed_by=CLOSED_BY) == Share(2, 3)
    assert figures.measure_accuracy("another", "3", closed_by=CLOSED_BY) == Share(0, 0)


def test_the_newest_thousand_outcomes_count(url):
    store, figures = Predictions(Database(url)), StatusQueries(Database(url))
    store.database.upgrade()
    rows = [predict(number, CLOSED_BY) for number in range(1_200)]
    store.insert(rows)
    store.insert([Outcome(one.prediction_id, int(n >= 250), NOW) for n, one in enumerate(rows)])  # the oldest are wrong
    assert figures.measure_accuracy(NAME, "3", closed_by=CLOSED_BY) == Share(950, 1_000)


def test_maturity_leaves_open_horizons_out(url):
    store, figures = Predictions(Database(url)), StatusQueries(Database(url))
    store.database.upgrade()
    rows = [predict(number, CLOSED_BY - number % 3 * DAY) for number in range(30)]
    later = [predict(number, CLOSED_BY + DAY) for number in range(100, 120)]
    shadows = [predict(number, CLOSED_BY, variant="shadow") for number in range(200, 220)]
    store.insert([*rows, *later, *shadows, *[Outcome(one.prediction_id, 1, NOW) for one in (*rows[:12], *later)]])
    assert figures.measure_maturity(NAME, closed_by=CLOSED_BY) == Share(12, 30)
    assert figures.read_features_as_of(NAME) == CLOSED_BY + DAY
