"""Profit of a release's outcomes, from the features that predictions were logged with."""

from __future__ import annotations

import datetime as dt
from contextlib import closing
from pathlib import Path

import pytest

from closedloop.core.evaluation.value import CustomerValue, KeptCustomer
from closedloop.core.release.entries import Rollout
from closedloop.core.release.sequential import LOSS_GAP_MAX
from closedloop.records import Outcome, Prediction
from closedloop.release.evidence import Evidence
from closedloop.release.money import fix_stake
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from closedloop.store.release_queries import ReleaseQueries
from tests.releases import Traffic

DAY = dt.timedelta(days=1)
BEGAN = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
# Worth of the customer, scores of champion and challenger, what happened, and who says so.
CUSTOMERS = [(100.0, 0.9, 0.1, 1, "a"), (100.0, 0.1, 0.9, 0, "a"), (400.0, 0.1, 0.1, 1, "a"), (None, 0.9, 0.9, 1, "b")]


def list_rows() -> list[Prediction | Outcome]:
    rows: list[Prediction | Outcome] = []
    for number, (worth, first, second, outcome, client) in enumerate(CUSTOMERS):
        answered = f"{number:048x}"
        for version, score, variant in (("1", first, "champion"), ("2", second, "shadow")):
            mine = answered if version == "1" else f"{number + 99:048x}"
            rows.append(
                Prediction(
                    mine,
                    "r",
                    "shop_churn",
                    version,
                    variant,
                    "http",
                    BEGAN + DAY / 2,
                    ("north", worth),
                    score,
                    0,
                    1.0,
                    customer_id=f"C{number}",
                    features_as_of=BEGAN,
                    answered_id=None if mine == answered else answered,
                )
            )
        rows.append(Outcome(answered, outcome, BEGAN + 31 * DAY, client))
    return rows


@pytest.mark.parametrize("worth", [KeptCustomer(column="income", share=0.5), KeptCustomer(number=50)])
def test_profit_is_counted_by_the_features_that_were_scored(tmp_path: Path, worth: KeptCustomer) -> None:
    import pandas as pd

    value = CustomerValue(kept=worth, offer_cost=5, save_rate=0.2)
    columns = ["income"] if worth.column else []
    stake = fix_stake(
        value, pd.DataFrame({"income": [100.0] * 9, "score": 0.5})[[*columns, "score"]], [1] * len(columns)
    )
    rollout, later = Rollout("2", "1", "canary_50", BEGAN, BEGAN, {}, stake=stake), BEGAN + 40 * DAY
    with closing(Database(f"sqlite:///{tmp_path / 'operations.db'}")) as database:
        database.upgrade()
        store = Predictions(database)
        assert store.insert(list_rows()).refused == ()
        evidence = Evidence(ReleaseQueries(database), store, Traffic(), "customer", 30)
        found = evidence.gather("shop_churn", rollout, revision=1, now=later, as_of=later)
        none = evidence.gather(
            "shop_churn", Rollout("2", "1", "canary_50", BEGAN, BEGAN, {}), revision=1, now=later, as_of=later
        )
    # Half of 100 is kept one time in five: an offer to a churner brings 5 and one to a stayer costs 5; both are lost.
    assert found.profits.customers == found.losses.customers == 4
    assert found.profits.total * found.profit_unit == pytest.approx(5 + 5)
    assert found.profit_unit == pytest.approx(5 / LOSS_GAP_MAX)
    assert [(one.client, one.profits.customers, one.losses.customers) for one in found.without] == [("b", 3, 3)]
    assert (none.profits.customers, none.profit_unit, none.losses) == (0, 0.0, found.losses)
