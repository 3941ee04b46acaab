"""APScheduler: run a job at a fixed interval."""

from __future__ import annotations

import datetime as dt
import logging
import re
from collections.abc import Callable

from closedloop.errors import ClosedloopError, ConfigError

logger = logging.getLogger(__name__)
UNITS = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}


def parse_interval(text: str) -> dt.timedelta:
    """An interval such as 1d, 12h, 30m or 5s.

    Raises
    ------
    ConfigError
        If the text is no such interval.
    """
    found = re.fullmatch(r"([1-9]\d{0,4})([dhms])", text)
    if not found:
        raise ConfigError(f"--every {text}: allowed are whole days, hours, minutes or seconds: 1d, 12h, 30m, 5s")
    return dt.timedelta(**{UNITS[found[2]]: int(found[1])})


def repeat(job: Callable[[dt.datetime], object], every: str) -> None:
    """Run a job now and at every interval, with the UTC time as argument, until stopped.

    A failure is logged, and the job runs again at the next interval. A job that takes longer than the interval never
    runs twice at once.
    """
    from apscheduler.schedulers.blocking import BlockingScheduler

    def run() -> None:
        try:
            job(dt.datetime.now(dt.UTC))
        except ClosedloopError as error:
            logger.error("%s: %s", type(error).__name__, error)

    seconds = parse_interval(every).total_seconds()
    scheduler = BlockingScheduler(timezone=dt.UTC)
    scheduler.add_job(
        run, "interval", seconds=seconds, next_run_time=dt.datetime.now(dt.UTC), coalesce=True, misfire_grace_time=None
    )
    scheduler.start()
