from __future__ import annotations

import datetime as dt

from closedloop.core.regimes import RegimeChange, describe_changes, list_changes


def test_changes_are_listed_by_date_and_those_without_one_are_left_out() -> None:
    changes = list_changes(dt.date(2024, 6, 1), None, dt.date(2024, 2, 1))
    assert [(change.kind, change.at) for change in changes] == [
        ("concept", dt.date(2024, 2, 1)),
        ("covariate", dt.date(2024, 6, 1)),
    ]


def test_a_change_is_in_force_from_its_day_on() -> None:
    changes = (RegimeChange("harmless", dt.date(2024, 4, 1), "prices rise"),)
    assert describe_changes(changes, end=dt.date(2024, 4, 1)) == []
    assert describe_changes(changes, end=dt.date(2024, 4, 2)) == [
        {"kind": "harmless", "at": "2024-04-01", "what": "prices rise", "figures": {"price_factor": 1.28}}
    ]
