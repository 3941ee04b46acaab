"""The clock of a replay: set once, it goes on, for every process that follows the file."""

from __future__ import annotations

import datetime as dt

from closedloop.serving.clock import WALL_CLOCK, Clock

MOMENT = dt.datetime(2024, 6, 1, tzinfo=dt.UTC)


def test_a_clock_that_is_set_goes_on_from_there_in_every_follower(tmp_path):
    path = tmp_path / "clock"
    ours, follower = Clock(path), Clock(path)
    ours.set(MOMENT)
    first, second = follower(), ours()
    assert MOMENT <= first <= second < MOMENT + dt.timedelta(minutes=1)
    ours.set(MOMENT + dt.timedelta(days=30))
    assert follower() >= MOMENT + dt.timedelta(days=30)


def test_without_a_file_it_is_the_wall_clock():
    before = dt.datetime.now(dt.UTC)
    assert before <= WALL_CLOCK() <= dt.datetime.now(dt.UTC)
