"""The loop's metrics for Prometheus, read from the operations store at every scrape."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from closedloop.errors import ClosedloopError
from closedloop.loop.status.overview import Overview
from closedloop.serving.exposition import register_page
from closedloop.store.migrations.tables import RETRAINING_STATES, VERDICTS

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

    from closedloop.store.checks import Check

logger = logging.getLogger(__name__)
ROLLING_ROWS_MIN = 100
Series = dict[tuple[str, ...], float | None]


class GaugeDoc(NamedTuple):
    """Labels and meaning of a metric; all of them are gauges, and an unknown value has no series."""

    labels: tuple[str, ...]
    help: str


GAUGES: dict[str, GaugeDoc] = {
    "operations_store_up": GaugeDoc((), "1 if the operations store could be read, else 0 and nothing else is shown"),
    "model_champion_info": GaugeDoc(("model_version",), "1 for the version that serves"),
    "model_champion_age_seconds": GaugeDoc((), "Seconds since this version became champion"),
    "model_release_step_info": GaugeDoc(("model_version", "step"), "1 for the version being released and its step"),
    "model_release_step_age_seconds": GaugeDoc((), "Seconds since that step began"),
    "model_release_look_age_seconds": GaugeDoc((), "Seconds since a controller last judged that step, or its start"),
    "model_release_weight": GaugeDoc((), "Share of the answers that the challenger gives, 0 to 1"),
    "monitor_check_age_seconds": GaugeDoc((), "Seconds since the newest check was recorded"),
    "monitor_judged_age_seconds": GaugeDoc(
        (), "Seconds, by the data's clock, from the last check with enough to judge by to the newest check"
    ),
    "monitor_check_predictions": GaugeDoc((), "Predictions in the newest check's window"),
    "monitor_verdict": GaugeDoc(("verdict",), "1 for the newest check's verdict, 0 for the others"),
    "data_drift_score": GaugeDoc(
        ("feature_name",), "Effect size of the last judged window against the reference, 0 to 1; 'score' is predictions"
    ),
    "data_drift_alarm": GaugeDoc(("feature_name",), "1 if that effect is beyond chance and beyond its floor, else 0"),
    "model_accuracy_estimated": GaugeDoc((), "Accuracy of the last judged window, estimated without labels"),
    "model_accuracy_reference": GaugeDoc((), "The same estimate on the model's reference rows"),
    "model_accuracy_rolling": GaugeDoc(
        (), "Realised accuracy over the champion's last 1,000 closed outcomes; absent below 100"
    ),
    "model_brier_realised": GaugeDoc((), "Brier score of the outcomes that the last judging check saw"),
    "model_brier_expected": GaugeDoc((), "The Brier score that was expected of the same rows"),
    "money_at_stake": GaugeDoc((), "What customers who are expected to leave are worth, in the newest check's window"),
    "money_offers": GaugeDoc((), "Offers in that window with an expected profit above 0, up to the capacity"),
    "money_expected_profit": GaugeDoc((), "What those offers are expected to bring"),
    "label_maturity_ratio": GaugeDoc(
        (), "Share of the newest 5,000 predictions with a closed horizon whose outcome is known"
    ),
    "feature_age_seconds": GaugeDoc(
        (), "Age of the newest features served to requests by customer, by the data's clock"
    ),
    "model_retrainings": GaugeDoc(("state",), "Retrainings by state"),
    "model_retraining_state": GaugeDoc(("state",), "1 for the state of the newest retraining, 0 for the others"),
    "model_retraining_open_age_seconds": GaugeDoc((), "Seconds since the oldest open retraining changed; 0 if none"),
}


def build_registry(read: Callable[[], Overview]) -> CollectorRegistry:
    """The registry for prometheus_client's HTTP server; it reads the overview anew at every scrape."""
    return register_page(lambda: _collect(read))


def _collect(read: Callable[[], Overview]) -> Iterator[Metric]:
    """`GAUGES`; while the store cannot be read only ``operations_store_up 0`` is shown, no old figures."""
    from prometheus_client.metrics_core import GaugeMetricFamily

    try:
        samples: dict[str, Series] = {"operations_store_up": {(): 1.0}, **measure(read())}
    except ClosedloopError as error:
        logger.error("the operations store cannot be read, so no metric is shown: %s", error)
        samples = {"operations_store_up": {(): 0.0}}
    for name, found in samples.items():
        family = GaugeMetricFamily(name, GAUGES[name].help, labels=GAUGES[name].labels)
        for labels, value in found.items():
            if value is not None:
                family.add_metric(labels, value)
        yield family


def measure(view: Overview) -> dict[str, Series]:
    """The values of `GAUGES` by label values; an unknown value is None or has no entry."""
    row, rollout, check = view.row, view.rollout, view.check
    features = view.drift.get("features", {})
    drifted = view.drift.get("drifted", ())
    rolling = view.accuracy.value if view.accuracy.whole >= ROLLING_ROWS_MIN else None

    def age(moment: dt.datetime | None) -> Series:
        return {(): (view.now - moment).total_seconds()} if moment else {}

    return {
        "model_champion_info": {(row.champion_version,): 1.0} if row else {},
        "model_champion_age_seconds": age(view.serves_since),
        "model_release_step_info": {(rollout.version, rollout.step): 1.0} if rollout else {},
        "model_release_step_age_seconds": age(rollout.step_at if rollout else None),
        "model_release_look_age_seconds": age(view.looked_at),
        "model_release_weight": {(): row.weight} if row else {},
        "monitor_check_age_seconds": age(check.recorded_at if check else None),
        "monitor_judged_age_seconds": _measure_blindness(check),
        "monitor_check_predictions": {(): check.predictions} if check else {},
        "monitor_verdict": _one_of(VERDICTS, check.verdict if check else None),
        "data_drift_score": {(name,): shift["effect"] for name, shift in features.items()},
        "data_drift_alarm": {(name,): float(name in drifted) for name in features},
        "model_accuracy_estimated": {(): view.estimate.get("accuracy")},
        "model_accuracy_reference": {(): view.estimate.get("reference", {}).get("accuracy")},
        "model_accuracy_rolling": {(): rolling},
        "model_brier_realised": {(): view.realised.get("brier")},
        "model_brier_expected": {(): view.realised.get("expected", {}).get("brier")},
        "money_at_stake": {(): view.money.get("at_stake")},
        "money_offers": {(): view.money.get("offers")},
        "money_expected_profit": {(): view.money.get("expected_profit")},
        "label_maturity_ratio": {(): view.labelled.value},
        "feature_age_seconds": (
            {(): (view.as_of - view.features_as_of).total_seconds()} if view.features_as_of else {}
        ),
        "model_retrainings": {(state,): count for state, count in view.retrainings.items()},
        "model_retraining_state": _one_of(RETRAINING_STATES, view.retraining.state if view.retraining else None),
        "model_retraining_open_age_seconds": age(view.open_since) or {(): 0.0},
    }


def _measure_blindness(check: Check | None) -> Series:
    judged_at = check.evidence.get("judged_at") if check else None
    if check is None or judged_at is None:
        return {}
    return {(): (check.as_of - dt.datetime.fromisoformat(judged_at)).total_seconds()}


def _one_of(values: Iterable[str], found: str | None) -> Series:
    return {(value,): float(value == found) for value in values} if found else {}
