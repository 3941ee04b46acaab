"""Campaigns on SQLite and on a real PostgreSQL: one list a date, whoever starts at once and whatever dies when."""

from __future__ import annotations

import datetime as dt
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa

from closedloop.bootstrap import load_run
from closedloop.errors import DataError
from closedloop.loop.campaigns.start import CampaignRules, require_target, start_campaign, write_list
from closedloop.records import Outcome, Prediction
from closedloop.store.actions import Actions, Campaign
from closedloop.store.database import Database
from closedloop.store.migrations.tables import ACTIONS, CAMPAIGNS
from closedloop.store.predictions import Predictions, Removed
from tests.campaign_stores import empty_store
from tests.conftest import create_project

AS_OF = dt.datetime(2024, 3, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
MODEL = "shop_churn"
RULES = CampaignRules(90, 0.1)


@pytest.fixture
def url(database: str) -> str:
    return empty_store(database)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The shop's parameters and config."""
    root = create_project(tmp_path_factory.mktemp("project")).root
    return load_run(root / "params.yaml", root=root)


def score_people() -> pd.DataFrame:
    chances = np.random.default_rng(7).random(1_000)
    people = pd.DataFrame({"customer_id": [f"C{number}" for number in range(1_000)], "probability": chances})
    return people.assign(segment=["a", None] * 500, reasons="raises the risk: visits = 0")


def refuse(version: str) -> Any:
    raise AssertionError(f"nobody asked for the contract of version {version}")


def start(
    run: Any, actions: Actions, as_of: dt.datetime = AS_OF, rules: CampaignRules = RULES, **changes: Any
) -> Campaign:
    params = run.params.model_copy(update={"as_of": as_of.date()})
    fixed = {"version": "7", "score": score_people, "read_contract": refuse, "now": dt.datetime.now(dt.UTC)}
    given: dict[str, Any] = {**fixed, **changes}
    return start_campaign(actions, params, run.dataset, rules, **given)


def list_written(url: str, campaign: Campaign, target: Path) -> bytes:
    opened = Actions(Database(url))
    write_list(campaign, opened.list_actions(campaign), str(target))
    opened.database.close()
    return target.read_bytes()


def count(url: str) -> tuple[int, int]:
    """Campaigns and actions in the store."""
    opened = Database(url)
    with opened.begin(write=False) as connection:
        found = [connection.scalar(sa.select(sa.func.count()).select_from(table)) for table in (CAMPAIGNS, ACTIONS)]
    opened.close()
    return found[0] or 0, found[1] or 0


def test_what_is_started_comes_back_as_it_was(run: Any, url: str) -> None:
    actions = Actions(Database(url))
    made = start(run, actions)
    assert (made.treated, made.held_out, made.horizon_days, made.model_version) == (90, 10, 30, "7")
    assert actions.find_campaign(MODEL, AS_OF) == made == actions.list_campaigns(MODEL, until=AS_OF)[0]
    found = actions.list_actions(made)
    best = score_people().nlargest(100, "probability")
    assert [one.customer_id for one in found] == best["customer_id"].tolist()
    assert [one.probability for one in found] == best["probability"].tolist()
    assert {one.segment for one in found} == {"a", None}
    assert sum(one.arm == "held_out" for one in found) == 10

    def score_again() -> pd.DataFrame:
        raise AssertionError("nobody is scored for a campaign that is recorded")

    assert start(run, actions, score=score_again) == made
    with pytest.raises(
        DataError, match=r"was started with --capacity 90 --holdout 0\.1 --rank-by score, found 80, 0\.1 and score"
    ):
        start(run, actions, rules=CampaignRules(80, 0.1), score=score_again)
    actions.database.close()


def test_two_that_start_at_once_write_one_list(run: Any, url: str, tmp_path: Path) -> None:
    """Each has scored before the other has recorded, and with another model: the first to record is the campaign."""
    starters = [Actions(Database(url)) for _ in range(4)]
    barrier = multiprocessing.Barrier(len(starters))

    def begin(place: int) -> Campaign:
        def score() -> pd.DataFrame:
            people = score_people()
            barrier.wait(60)
            return people.assign(probability=np.roll(people["probability"], place))

        return start(run, starters[place], version=str(place + 1), score=score)

    with ThreadPoolExecutor(len(starters)) as pool:
        made = list(pool.map(begin, range(len(starters))))
    for one in starters:
        one.database.close()
    assert made == [made[0]] * 4
    assert count(url) == (1, 100)
    lists = {list_written(url, one, tmp_path / f"{place}.csv") for place, one in enumerate(made)}
    assert len(lists) == 1


def test_a_table_of_another_shape_is_refused_before_a_campaign_is_recorded(tmp_path: Path) -> None:
    engine = sa.create_engine(address := f"sqlite:///{tmp_path / 'club.db'}")
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE list (customer_id TEXT PRIMARY KEY)"))
    engine.dispose()
    with pytest.raises(DataError, match=r"list: it has the columns customer_id and .* with the primary key action_id"):
        require_target(f"{address}#list")
    require_target(f"{address}#another")


def start_and_die(run: Any, url: str, step: int) -> None:
    """Start a campaign, and kill this process before its ``step``-th statement or commit that writes."""
    actions, done = Actions(Database(url)), iter(range(1_000))

    def count_down(*_: Any) -> None:
        if next(done) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    for event in ("before_cursor_execute", "commit"):
        sa.event.listen(actions.database.engine, event, count_down)
    start(run, actions)


def test_a_start_that_is_killed_anywhere_leaves_all_or_nothing_and_the_next_one_finishes(
    run: Any, url: str, tmp_path: Path
) -> None:
    lists, ended = set(), []
    context = multiprocessing.get_context("fork")
    for step in range(30):
        opened = Database(url)
        with opened.begin() as connection:
            connection.execute(sa.delete(ACTIONS))
            connection.execute(sa.delete(CAMPAIGNS))
        opened.close()
        process = context.Process(target=start_and_die, args=(run, url, step))
        process.start()
        process.join(60)
        ended.append(process.exitcode)
        assert count(url) in ((0, 0), (1, 100))
        again = Actions(Database(url))
        made = start(run, again)
        again.database.close()
        assert count(url) == (1, 100)
        lists.add(list_written(url, made, tmp_path / "list.csv"))
        if process.exitcode == 0:
            break
    assert ended[-1] == 0
    assert set(ended[:-1]) == {-signal.SIGKILL}
    assert len(ended) > 5
    assert len(lists) == 1


def test_a_customer_is_in_no_second_campaign_before_the_first_has_ended(run: Any, url: str) -> None:
    actions = Actions(Database(url))
    first = start(run, actions)
    mine = {one.customer_id for one in actions.list_actions(first)}
    second = {one.customer_id for one in actions.list_actions(start(run, actions, AS_OF + 10 * DAY))}
    third = {one.customer_id for one in actions.list_actions(start(run, actions, AS_OF + 31 * DAY))}
    assert len(mine) == len(second) == len(third) == 100
    assert not mine & second
    assert not second & third
    assert third == mine  # the first one's horizon has closed by then
    actions.database.close()


def test_results_are_the_outcomes_of_the_campaigns_own_snapshot(run: Any, url: str) -> None:
    actions, store = Actions(Database(url)), Predictions(Database(url))
    made = start(run, actions)
    chosen = actions.list_actions(made)
    told = {chosen[0].customer_id: 1, chosen[1].customer_id: 0}
    fixed = ("r", MODEL, "7", "champion", "batch")
    for place, (who, outcome) in enumerate(told.items()):
        for days in (0, 5):  # what happened after another snapshot says nothing of the campaign
            name = f"{place}{days}"
            day = AS_OF + days * DAY
            store.insert([Prediction(name, *fixed, day, (1.0,), 0.5, 1, 0.1, customer_id=who)])
            store.insert([Outcome(name, outcome if days == 0 else 1 - outcome, day + 30 * DAY, "label rule")])
    found = actions.read_results(made)
    assert found["customer_id"].tolist() == [one.customer_id for one in chosen]
    assert found["outcome"].tolist()[:2] == [1, 0]
    assert found["outcome"].notna().sum() == 2
    actions.database.close()
    store.database.close()


@pytest.mark.parametrize("suffix", [".csv", ".parquet", "table"])
def test_the_list_is_written_where_it_is_wanted_and_the_same_again(
    run: Any, url: str, tmp_path: Path, suffix: str
) -> None:
    actions = Actions(Database(url))
    made = start(run, actions)
    chosen = actions.list_actions(made)
    target = f"sqlite:///{tmp_path / 'crm.db'}#calls" if suffix == "table" else str(tmp_path / f"list{suffix}")
    for _ in range(2):
        write_list(made, chosen, target)
    if suffix == "table":
        engine = sa.create_engine(target.partition("#")[0])
        found = pd.read_sql_query("SELECT * FROM calls ORDER BY place", engine)
        engine.dispose()
    else:
        found = pd.read_csv(target) if suffix == ".csv" else pd.read_parquet(target)
    assert found["customer_id"].tolist() == [one.customer_id for one in chosen]
    assert found["arm"].value_counts().to_dict() == {"treated": 90, "held_out": 10}
    assert found["action_id"].nunique() == 100
    assert set(found["campaign"]) == {"2024-03-01"}
    actions.database.close()


def test_erasing_a_customer_takes_the_actions_with_it(run: Any, url: str) -> None:
    actions, store = Actions(Database(url)), Predictions(Database(url))
    made = start(run, actions)
    chosen = actions.list_actions(made)
    weight = made.weight
    who = next(one.customer_id for one in chosen if one.arm == "held_out")
    assert store.erase(who) == Removed(0, 0, actions=1)
    assert [one.customer_id for one in actions.list_actions(made)] == [
        one.customer_id for one in chosen if one.customer_id != who
    ]
    left = actions.find_campaign(MODEL, AS_OF)
    assert left is not None
    assert left.weight == weight  # the others of the hold-out stand for as many as before
    assert store.erase(who) == Removed(0, 0)
    actions.database.close()
    store.database.close()


def test_outcomes_of_the_treated_say_nothing_of_a_canary(run: Any, url: str) -> None:
    actions, store = Actions(Database(url)), Predictions(Database(url))
    chosen = actions.list_actions(start(run, actions))
    arms = {one.arm: one.customer_id for one in chosen}
    fixed = ("r", MODEL, "7", "champion", "batch")
    for who in (arms["treated"], arms["held_out"], "somebody"):
        for days in (0, 40):  # an action touches no horizon that begins after its own
            day = AS_OF + days * DAY
            store.insert([Prediction(f"{who}{days}", *fixed, day, (1.0,), 0.5, 1, 0.1, customer_id=who)])
            store.insert([Outcome(f"{who}{days}", 1, day + 30 * DAY, "label rule")])
    known: dict[str, Any] = {"as_of": AS_OF + 100 * DAY, "horizon_days": 30}
    everybody = set(store.list_outcomes(MODEL, **known)["prediction_id"])
    untreated = set(store.list_outcomes(MODEL, **known, untreated=True)["prediction_id"])
    assert everybody - untreated == {f"{arms['treated']}0"}
    assert len(untreated) == 5
    actions.database.close()
    store.database.close()


def test_actions_are_read_for_the_snapshots_that_they_touch(run: Any, url: str) -> None:
    actions = Actions(Database(url))
    made = start(run, actions)

    def read(days: int, **customers: Any) -> pd.DataFrame:
        at = AS_OF + days * DAY
        return actions.read_touching(MODEL, since=at, until=at, **customers)

    assert [len(read(days)) for days in (-31, -30, -29, 0, 29, 30, 31)] == [0, 0, 100, 100, 100, 0, 0]
    found = read(0)
    assert set(found["weight"]) == {made.weight} == {10.0}
    assert found["acted_at"].unique().tolist() == [pd.Timestamp(AS_OF)]
    some = actions.list_actions(made)[0].customer_id
    assert read(0, customers={some, "nobody"})["customer_id"].tolist() == [some]
    assert len(actions.read_touching("another", until=AS_OF)) == 0
    actions.database.close()
