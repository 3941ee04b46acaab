"""A table's features are the same with Feast and without it."""

from __future__ import annotations

import pandas as pd
import pytest

from closedloop.adapters.feast import Features
from closedloop.adapters.feature_files import FeatureFiles
from closedloop.config.featureset import FeatureSet
from closedloop.config.settings import load_settings
from closedloop.errors import DataError

DAYS = pd.to_datetime(["2024-01-01", "2024-02-01"], utc=True).as_unit("us")


@pytest.fixture
def stores(tmp_path, make_project):
    project = make_project(tmp_path / "project")
    settings = load_settings(folder=project.root / "configs")
    features = FeatureSet(("fee",), ("plan",), "members_1")
    return [kind(settings, project="members", features=features, max_age_days=31) for kind in (Features, FeatureFiles)]


@pytest.fixture
def features_dir(tmp_path):
    for day, fees in zip(DAYS, ([1.5, None, 3.0], [2.5, 4.0, None]), strict=True):
        rows = {"customer_id": ["a", "b", "c"], "event_timestamp": day, "fee": fees, "plan": ["x", None, "y"]}
        pd.DataFrame(rows).to_parquet(tmp_path / f"{day:%Y-%m-%d}.parquet", index=False)
    return tmp_path


def test_the_join_without_feast_has_feasts_values(stores, features_dir):
    asked = pd.DataFrame(
        {"customer_id": ["c", "a", "b"], "event_timestamp": [DAYS[1], DAYS[0], DAYS[1]], "churned": True}
    )
    with_feast, without = (store.read_historical(asked, features_dir) for store in stores)
    pd.testing.assert_frame_equal(without, with_feast, check_dtype=False)
    assert without["fee"].tolist()[1:] == [1.5, 4.0]


@pytest.mark.parametrize("customer", ["d", "a"])
def test_a_row_without_features_or_with_two_is_refused(stores, features_dir, customer):
    if customer == "a":
        pd.read_parquet(features_dir / "2024-01-01.parquet").to_parquet(features_dir / "2024-01-01-again.parquet")
    asked = pd.DataFrame({"customer_id": [customer], "event_timestamp": [DAYS[0]]})
    with pytest.raises(DataError, match="each customer must occur once a day"):
        stores[1].read_historical(asked, features_dir)
