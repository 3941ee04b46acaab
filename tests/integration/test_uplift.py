"""The next list after closed campaigns: by uplift where they show its gain, else by score, and why."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from closedloop.bootstrap import load_run
from closedloop.contract import ModelContract, NumericFeature, read_contract
from closedloop.core.evaluation.value import CustomerValue
from closedloop.errors import DataError
from closedloop.loop.campaigns.ranking import describe_ranking
from closedloop.loop.campaigns.start import CampaignRules, start_campaign, write_campaign
from closedloop.records import Outcome, Prediction
from closedloop.store.actions import Actions, Campaign
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from tests.campaign_stores import empty_store
from tests.conftest import create_project
from tests.model_folders import FEATURES, write_model_folder

DAY = dt.timedelta(days=1)
START = dt.datetime(2024, 3, 1, tzinfo=dt.UTC)
LATER = START + 31 * DAY
MODEL = "shop_churn"
PEOPLE, TRIED = 6_000, 4_000
VALUE = CustomerValue(kept=50, offer_cost=1, save_rate=0.2)


@pytest.fixture
def url(database: str) -> str:
    return empty_store(database)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = create_project(tmp_path_factory.mktemp("project")).root
    return load_run(root / "params.yaml", root=root)


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> ModelContract:
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    return read_contract(folder).model_copy(update={"model_name": MODEL})


class Shop:
    """A store, and people of whom those with the plan ``plus`` are kept by an offer as often as it is said."""

    def __init__(self, url: str, run: Any, contract: ModelContract, value: CustomerValue | None = None) -> None:
        self.actions, self.store = Actions(Database(url)), Predictions(Database(url))
        self.run, self.value = run, value
        self.contracts = {"7": contract}

    def make_people(self, at: dt.datetime) -> pd.DataFrame:
        rng = np.random.default_rng(at.toordinal())
        chance = rng.beta(2, 3, PEOPLE)
        values = {"visits_30d": rng.poisson(6, PEOPLE).astype(float), "age": rng.integers(20, 70, PEOPLE).astype(float)}
        people = pd.DataFrame({"customer_id": [f"C{number}" for number in range(PEOPLE)], "probability": chance})
        people = people.assign(**values, plan=np.where(rng.random(PEOPLE) < 0.5, "plus", "basic"))
        return people.assign(leaves=rng.random(PEOPLE) < chance)

    def start(self, at: dt.datetime, rules: CampaignRules, version: str = "7") -> Campaign:
        params = self.run.params.model_copy(update={"as_of": at.date()})
        dataset = self.run.dataset.model_copy(update={"value": self.value})
        return start_campaign(
            self.actions,
            params,
            dataset,
            rules,
            version=version,
            score=lambda: self.score(at, version),
            read_contract=self.contracts.__getitem__,
            now=dt.datetime.now(dt.UTC),
        )

    def score(self, at: dt.datetime, version: str) -> pd.DataFrame:
        """Everybody's scores, and a log of them with the features; the list's own columns may be called like these."""
        people, names = self.make_people(at), self.contracts[version].feature_names
        fixed = ("r", MODEL, version, "champion", "batch", at)
        self.store.insert(
            [
                Prediction(
                    f"{row.Index:08x} {at:%Y%m%d}",
                    *fixed,
                    tuple(getattr(row, name) for name in names),
                    row.probability,
                    0,
                    0.1,
                    customer_id=row.customer_id,
                )
                for row in people.itertuples()
            ]
        )
        scored = people[["customer_id", "probability"]].assign(segment=None, reasons="", age="of another column")
        scored["prediction_id"] = [f"{number:08x} {at:%Y%m%d}" for number in people.index]
        return scored if self.value is None else scored.assign(kept_value=50.0)

    def close(self, campaign: Campaign, saved: float) -> None:
        """Store what became of the customers a horizon later."""
        people, rng = self.make_people(campaign.as_of), np.random.default_rng(1)
        arms = {one.customer_id: one.arm for one in self.actions.list_actions(campaign)}
        is_saved = (rng.random(PEOPLE) < saved) & (people["plan"] == "plus")
        made: list[Any] = []
        for row, stays in zip(people.itertuples(), is_saved, strict=True):
            if row.customer_id not in arms:
                continue
            left = row.leaves and not (stays and arms[row.customer_id] == "treated")
            name = f"{row.Index:08x} {campaign.as_of:%Y%m%d}"
            made.append(Outcome(name, int(left), campaign.closes_at, "label rule"))
        self.store.insert(made)

    def list_plans(self, campaign: Campaign) -> pd.Series:
        people = self.make_people(campaign.as_of).set_index("customer_id")
        return people.loc[[one.customer_id for one in self.actions.list_actions(campaign)], "plan"]

    def stop(self) -> None:
        self.actions.database.close()
        self.store.database.close()


@pytest.fixture
def shop(url: str, run: Any, contract: ModelContract) -> Iterator[Shop]:
    made = Shop(url, run, contract)
    yield made
    made.stop()


FIRST, NEXT = CampaignRules(2_800, 0.3), CampaignRules(500, 0.1, "uplift")


def test_the_next_list_holds_those_whom_offers_keep(shop: Shop, tmp_path: Path) -> None:
    first = shop.start(START, FIRST)
    assert first.ranking == {"asked": "score", "by": "probability"}
    shop.close(first, 0.7)
    made = shop.start(LATER, NEXT)
    assert made.ranking is not None
    assert made.ranking["by"] == "uplift"
    assert made.ranking["difference"]["low"] > 0
    assert made.ranking["campaigns"] == [
        {"campaign": "2024-03-01", "treated": 2_800, "held_out": 1_200, "used": 4_000, "left_out": None}
    ]
    chosen = shop.actions.list_actions(made)
    assert (shop.list_plans(made) == "plus").mean() > 0.95
    assert [one.effect for one in chosen] == sorted((one.effect for one in chosen), reverse=True)
    assert min(one.effect for one in chosen) > 0
    told = describe_ranking(made.ranking)
    assert told is not None
    assert told.startswith("ranked by uplift: its list keeps more; Qini 0.0")
    lowest = min(one.probability for one in shop.actions.list_actions(first))
    untried = int((shop.make_people(LATER)["probability"] < lowest).sum())
    assert f"; left out, with a lower probability than anybody in these campaigns: {untried:,} customers" in told
    write_campaign(made, chosen, str(tmp_path / "list.csv"))
    assert pd.read_csv(tmp_path / "list.csv")["effect"].tolist() == [one.effect for one in chosen]
    record = json.loads((tmp_path / "list.campaign.json").read_text())
    assert record["ranking"] == made.ranking
    assert (record["as_of"], record["capacity"]) == ("2024-04-01", 500)
    assert shop.start(LATER, NEXT) == made
    with pytest.raises(DataError, match=r"--rank-by uplift, found 500, 0\.1 and score; give the same"):
        shop.start(LATER, CampaignRules(500, 0.1))


def test_features_are_those_of_the_scores_that_chose_customers(shop: Shop) -> None:
    """Both dates were scored before, when other plans were in the tables; and one customer is erased meanwhile."""
    for at, plans in ((START, {"plus": "basic", "basic": "basic"}), (LATER, {"plus": "basic", "basic": "plus"})):
        fixed, people = ("r", MODEL, "7", "champion", "batch", at), shop.make_people(at)
        before = [
            Prediction(
                f"-{one.Index} {at:%Y%m%d}",
                *fixed,
                (one.visits_30d, one.age, plans[one.plan]),
                0.5,
                0,
                0.1,
                customer_id=one.customer_id,
            )
            for one in people.itertuples()
        ]
        shop.store.insert(before)
    shop.close(shop.start(START, FIRST), 0.7)
    gone = people.loc[people["plan"] == "plus", ["customer_id", "probability"]].nlargest(1, "probability")
    score = shop.score

    def score_and_erase(at: dt.datetime, version: str) -> pd.DataFrame:
        found = score(at, version)
        shop.store.erase(gone["customer_id"].iloc[0])
        return found

    shop.score = score_and_erase  # type: ignore[method-assign]
    made = shop.start(LATER, NEXT)
    assert made.ranking is not None
    assert made.ranking["by"] == "uplift"
    assert (shop.list_plans(made) == "plus").mean() > 0.95
    assert gone["customer_id"].iloc[0] not in {one.customer_id for one in shop.actions.list_actions(made)}


def test_customers_below_those_who_were_ever_called_are_not_ranked(shop: Shop) -> None:
    first = shop.start(START, FIRST)
    shop.close(first, 0.7)
    made = shop.start(LATER, CampaignRules(5_400, 0.1, "uplift"))
    lowest = min(one.probability for one in shop.actions.list_actions(first))
    assert min(one.probability for one in shop.actions.list_actions(made)) >= lowest


def test_without_an_effect_that_differs_the_list_is_the_one_by_score(shop: Shop) -> None:
    shop.close(shop.start(START, FIRST), 0.0)
    made = shop.start(LATER, NEXT)
    assert made.ranking is not None
    assert made.ranking["by"] == "probability"
    assert "no gain is shown: the interval of the difference is not above zero; Qini" in made.ranking["reason"]
    assert made.ranking["difference"]["low"] <= 0
    best = shop.make_people(LATER).nlargest(556, "probability")["customer_id"]
    assert [one.customer_id for one in shop.actions.list_actions(made)] == best.tolist()
    assert {one.effect for one in shop.actions.list_actions(made)} == {None}


def test_by_value_the_effect_times_the_worth_less_the_cost_ranks(url: str, run: Any, contract: ModelContract) -> None:
    shop = Shop(url, run, contract, VALUE)
    shop.close(shop.start(START, FIRST), 0.7)
    made = shop.start(LATER, NEXT)
    assert made.ranking is not None
    assert made.ranking["by"] == "uplift"
    for one in shop.actions.list_actions(made):
        assert one.expected_value == pytest.approx(50 * one.effect - 1)
        assert one.expected_value > 0
    assert (shop.list_plans(made) == "plus").mean() > 0.95
    shop.value = CustomerValue(kept=50, offer_cost=40, save_rate=1)
    with pytest.raises(DataError, match="no customer is worth an offer: none of"):
        shop.start(LATER + 31 * DAY, NEXT)
    shop.stop()


def test_a_hold_out_that_is_too_small_is_named_and_the_list_is_by_score(shop: Shop) -> None:
    shop.close(shop.start(START, CampaignRules(500, 0.1)), 0.7)
    made = shop.start(LATER, NEXT)
    assert describe_ranking(made.ranking) == (
        "ranked by probability: too few: 56 customers held out in closed campaigns (2024-03-01: 56), at least "
        "100 are needed"
    )


def test_a_list_of_nobody_like_those_who_were_called_is_by_score(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.close(shop.start(START, FIRST), 0.7)
    people = shop.score(LATER, "7")
    low = people.assign(probability=people["probability"] / 1_000)
    monkeypatch.setattr(shop, "score", lambda at, version: low)
    made = shop.start(LATER, NEXT)
    assert made.ranking is not None
    assert made.ranking["by"] == "probability"
    assert made.ranking["reason"].endswith("; nobody has a score as high as those whom these campaigns chose")
    assert made.treated == 500


def test_a_campaign_whose_model_is_gone_is_left_out(shop: Shop) -> None:
    class Registry(dict[str, ModelContract]):
        def __getitem__(self, version: str) -> ModelContract:
            if version == "6":
                raise DataError("version 6: there is no such version")
            return super().__getitem__(version)

    shop.contracts["6"] = shop.contracts["7"]
    shop.close(shop.start(START, FIRST, version="6"), 0.7)
    shop.contracts = Registry(shop.contracts)
    made = shop.start(LATER, NEXT)
    assert made.ranking is not None
    (told,) = made.ranking["campaigns"]
    assert told["left_out"] == "its model is not to be had: version 6: there is no such version"
    assert made.ranking["by"] == "probability"


def test_campaigns_that_can_teach_nothing_are_left_out_and_named(shop: Shop) -> None:
    day, rules = iter(range(0, 1_000, 31)), CampaignRules(400, 0.0)
    shop.close(shop.start(START + next(day) * DAY, rules), 0.7)
    shop.start(START + next(day) * DAY, CampaignRules(400, 0.2))
    shop.start(START + next(day) * DAY, CampaignRules(400, 0.2))
    made = shop.start(START + 70 * DAY, NEXT)
    assert made.ranking is not None
    assert [one["left_out"] for one in made.ranking["campaigns"]] == [
        "it has no hold-out",
        "outcomes are missing",
        "its horizon is open until 2024-06-01",
    ]
    assert "too few: 0 customers held out in closed campaigns, at least" in made.ranking["reason"]


def test_campaigns_of_a_version_with_other_features_count_too(shop: Shop) -> None:
    """A feature that the champion has since is missing in the older campaign, and one that is gone is not asked for."""
    before = shop.contracts["7"]
    older = (FEATURES[2], NumericFeature(name="age", minimum=18.0, maximum=80.0))
    shop.contracts["6"] = before.model_copy(update={"features": older})
    shop.close(shop.start(START, FIRST, version="6"), 0.7)
    shop.close(shop.start(LATER, FIRST), 0.7)
    made = shop.start(LATER + 31 * DAY, NEXT)
    assert made.ranking is not None
    assert [one["used"] for one in made.ranking["campaigns"]] == [4_000, 4_000]
    assert (shop.list_plans(made) == "plus").mean() > 0.95


def test_the_same_outcomes_give_the_same_list_to_the_byte(run: Any, contract: ModelContract, tmp_path: Path) -> None:
    written = []
    for place in range(2):
        database = Database(f"sqlite:///{tmp_path / f'{place}.db'}")
        database.upgrade()
        database.close()
        shop = Shop(f"sqlite:///{tmp_path / f'{place}.db'}", run, contract)
        shop.close(shop.start(START, FIRST), 0.7)
        made, target = shop.start(LATER, NEXT), str(tmp_path / f"{place}.csv")
        write_campaign(made, shop.actions.list_actions(made), target)
        written.append([(tmp_path / f"{place}.{kind}").read_bytes() for kind in ("csv", "campaign.json")])
        shop.stop()
    assert written[0] == written[1]


def test_an_erased_customer_teaches_nothing(shop: Shop) -> None:
    first = shop.start(START, FIRST)
    shop.close(first, 0.7)
    shop.store.erase(shop.actions.list_actions(first)[0].customer_id)
    made = shop.start(LATER, NEXT)
    assert made.ranking is not None
    assert made.ranking["campaigns"][0]["used"] == 3_999
