"""The commands of docs/actions.md about campaigns, on a shop with a champion: the list, its arms, and the report."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from closedloop.bootstrap import build_actions, build_predictions, load_run
from closedloop.records import Outcome
from closedloop.simulator.shop import Offers, SimulatorSpec, simulate
from closedloop.store.actions import Action, Campaign
from tests.conftest import Project

pytestmark = pytest.mark.thorough

PAGE = (Path(__file__).parents[2] / "docs" / "actions.md").read_text(encoding="utf-8")
SEGMENT = "standard"
NEXT = ("--as-of", "2024-02-06", "--capacity", "200", "--rank-by", "uplift")
VALUE = {"kept": {"amount_of_days": 30, "share": 0.4}, "offer_cost": 1, "save_rate": 0.3}


def read_commands() -> list[list[str]]:
    lines = re.findall(r"^closedloop (?:campaign|outcomes) .*", PAGE, re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines]


def test_the_walk_of_the_page(shop_copy: Project) -> None:
    """closedloop campaign start, closedloop outcomes, closedloop campaign report."""
    shop_copy.change_dataset("shop", {"value": VALUE})
    start, outcomes, report, by_uplift = read_commands()
    assert "500 customers to call, 56 left alone" in shop_copy.run(*start).output
    listed = pd.read_csv(shop_copy.root / "list.csv")
    assert listed["arm"].value_counts().to_dict() == {"treated": 500, "held_out": 56}
    assert (listed["expected_value"].diff().dropna() <= 0).all()
    assert (listed["expected_value"] > 0).all()
    assert listed["reasons"].str.contains(" the risk: ").all()
    first = (shop_copy.root / "list.csv").read_bytes()
    again = shop_copy.run(*start, "--json")
    assert "500 customers to call" in again.output
    assert (json.loads(again.stdout)["treated"], json.loads(again.stdout)["held_out"]) == (500, 56)
    assert (shop_copy.root / "list.csv").read_bytes() == first
    early = shop_copy.run("campaign", "report", "--as-of", "2024-01-30").output
    assert "too early: the outcomes are known from 2024-01-31 on" in early
    waiting = shop_copy.run(*report).output
    assert "too early: 556 of 556 customers have no outcome yet" in waiting
    shop_copy.run(*outcomes)
    told = shop_copy.run(*report).output
    found = json.loads(shop_copy.run(*report, "--json").stdout)
    effect = found["effect"]
    assert (effect["treated"], effect["held_out"]) == (500, 56)
    assert effect["effect"]["low"] < effect["effect"]["value"] < effect["effect"]["high"]
    assert f"net profit {effect['profit']['value']:+,.0f}" in told
    assert sum(one["treated"] for one in found["groups"]["segment"].values()) == 500
    assert Path(shop_copy.root / found["picture"]).read_bytes().startswith(b"\x89PNG")
    found = " ".join(shop_copy.run(*by_uplift).output.split())
    assert "ranked by expected value: too few: 56 customers held out in closed campaigns (2024-01-01: 56)" in found
    refused = shop_copy.run("campaign", "start", "--as-of=2024-01-01", "--output=a.csv", "--capacity=9", status=1)
    assert "was started with --capacity 500" in refused.output
    missing = shop_copy.run("campaign", "start", "--as-of=2024-01-02", "--output=a.csv", status=1)
    assert "say how many customers can be called" in missing.output


def test_the_next_list_is_by_uplift_where_offers_keep_one_segment_alone(shop_copy: Project) -> None:
    """closedloop campaign start --rank-by uplift, after a month in which the simulator lets offers keep `SEGMENT`."""
    started = ("campaign", "start", "--as-of", "2024-01-01", "--output", "first.csv")
    shop_copy.run(*started, "--capacity", "1500", "--holdout", "0.4")
    run = load_run(shop_copy.root / "params.yaml", root=shop_copy.root)
    actions, store = build_actions(run), build_predictions(run)
    (campaign,) = actions.list_campaigns("shop_churn", until=run.params.as_of_at)
    chosen = {one.customer_id: one for one in actions.list_actions(campaign)}
    treated = frozenset(who for who, one in chosen.items() if (one.arm, one.segment) == ("treated", SEGMENT))
    early = ("--as-of", "2024-01-05", *NEXT[2:], "--output", "early.csv")
    told = shop_copy.run("campaign", "start", *early).output
    assert "ranked by probability: too few: 0 customers held out in closed campaigns" in " ".join(told.split())

    end = campaign.closes_at.date()
    spec = SimulatorSpec(seed=run.params.seed, customers=run.params.simulator.customers)
    offers = [Offers(campaign.as_of.date(), treated, 0.9)]
    events = simulate(spec, start=run.params.simulator.start_date, end=end, offers=offers).events
    bought = set(events.loc[(events["event_type"] == "purchase") & (events["time"] >= campaign.as_of), "customer_id"])
    logged = [one for some in store.read_predictions("shop_churn") for one in some]
    mine = [one for one in logged if one.customer_id in chosen and one.predicted_at == campaign.as_of]
    store.insert([Outcome(one.prediction_id, int(one.customer_id not in bought), campaign.closes_at) for one in mine])
    told = " ".join(shop_copy.run("campaign", "start", *NEXT, "--output", "next.csv").output.split())
    assert "ranked by uplift: its list keeps more; Qini" in told
    listed = pd.read_csv(shop_copy.root / "next.csv")
    assert (listed["segment"] == SEGMENT).mean() > 0.9
    assert (listed["effect"].diff().dropna() <= 0).all()
    assert shop_copy.read_json("next.campaign.json")["ranking"]["by"] == "uplift"
    report = shop_copy.run("campaign", "report", "--as-of", "2024-02-06").output
    assert "ranked by uplift: its list keeps more" in " ".join(report.split())


def test_the_training_set_leaves_out_who_was_treated(shop_copy: Project) -> None:
    """Treated customers go, at each snapshot whose horizon meets the campaign's; the held out stand for them."""
    parts = ("train", "validation", "test")

    def read() -> pd.DataFrame:
        return pd.concat([pd.read_parquet(shop_copy.root / f"data/training/{part}.parquet") for part in parts])

    before = read()
    newest = before["event_timestamp"].max()
    people = sorted(before.loc[before["event_timestamp"] == newest, "customer_id"])[:300]
    run = load_run(shop_copy.root / "params.yaml", root=shop_copy.root)
    rules = ("c", "shop_churn", "1", newest.to_pydatetime(), 30, 200, 1 / 3, "c", 200, 100, None, run.params.as_of_at)
    chosen = [
        Action(who, place, "held_out" if place % 3 == 0 else "treated", 0.5, None, None, None, "")
        for place, who in enumerate(people, 1)
    ]
    build_actions(run).record_campaign(Campaign(*rules), chosen)
    told = shop_copy.run("training-set").output
    after, counts = read(), shop_copy.read_json("metrics/training_set.json")["actions"]
    at_newest = [rows[rows["event_timestamp"] == newest].set_index("customer_id") for rows in (before, after)]
    assert (counts["treated"], counts["held_out"]) == (200, 100)
    assert "200 rows of treated customers left out" in " ".join(told.split())
    assert not set(people[0::3]) & set(at_newest[1].index)
    assert len(at_newest[1].loc[people[2::3]]) == 300
    assert len(at_newest[1]) == len(at_newest[0])
    older = [rows[rows["event_timestamp"] < newest] for rows in (before, after)]
    assert older[0].reset_index(drop=True).equals(older[1].reset_index(drop=True))
    shop_copy.run_stages("train", "evaluate")
    assert shop_copy.read_json("metrics/gates.json")["gates"]["feature_cutoff"]["passed"]
