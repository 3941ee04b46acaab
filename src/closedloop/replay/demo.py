"""A day of requests by the data's clock, sent to the champion's service, which runs for that long."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from closedloop.bootstrap import RunContext, build_predictions
from closedloop.config.environment import keep_environment
from closedloop.config.layout import Layout
from closedloop.core.release.assignment import hash_share
from closedloop.errors import ConfigError, count_noun
from closedloop.replay.traffic import Traffic, wait_stored
from closedloop.serving.clock import Clock
from closedloop.stages.parts.online import find_newest_snapshot
from closedloop.tabular.tables import read_table

if TYPE_CHECKING:
    from closedloop.core.release.entries import Deployment

CUSTOMERS_MAX = 2_000
# Requests in each hour of a day (UTC), relative to each other: few at night, most in the evening.
HOURS = (2, 1, 1, 1, 1, 2, 3, 5, 6, 6, 6, 6, 7, 6, 5, 5, 6, 7, 9, 10, 10, 8, 5, 3)
FOLDER = "state/demo"


@dataclasses.dataclass(frozen=True)
class DemoDay:
    """A day's requests: the customers that ask in each of its hours."""

    at: dt.date
    hours: tuple[tuple[str, ...], ...]

    @property
    def requests(self) -> int:
        """How many there are."""
        return sum(map(len, self.hours))


def plan_day(context: RunContext, at: dt.date, layout: Layout) -> DemoDay:
    """Choose customers whose features are online, by a stable hash of their ids, and deal them to the hours.

    Raises
    ------
    ConfigError
        If the features are too old for requests of that day.
    """
    newest = find_newest_snapshot(layout.features).date()
    limit = context.dataset.feature_max_age_days
    if (at - newest).days > limit:
        raise ConfigError(
            f"demo: the features are of {newest}, and on {at} they are older than {count_noun(limit, 'day')}: "
            f"bring newer ones online with closedloop refresh --as-of {at}"
        )
    rows = read_table(layout.features / f"{newest}.parquet", ["customer_id"], made_by="closedloop features")
    asking = sorted({str(one) for one in rows["customer_id"]}, key=lambda one: hash_share(f"{at}", one))
    return DemoDay(at, deal_hours(asking[:CUSTOMERS_MAX]))


def deal_hours(customers: list[str]) -> tuple[tuple[str, ...], ...]:
    """Deal customers to the hours of a day, in proportion to `HOURS`.

    Examples
    --------
    >>> [len(hour) for hour in deal_hours([f"C{n}" for n in range(121)])][:6]
    [2, 1, 1, 1, 1, 2]
    """
    ends = [round(sum(HOURS[: hour + 1]) / sum(HOURS) * len(customers)) for hour in range(len(HOURS))]
    return tuple(tuple(customers[start:end]) for start, end in zip([0, *ends], ends, strict=False))


@contextmanager
def serve_by(context: RunContext, day: DemoDay, row: Deployment) -> Iterator[Traffic]:
    """Run the service on free ports, with a state folder and a clock of its own, for the length of the block."""
    folder = context.settings.locate(FOLDER) / context.dataset.model_name
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(folder / "clock")
    clock.set(dt.datetime.combine(day.at, dt.time(), dt.UTC))
    with keep_environment():
        os.environ["CLOSEDLOOP_SERVING__STATE"] = str(folder / "serving")
        os.environ["CLOSEDLOOP_SERVING__TOKENS"] = "{}"  # it answers this process alone, on loopback
        os.environ["CLOSEDLOOP_SERVING__HOST"] = "127.0.0.1"
        traffic = Traffic(folder / "clock", folder / "service.log")
        try:
            traffic.wait_for(row.revision)
            yield traffic
        finally:
            traffic.stop()


def send(context: RunContext, day: DemoDay, traffic: Traffic, show: Callable[[int], object]) -> None:
    """Send a day's requests, each hour by its time of the data's clock, and wait until all are in the store.

    Parameters
    ----------
    show
        Called with the number of requests that were sent so far.
    """
    clock, last, sent = Clock(context.settings.locate(FOLDER) / context.dataset.model_name / "clock"), "", 0
    midnight = dt.datetime.combine(day.at, dt.time(), dt.UTC)
    for hour, customers in enumerate(day.hours):
        clock.set(midnight + dt.timedelta(hours=hour))
        last = traffic.ask(customers) or last
        sent += len(customers)
        show(sent)
    wait_stored(build_predictions(context), context.dataset.model_name, last, traffic)
