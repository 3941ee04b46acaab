"""The commands of docs/actions.md about campaigns, on a shop with a champion: the list, its arms, and the report."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import Project

pytestmark = pytest.mark.thorough

PAGE = (Path(__file__).parents[2] / "docs" / "actions.md").read_text(encoding="utf-8")
VALUE = {"kept": {"amount_of_days": 30, "share": 0.4}, "offer_cost": 1, "save_rate": 0.3}


def read_commands() -> list[list[str]]:
    lines = re.findall(r"^closedloop (?:campaign|outcomes) .*", PAGE, re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines]


def test_the_walk_of_the_page(shop_copy: Project) -> None:
    """closedloop campaign start, closedloop outcomes, closedloop campaign report."""
    shop_copy.change_dataset("shop", {"value": VALUE})
    start, outcomes, report = read_commands()
    assert "500 customers to call, 56 left alone" in shop_copy.run(*start).output
    listed = pd.read_csv(shop_copy.root / "list.csv")
    assert listed["arm"].value_counts().to_dict() == {"treated": 500, "held_out": 56}
    assert (listed["expected_value"].diff().dropna() <= 0).all()
    assert (listed["expected_value"] > 0).all()
    assert listed["reasons"].str.contains(" the risk: ").all()
    first = (shop_copy.root / "list.csv").read_bytes()
    assert "500 customers to call" in shop_copy.run(*start).output
    assert (shop_copy.root / "list.csv").read_bytes() == first
    early = shop_copy.run("campaign", "report", "--as-of", "2024-01-30").output
    assert "too early: the outcomes are known from 2024-01-31 on" in early
    waiting = shop_copy.run(*report).output
    assert "too early: 556 of 556 customers have no outcome yet" in waiting
    shop_copy.run(*outcomes)
    told = shop_copy.run(*report).output
    found = json.loads(shop_copy.run(*report, "--json").stdout)
    effect = found["effect"]
    assert (effect["treated"], effect["held_out"]) == (500, 56)
    assert effect["effect"]["low"] < effect["effect"]["value"] < effect["effect"]["high"]
    assert f"net profit {effect['profit']['value']:+,.0f}" in told
    assert sum(one["treated"] for one in found["groups"]["segment"].values()) == 500
    assert Path(shop_copy.root / found["picture"]).read_bytes().startswith(b"\x89PNG")
    refused = shop_copy.run("campaign", "start", "--as-of=2024-01-01", "--output=a.csv", "--capacity=9", status=1)
    assert "was started with --capacity 500" in refused.output
    missing = shop_copy.run("campaign", "start", "--as-of=2024-01-02", "--output=a.csv", status=1)
    assert "say how many customers can be called" in missing.output
