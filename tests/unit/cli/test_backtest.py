"""The table of the policy backtest on a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

import pytest

from closedloop.cli.backtest import print_table


def describe_policy(log_loss: float, low: float, found: float) -> dict[str, Any]:
    gain = {"mean": low + 0.01, "low": low, "high": low + 0.02}
    counts = {"retrainings": 12, "promoted": 9, "leavers_found": 22_222}
    return {"log_loss": log_loss, "gain": gain, "found": {"low": -found, "high": found}, **counts}


def test_figures_and_names_stand_whole_and_the_policy_that_was_picked_is_marked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    never = {"log_loss": 0.4123, "retrainings": 0, "promoted": 0, "leavers_found": 20_100}
    policies = {"never": never, "every_365_days": describe_policy(0.35, -0.0112, 1_234)}
    policies["outcomes"] = describe_policy(0.34, 0.0512, 2_345)
    told = {"rows": 23_456, "customers": 5_432, "snapshots": ["2024-03-01", "2024-12-01"], "dataset": "shop"}
    print_table({**told, "level": 0.95, "comparisons": 5, "policies": policies, "picked": "every_365_days"})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    cells = [[cell.strip() for cell in line.split("\u2502")] for line in lines if "\u2502" in line]
    assert cells == [
        ["never", "0.4123", "", "0 of 0", "20,100"],
        ["every_365_days *", "0.3500", "-0.0012", "9 of 12", "22,222"],
        ["", "", "-0.0112 to 0.0088", "", "-1,234 to +1,234"],
        ["outcomes", "0.3400", "+0.0612", "9 of 12", "22,222"],
        ["", "", "0.0512 to 0.0712", "", "-2,345 to +2,345"],
    ]
