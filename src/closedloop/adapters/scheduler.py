"""APScheduler: something done again and again in the foreground."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable


def repeat(job: Callable[[], None], *, minutes: float) -> None:
    """Call ``job`` now and every so many minutes until interrupted; what it raises is logged, and the next comes."""
    from apscheduler.schedulers.blocking import BlockingScheduler

    scheduler = BlockingScheduler(timezone=dt.UTC)
    scheduler.add_job(
        job, "interval", minutes=minutes, next_run_time=dt.datetime.now(dt.UTC), coalesce=True, max_instances=1
    )
    scheduler.start()
