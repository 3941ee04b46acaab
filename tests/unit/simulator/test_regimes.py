from __future__ import annotations

import datetime as dt

from closedloop.simulator.regimes import describe_changes

END = dt.date(2025, 1, 1)


def test_changes_are_listed_by_date_and_those_without_one_are_left_out() -> None:
    changes = describe_changes(dt.date(2024, 6, 1), None, dt.date(2024, 2, 1), end=END)
    assert [(change["kind"], change["at"]) for change in changes] == [
        ("concept", "2024-02-01"),
        ("covariate", "2024-06-01"),
    ]


def test_a_change_is_in_force_from_its_day_on() -> None:
    day = dt.date(2024, 4, 1)
    assert describe_changes(None, day, None, end=day) == []
    (change,) = describe_changes(None, day, None, end=day + dt.timedelta(days=1))
    assert (change["kind"], change["at"], change["figures"]) == ("harmless", "2024-04-01", {"price_factor": 1.28})
