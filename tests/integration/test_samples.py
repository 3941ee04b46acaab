"""What the monitor reads, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa

from closedloop.records import LABEL_RULE, Outcome, Prediction, digest_position
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from closedloop.store.samples import Samples
from closedloop.store.status_queries import StatusQueries
from tests.services import PostgresServer

pytestmark = pytest.mark.thorough

DAY = dt.timedelta(days=1)
START = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
MODEL = "shop_churn"
FEATURES = ("spend", "plan")


@pytest.fixture
def store(database: str) -> Iterator[Predictions]:
    made = Predictions(Database(database))
    made.database.upgrade()
    with made.database.begin() as connection:
        connection.execute(sa.text("DELETE FROM outcomes"))
        connection.execute(sa.text("DELETE FROM predictions"))
    yield made
    made.database.close()


@pytest.fixture
def samples(store: Predictions, database: str) -> Iterator[Samples]:
    made = Samples(Database(database))
    yield made
    made.database.close()


def predict(name: str, *, hours: float = 0, **changes: Any) -> Prediction:
    values: dict[str, Any] = {
        "request_id": "r",
        "model_name": MODEL,
        "model_version": "7",
        "variant": "champion",
        "source": "http",
        "predicted_at": START + hours * dt.timedelta(hours=1),
        "features": (1.5, None),
        "score": 0.25,
        "decision": 0,
        "latency_ms": 0.5,
        "customer_id": f"customer {name}",
        "features_as_of": START,
    }
    return Prediction(name, **(values | changes))


def draw(samples: Samples, rows_max: int = 1_000, since: dt.datetime = START, until: dt.datetime = START + DAY) -> Any:
    return samples.sample_window(MODEL, "7", FEATURES, since=since, until=until, rows_max=rows_max)


def close(samples: Samples, rows_max: int = 1_000) -> Any:
    return samples.sample_outcomes(MODEL, "7", after=START - DAY, until=START, rows_max=rows_max)


def test_a_window_holds_what_one_version_answered(samples: Samples, store: Predictions) -> None:
    store.insert(
        [
            predict("a"),
            predict("b", hours=23.9, features=(2.5, "plus"), score=0.75, decision=1),
            predict("late", hours=24),
            predict("early", hours=-0.1),
            predict("other version", model_version="8"),
            predict("other model", model_name="telco_churn"),
            predict("shadow", variant="shadow", answered_id="a"),
            predict("forced", forced=True),
        ]
    )
    found = draw(samples)
    assert found.predictions == 5  # of the model, of whatever version
    assert found.rows.sort_values("customer_id").to_dict("list") == {
        "spend": [1.5, 2.5],
        "plan": [None, "plus"],
        "customer_id": ["customer a", "customer b"],
        "score": [0.25, 0.75],
        "decision": [0, 1],
        "client": [None, None],
    }


def test_a_customer_counts_once_in_a_window_and_by_the_first(samples: Samples, store: Predictions) -> None:
    again = {"customer_id": "ann", "features_as_of": START + DAY}
    store.insert([predict("a", customer_id="ann", hours=2), predict("b", hours=1, score=0.5, **again)])
    store.insert([predict("c", customer_id="ann", hours=-2, score=0.9), predict("x", customer_id=None)])
    store.insert([predict("y", customer_id=None), predict("d", customer_id="ann", variant="shadow", hours=0.5)])
    found = draw(samples)
    assert sorted(found.rows["score"]) == [0.25, 0.25, 0.5]
    assert found.rows["customer_id"].notna().sum() == 1


def test_a_large_window_is_a_fair_draw_of_bounded_size(samples: Samples, store: Predictions) -> None:
    """Half of the customers come five times as often, and are drawn no more often for it."""
    records = []
    for number in range(2_000):
        for visit in range(5 if number % 2 else 1):
            values = {"score": float(number % 2), "hours": visit, "customer_id": f"c{number}"}
            records.append(predict(digest_position("row", number, visit), **values))
    store.insert(records)
    found = draw(samples, rows_max=1_500)
    assert found.predictions == 6_000
    assert 400 < len(found.rows) < 600  # a quarter of 2,000 customers
    assert 0.4 < found.rows["score"].mean() < 0.6
    assert draw(samples, rows_max=1_500).rows.equals(found.rows)


def test_customers_who_ask_again_and_again_leave_a_sample_all_the_same(samples: Samples, store: Predictions) -> None:
    """Each once, by the first: of a small draw nearly nothing would be left, and a busy service be judged by nobody."""
    asked = [digest_position(str(number)) for number in range(2_400)]
    store.insert([predict(name, hours=n / 101, customer_id=f"customer {n % 60}") for n, name in enumerate(asked)])
    sample = draw(samples, rows_max=50)
    assert sample.predictions == 2_400
    third = f"{16**8 // 3:08x}"  # 16 times 50 of 2,400
    firsts = [n for n, name in enumerate(asked[:60]) if name < third]
    assert sorted(sample.rows["customer_id"]) == sorted(f"customer {n}" for n in firsts)
    assert len(firsts) >= 12
    many = draw(samples, rows_max=1_000)
    assert len(many.rows) == 60


def test_outcomes_are_those_of_closed_snapshots_once_a_customer(samples: Samples, store: Predictions) -> None:
    other = START - DAY
    store.insert(
        [
            predict("a", customer_id="ann", score=0.1),  # nobody reported of this one, but of the next
            predict("b", customer_id="ann", hours=1, score=0.2),
            predict("c", customer_id="ann", hours=2, score=0.3),
            predict("d", customer_id="bob", score=0.4),
            predict("open", features_as_of=START + DAY),
            predict("judged before", features_as_of=other),
            predict("unknown"),
        ]
    )
    reported = [("c", 1), ("b", 1), ("b", 0), ("d", 0), ("open", 1), ("judged before", 1)]
    store.insert([Outcome(name, outcome, START + (40 + place) * DAY) for place, (name, outcome) in enumerate(reported)])
    found = close(samples)
    assert found.rows.sort_values("score")[["customer_id", "score", "outcome"]].to_numpy().tolist() == [
        ["ann", 0.2, 1],
        ["bob", 0.4, 0],
    ]
    assert found.predictions == 5


def test_of_several_outcomes_the_first_that_was_reported_counts_in_whatever_order_they_arrive(
    samples: Samples, store: Predictions
) -> None:
    store.insert([predict("a", score=0.9)])
    store.insert([Outcome("a", 0, START + 41 * DAY), Outcome("a", 1, START + 40 * DAY)])
    assert close(samples).rows["outcome"].tolist() == [1]


def test_the_label_rule_has_the_last_word_whoever_reported_before(samples: Samples, store: Predictions) -> None:
    store.insert([predict("a", score=0.9)])
    store.insert([Outcome("a", 0, START + 2 * DAY, "0badc0de")])
    assert close(samples).rows[["outcome", "reported_by"]].to_numpy().tolist() == [[0, "0badc0de"]]
    store.insert([Outcome("a", 1, START + 30 * DAY, LABEL_RULE)])
    assert close(samples).rows[["outcome", "reported_by"]].to_numpy().tolist() == [[1, LABEL_RULE]]
    known = store.list_outcomes(MODEL, as_of=START + 40 * DAY, horizon_days=30)
    assert known[["outcome", "reported_by"]].to_numpy().tolist() == [[1, LABEL_RULE]]
    assert StatusQueries(samples.database).measure_accuracy(MODEL, "7", closed_by=START).part == 0  # its decision was 0


def test_requests_that_carried_their_features_are_in_no_sample(samples: Samples, store: Predictions) -> None:
    sent = {"features_as_of": None, "hours": 1.0}
    store.insert([predict("a"), predict("x", **sent), predict("y", customer_id=None, **sent)])
    store.insert([predict("file", source="batch", **sent)])
    assert sorted(draw(samples).rows["customer_id"]) == ["customer a", "customer file"]
    store.insert([Outcome(name, 1, START + 40 * DAY) for name in ("a", "x", "y")])
    assert close(samples).rows["customer_id"].tolist() == ["customer a"]
    choice = {"as_of": START + 40 * DAY, "horizon_days": 30}
    assert len(store.list_outcomes(MODEL, **choice, sent_features=False)) == 1
    assert len(store.list_outcomes(MODEL, **choice, sent_features=True)) == 3
    assert len(draw(Samples(samples.database, sent_features=True)).rows) == 4
    figures = StatusQueries(samples.database)
    assert figures.measure_accuracy(MODEL, "7", closed_by=START).whole == 1
    assert figures.measure_maturity(MODEL, closed_by=START).whole == 2


def test_many_outcomes_are_drawn(samples: Samples, store: Predictions) -> None:
    names = [digest_position("row", number) for number in range(3_000)]
    store.insert([predict(name) for name in names])
    store.insert([Outcome(name, 1, START + 40 * DAY) for name in names])
    assert 400 < len(close(samples, rows_max=500).rows) < 600


def test_what_is_not_labelled_yet_is_listed(samples: Samples, store: Predictions) -> None:
    store.insert([predict("a"), predict("b"), predict("c", features_as_of=START - DAY), predict("n", customer_id=None)])
    store.insert([predict("s", variant="shadow", answered_id="a"), predict("later", features_as_of=START + DAY)])
    # what a client reports does not keep the rule from being asked
    store.insert([Outcome("b", 1, START + 40 * DAY, LABEL_RULE), Outcome("a", 1, START + 1 * DAY, "0badc0de")])
    assert samples.list_unlabelled_snapshots(MODEL, until=START) == [START - DAY, START]
    assert list(samples.read_unlabelled(MODEL, START)) == [[("a", "customer a")]]
    assert samples.list_unlabelled_snapshots("telco_churn", until=START) == []


def test_many_that_are_not_labelled_come_in_chunks(
    samples: Samples, store: Predictions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("closedloop.store.samples.CHUNK_ROWS", 5)
    store.insert([predict(f"{number:02}") for number in range(12)])
    assert [len(chunk) for chunk in samples.read_unlabelled(MODEL, START)] == [5, 5, 2]


def test_a_window_is_found_by_an_index_that_covers_it(samples: Samples, store: Predictions) -> None:
    """A scan of all rows, or of those of all times with low ids, would cost more the more is kept."""
    if samples.database.dialect != "sqlite":
        pytest.skip("PostgreSQL's planner goes by what is in the table; a table as small as this is scanned")
    plans: list[str] = []

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT") and "predictions" in statement:
            rows = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            plans.append(" / ".join(str(row[3]) for row in rows))

    store.insert([predict(digest_position("row", number)) for number in range(50)])
    sa.event.listen(samples.database.engine, "before_cursor_execute", explain)
    draw(samples, rows_max=10)
    close(samples, rows_max=10)
    assert len(plans) == 6  # no outcome is known: more is drawn twice
    assert "COVERING INDEX predictions_by_time" in plans[0]
    assert "predictions USING INDEX predictions_by_time" in plans[1]
    assert "COVERING INDEX predictions_by_snapshot" in plans[2]
    assert all("predictions USING INDEX predictions_by_snapshot" in plan for plan in plans[3:])
    assert all("predictions_by_customer" in plan for plan in (plans[1], *plans[3:]))


def test_nothing_goes_through_all_outcomes_where_postgresql_has_no_statistics(postgres: PostgresServer) -> None:
    """An index that gave it their order would be read from its start for each prediction: an hour for a million."""
    url, plans = postgres.create_database(), list[str]()
    names = [digest_position("row", number) for number in range(5_000)]
    with closing(Database(url)) as opened:
        store, samples, figures = Predictions(opened), Samples(opened), StatusQueries(opened)
        opened.upgrade()
        store.insert([predict(name) for name in names])
        store.insert([Outcome(name, 1, START + 40 * DAY) for name in names])

        def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            if statement.startswith("SELECT") and "outcomes" in statement:
                rows = cursor.connection.execute(f"EXPLAIN {statement}", parameters).fetchall()
                plans.append("\n".join(row[0] for row in rows))

        sa.event.listen(opened.engine, "before_cursor_execute", explain)
        assert len(close(samples, rows_max=20_000).rows) == 5_000
        assert figures.measure_accuracy(MODEL, "7", closed_by=START).whole == 1_000
    assert len(plans) == 2
    for plan in plans:
        of_first = re.findall(r"SubPlan \d+\n.*?Limit.*?(?=SubPlan|\Z)", plan, flags=re.DOTALL)
        assert of_first
        for subplan in of_first:
            assert "outcomes_once" in subplan
            assert "outcomes_pkey" not in subplan
