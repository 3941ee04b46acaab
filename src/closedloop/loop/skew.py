"""Skew gate: compare the features served to requests by customer with training's point-in-time join."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from closedloop.config.featureset import read_features
from closedloop.contract import ModelContract
from closedloop.errors import DataError, GateFailed, count_noun
from closedloop.serving.slots.downloads import fetch_contract
from closedloop.serving.slots.slots import BUNDLED
from closedloop.stages.parts.online import CUSTOMER, count_differences

if TYPE_CHECKING:
    from closedloop.adapters.feast import Features
    from closedloop.adapters.mlflow import Tracking
    from closedloop.store.predictions import Predictions

SERVED = ("http", "stream")
Served = tuple[str, dt.datetime, tuple[float | str | None, ...]]


class SkewReport(NamedTuple):
    """Counts: requests by customer, the different rows that they were served, and rows of unregistered models."""

    requests: int
    rows: int
    bundled: int


def check_skew(
    store: Predictions, registry: Tracking, features: Features, *, since: dt.datetime | None = None
) -> SkewReport:
    """Join logged requests by customer again through Feast, and compare each value that was served.

    Parameters
    ----------
    registry
        Gives a version's features and their order.
    features
        The data set's project; each version's own definition is used.
    since
        Compare requests from this time on (UTC).

    Raises
    ------
    GateFailed
        If a value differs; the message names customer, column and both values.
    DataError
        If there is nothing to compare, or a snapshot that was served was never published.
    """
    served: dict[str, set[Served]] = defaultdict(set)
    requests = 0
    for chunk in store.read_predictions(features.project, since=since):
        for one in chunk:
            if one.source not in SERVED or one.variant == "shadow":  # a scored file's rows carry their features
                continue
            if one.customer_id is not None and one.features_as_of is not None:
                served[one.model_version].add((one.customer_id, one.features_as_of, one.features))
                requests += 1
    bundled = len(served.pop(BUNDLED, ()))
    if not served:
        raise DataError("skew: no request by customer, answered by a registered version, was logged in this time")
    found = [_compare(served[version], fetch_contract(registry, version), features) for version in sorted(served)]
    rows = sum(map(len, served.values()))
    wrong, first = sum(count for count, _ in found), next((words for _, words in found if words), "")
    if wrong:
        raise GateFailed(
            f"skew gate: {wrong} of {count_noun(rows, 'row')} that were served differ (limit 0); first: {first}"
        )
    return SkewReport(requests, rows, bundled)


def _compare(served: set[Served], contract: ModelContract, features: Features) -> tuple[int, str]:
    """See `count_differences`."""
    import pandas as pd

    from closedloop.adapters.feast import TIMESTAMP

    ordered = sorted(served, key=lambda row: (row[1], row[0]))
    online = pd.DataFrame([values for *_, values in ordered], columns=list(contract.feature_names), dtype=object)
    asked = pd.DataFrame({CUSTOMER: [row[0] for row in ordered], TIMESTAMP: [row[1] for row in ordered]})
    asked[TIMESTAMP] = asked[TIMESTAMP].astype("datetime64[us, UTC]")
    offline = features.with_definition(read_features(contract)).read_published(asked)
    if offline is None:
        days = ", ".join(f"{day:%Y-%m-%d}" for day in asked[TIMESTAMP].drop_duplicates())
        raise DataError(f"skew: {contract.feature_service}: not all of the served snapshots are published: {days}")
    return count_differences(offline, online, contract.feature_names)
